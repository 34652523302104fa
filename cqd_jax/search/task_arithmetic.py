"""Task arithmetic with a tuned scale: the experts' sum, scaled by each of a few numbers (Ilharco et al. 2023)."""

from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from cqd_jax.genotypes.space import Space, population_size
from cqd_jax.operators import task_arithmetic
from cqd_jax.search.algorithm import Info, Population
from cqd_jax.tasks.problem import Scored, task_scores
from cqd_jax.types import ArrayField, Genotype, Metrics, PRNGKey


class ScaleState(flax.struct.PyTreeNode):
  """What the search over S scales goes on from.

  Attributes:
    values: float32 `[S, K, B]`; NaN where none was scored yet.
    scores: float32 `[S, K]`.
    count: int32, how many were tried.
    first: int32, the identity of the first.
  """

  values: ArrayField
  scores: ArrayField
  count: ArrayField
  first: ArrayField


class TunedScale:
  """Tries each scale, one after the other; it offers only the best.

  Args:
    scales: what to try.
    space: in which the experts are added.

  Raises:
    ValueError: if there is no scale.
  """

  batch_size = 1
  variation = "the experts' sum, scaled"

  def __init__(self, scales: Sequence[float], *, space: Space):
    if not scales:
      raise ValueError("scales: expected at least one")
    self.space = space
    self.budget = len(scales)
    self._scales = tuple(scales)

  def init(self, key: PRNGKey, initial: Genotype, scored: Scored) -> ScaleState:
    """See `Algorithm`."""
    del key
    _, num_tasks, num_samples = scored.values.shape
    return ScaleState(
      values=jnp.full((self.budget, num_tasks, num_samples), jnp.nan, jnp.float32),
      scores=jnp.full((self.budget, num_tasks), jnp.nan, jnp.float32),
      count=jnp.int32(0),
      first=jnp.int32(population_size(initial)),
    )

  def ask(self, state: ScaleState, key: PRNGKey) -> tuple[Genotype, Info]:
    """See `Algorithm`."""
    del key
    scale = jnp.asarray(self._scales, jnp.float32)[state.count]
    merged = task_arithmetic(self.space.experts, scale)
    return jax.tree.map(lambda leaf: leaf[None], merged), Info(note={"scale": scale[None]})

  def tell(self, state: ScaleState, genotypes: Genotype, scored: Scored, info: Info) -> tuple[ScaleState, Metrics]:
    """See `Algorithm`."""
    del genotypes, info
    scored = scored.with_scores()
    scores = state.scores.at[state.count].set(scored.scores[0].astype(jnp.float32))
    means = scores.mean(axis=-1)
    state = state.replace(
      values=state.values.at[state.count].set(scored.values[0]), scores=scores, count=state.count + 1
    )
    return state, {"best_mean": jnp.where(jnp.isfinite(means), means, -jnp.inf).max()}

  def population(self, state: ScaleState) -> Population:
    """The best of the sums, the first of equals."""
    means = task_scores(np.asarray(state.values)[: int(state.count)]).mean(axis=-1)
    best = int(np.where(np.isnan(means), -np.inf, means).argmax())
    merged = task_arithmetic(self.space.experts, self._scales[best])
    return Population(
      genotypes=jax.tree.map(lambda leaf: leaf[None], merged),
      values=np.asarray(state.values)[best : best + 1],
      identities=int(state.first) + np.array([best]),
      scores=np.asarray(state.scores)[best : best + 1],
      chosen={"scale": self._scales[best]},
    )
