"""Which elites of an archive become parents.

A rule is a function `(fitnesses [N], descriptors [N, D], bins [N, D], occupied [N]) -> probabilities [N]` in float32,
0 for empty cells; `bins` are the cells' coordinates along the descriptors. Write another one and hand it to
`CycleQDEmitter`, or wrap it in `RuleSelector` for QDax's emitters.
"""

from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Num
from qdax.core.containers.mapelites_repertoire import MapElitesRepertoire
from qdax.core.emitters.repertoire_selectors.selector import Selector

from cqd_jax.types import PRNGKey

Rule: TypeAlias = Callable[[Array, Array, Array, Array], Array]


def elite_sampling(
  fitnesses: Float[Array, "N"],
  descriptors: Float[Array, "N D"],
  bins: Num[Array, "N D"],
  occupied: Bool[Array, "N"],
  *,
  low: float = 0.5,
  high: float = 0.8,
) -> Float[Array, "N"]:
  """The paper's elite sampling: good at everything is sampled more often.

  P_j is proportional to the product over all K scores of `low + norm(score_j) * (high - low)`, `norm` being min-max
  over the elites now in the archive. A score in which all elites are equal does not tell them apart.

  Args:
    fitnesses: `[N]` of the elites.
    descriptors: `[N, D]` of the elites.
    bins: not used.
    occupied: `[N]`, which cells have one.
    low: factor of the worst score.
    high: factor of the best score.

  Reference: Kuroki et al. 2025, arXiv:2410.14735, section 3 (low 0.5, high 0.8).
  """
  del bins
  scores = jnp.concatenate([fitnesses[:, None], descriptors], axis=1)
  return _normalized_product(low + (high - low) * _min_max(scores, occupied), occupied)


def reference_elite_sampling(
  fitnesses: Float[Array, "N"],
  descriptors: Float[Array, "N D"],
  bins: Num[Array, "N D"],
  occupied: Bool[Array, "N"],
) -> Float[Array, "N"]:
  """Elite sampling as in the public reference code: factors `0.5 + 0.8 norm`, descriptors taken as cell indices.

  So a factor runs from 0.5 to 1.3; it is 1 for a column in which all elites are equal.

  Reference: github SakanaAI/CycleQD, beside arXiv:2410.14735.
  """
  del descriptors
  columns = jnp.concatenate([fitnesses[:, None], bins.astype(jnp.float32)], axis=1)
  return _normalized_product(0.5 + 0.8 * _min_max(columns, occupied), occupied)


def uniform_sampling(
  fitnesses: Float[Array, "N"],
  descriptors: Float[Array, "N D"],
  bins: Num[Array, "N D"],
  occupied: Bool[Array, "N"],
) -> Float[Array, "N"]:
  """Every elite alike."""
  del fitnesses, descriptors, bins
  return occupied / jnp.maximum(occupied.sum(), 1).astype(jnp.float32)


def select_pairs(key: PRNGKey, probabilities: Float[Array, "N"], num_pairs: int) -> Int[Array, "P 2"]:
  """Draws pairs of cells; the two of a pair are drawn without replacement, pairs independently.

  The two differ whenever two cells have a probability above 0; with one, both are it. With none the result means
  nothing: refuse an empty archive beforehand. Costs one cumulative sum and a few binary searches a pair.
  """
  first_key, second_key = jax.random.split(key)
  cumulative = _cumulative(probabilities)
  total = cumulative[-1]
  first = _draw(cumulative, total * jax.random.uniform(first_key, (num_pairs,)))
  weight = probabilities[first]
  before = cumulative[first] - weight
  points = jnp.maximum(total - weight, 0) * jax.random.uniform(second_key, (num_pairs,))
  second = _draw(cumulative, jnp.where(points < before, points, points + weight))
  # Rounding of the sums can let the second fall on the first again: then the likeliest other cell, if there is one.
  likeliest = jnp.argmax(probabilities)
  runner_up = jnp.argmax(probabilities.at[likeliest].set(0))
  other = jnp.where(first == likeliest, runner_up, likeliest)
  other = jnp.where(probabilities[other] > 0, other, first)
  return jnp.stack([first, jnp.where(second == first, other, second)], axis=-1).astype(jnp.int32)


class RuleSelector(Selector[MapElitesRepertoire]):
  """A rule as a QDax selector over one MAP-Elites archive; draws with replacement.

  Args:
    rule: a rule that does not need `bins`, as `elite_sampling`; they are the descriptors here.
  """

  def __init__(self, rule: Rule = elite_sampling):
    self.rule = rule

  def select(self, repertoire: MapElitesRepertoire, key: PRNGKey, num_samples: int) -> MapElitesRepertoire:
    """Draws `num_samples` individuals; leaves `[num_samples, ...]`."""
    fitnesses, descriptors = repertoire.fitnesses[:, 0], repertoire.descriptors
    probabilities = self.rule(fitnesses, descriptors, descriptors, fitnesses != -jnp.inf)
    cumulative = _cumulative(probabilities)
    chosen = _draw(cumulative, cumulative[-1] * jax.random.uniform(key, (num_samples,)))
    selected: MapElitesRepertoire = jax.tree.map(lambda leaf: leaf[chosen], repertoire)
    return selected


def _cumulative(probabilities: Float[Array, "N"]) -> Float[Array, "N"]:
  """The running sum, in which a cell without probability has no share."""
  # A parallel sum is not monotone in its last bit: as it is, one draw in 100,000 over 50,625 cells took an empty one.
  return jax.lax.cummax(jnp.where(probabilities > 0, jnp.cumsum(probabilities), 0))


def _draw(cumulative: Float[Array, "N"], points: Float[Array, "P"]) -> Int[Array, "P"]:
  """The cells in whose shares of the running sum the points lie."""
  last = jnp.searchsorted(cumulative, cumulative[-1], side="left")  # the last cell that has a probability
  return jnp.minimum(jnp.searchsorted(cumulative, points, side="right"), last)


def _min_max(columns: Float[Array, "N K"], occupied: Bool[Array, "N"]) -> Float[Array, "N K"]:
  """Columns scaled to [0, 1] over the occupied rows; a column without spread becomes 5/8.

  (5/8 makes the reference's factor 1; any constant serves the paper's rule, where it cancels.)
  """
  mask = occupied[:, None]
  low = jnp.where(mask, columns, jnp.inf).min(axis=0, keepdims=True)
  spread = jnp.where(mask, columns, -jnp.inf).max(axis=0, keepdims=True) - low
  return jnp.where(spread > 0, (columns - low) / jnp.where(spread > 0, spread, 1), 0.625)


def _normalized_product(factors: Float[Array, "N K"], occupied: Bool[Array, "N"]) -> Float[Array, "N"]:
  product = jnp.where(occupied, factors.prod(axis=-1), 0)
  return product / jnp.maximum(product.sum(), jnp.finfo(jnp.float32).tiny)
