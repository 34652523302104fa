"""Searches without archives, as baselines, by ask and tell on plain vectors: random search, CMA-ES by QDax, NSGA-II.

NSGA-II is written out here, since that of QDax 0.5 is another algorithm. Its `NSGA2Repertoire.add` may keep dominated
individuals in place of members of the front that is cut, and empty places in place of individuals: distances outside
that front become `inf * 0`, which is NaN, and sort as the largest. A row with a NaN is never dominated there. Its
`polynomial_mutation` has the distances to the two bounds the wrong way round, so a variable on a bound stays on it
for good; its crossover only copies variables from one parent to the other; its `MixingEmitter` does either to a child,
not both, and takes parents regardless of their rank.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax.struct import PyTreeNode
from jaxtyping import Array, Float, Int
from qdax.baselines.cmaes import CMAES

from cqd_jax.types import ArrayField, PRNGKey

CROSSOVER_RATE = 0.9
"""NSGA-II: probability that a child has two parents (Deb et al. 2002, section IV)."""

DISTRIBUTION_INDEX = 20.0
"""NSGA-II: eta of crossover and mutation; children stay the closer to their parents, the larger it is (ibid.)."""


class NSGA2State(PyTreeNode):
  """The population of `nsga2`, best first; N places.

  Attributes:
    candidates: float32 `[N, D]`.
    scores: float32 `[N, K]`; -inf where a place is empty.
    ranks: int32 `[N]`, the front that each was in when it was last selected, from 0; larger than any for empty places.
    crowding: float32 `[N]`, the crowding distance within that front.
  """

  candidates: ArrayField
  scores: ArrayField
  ranks: ArrayField
  crowding: ArrayField


SearchState: TypeAlias = Any
"""A pytree: `CMAESState` of QDax, `NSGA2State`, what is wrapped around them, or None."""


class VectorSearch(NamedTuple):
  """A search over vectors of length D that maximizes K task scores, their mean or each as an objective of its own.

  Both functions are pure, and the state is a pytree: with the same keys and scores a search gives the same candidates.

  Attributes:
    state: before the first batch.
    ask: (state, key) -> candidates `[P, D]` float32.
    tell: (state, candidates `[P, D]`, scores `[P, K]`) -> state. A candidate with a score that is not finite ranks
      last, and never enters a population; a batch without a finite one changes nothing.
  """

  state: SearchState
  ask: Callable[[SearchState, PRNGKey], Array]
  tell: Callable[[SearchState, Array, Array], SearchState]


def random_search(dimension: int, *, batch_size: int, low: float, high: float) -> VectorSearch:
  """Draws every candidate from the uniform distribution on the box `[low, high]^D`.

  Raises:
    ValueError: if the box or the batch is empty.
  """
  _check_sizes(dimension, batch_size)
  _check_box(low, high)

  def ask(state: SearchState, key: PRNGKey) -> Array:
    del state
    return jax.random.uniform(key, (batch_size, dimension), minval=low, maxval=high)

  return VectorSearch(None, jax.jit(ask), lambda state, candidates, scores: state)


def cma_es(mean: Float[Array, "D"] | Float[np.ndarray, "D"], *, batch_size: int, step_size: float) -> VectorSearch:
  """CMA-ES (Hansen 2016, arXiv:1604.00772) by QDax, from `mean` with the given initial step size.

  It maximizes the mean of the task scores. The better half of a batch updates the distribution.

  Raises:
    ValueError: if the batch has fewer than four candidates or the step size is not above 0.
  """
  _check_sizes(mean.shape[0], batch_size)
  if batch_size < 4:
    raise ValueError(
      f"batch_size: CMA-ES updates from the better half, two at least, so expected at least 4, got {batch_size}"
    )
  if not step_size > 0:
    raise ValueError(f"step_size: expected more than 0, got {step_size}")
  # QDax's code promotes ranks and builds constants eagerly; both are its own business.
  with jax.numpy_rank_promotion("allow"):
    algorithm = CMAES(
      population_size=batch_size,
      search_dim=mean.shape[0],
      fitness_function=None,  # only its `update` would ask it
      init_sigma=step_size,
      mean_init=jnp.asarray(mean, jnp.float32),
    )
    initial = jax.tree.map(jnp.asarray, algorithm.init())

  @jax.jit
  def ask(state: SearchState, key: PRNGKey) -> Array:
    with jax.numpy_rank_promotion("allow"):
      return algorithm.sample(state, key)

  @jax.jit
  def tell(state: SearchState, candidates: Array, scores: Array) -> SearchState:
    _check_scores(candidates, scores)
    fitnesses = scores.mean(axis=-1)
    finite = jnp.isfinite(fitnesses)
    ranked = jnp.argsort(jnp.where(finite, -fitnesses, jnp.inf))
    with jax.numpy_rank_promotion("allow"):
      learned = algorithm.update_state(state, candidates[ranked[: batch_size // 2]])
    return jax.tree.map(lambda old, new: jnp.where(finite.any(), new, old), state, learned)

  return VectorSearch(initial, ask, tell)


def nsga2(
  dimension: int, *, batch_size: int, num_tasks: int, population_size: int, low: float, high: float
) -> VectorSearch:
  """NSGA-II on the box `[low, high]^D`, each of the K task scores an objective.

  Candidates are uniform in the box until the population is full. From then on each is a child of two winners of
  tournaments between two, by rank and then crowding, by `sbx_crossover` and `polynomial_mutation`. Of the population
  and a batch the best by rank and then crowding survive; where both are equal, who was there before.
  Candidates that `tell` is given must lie in the box.

  Args:
    dimension: D.
    batch_size: P, candidates per batch; need not be the size of the population.
    num_tasks: K.
    population_size: N.
    low: lower bound of every variable.
    high: upper bound of every variable.

  Raises:
    ValueError: if a size is below 1, the population below 2, or the box empty; in `tell`, if the scores are not
      `[P, K]`.

  Reference: Deb et al. 2002, doi:10.1109/4235.996017. Deviations: batches may be smaller than the population; each pair
  has one child; contenders are drawn with replacement. Not by QDax 0.5, whose `NSGA2Repertoire` lets dominated
  individuals oust those that dominate them (in 17 of 200 random cases of 24 individuals with three objectives).
  """
  _check_sizes(dimension, batch_size)
  _check_box(low, high)
  if num_tasks < 1:
    raise ValueError(f"num_tasks: expected at least 1, got {num_tasks}")
  if population_size < 2:
    raise ValueError(f"population_size: expected at least 2, got {population_size}")
  initial = NSGA2State(
    candidates=jnp.full((population_size, dimension), low, jnp.float32),
    scores=jnp.full((population_size, num_tasks), -jnp.inf, jnp.float32),
    ranks=jnp.full(population_size, population_size + batch_size, jnp.int32),
    crowding=jnp.zeros(population_size, jnp.float32),
  )

  @jax.jit
  def ask(state: NSGA2State, key: PRNGKey) -> Array:
    uniform_key, parents_key, crossover_key, mutation_key = jax.random.split(key, 4)
    uniform = jax.random.uniform(uniform_key, (batch_size, dimension), minval=low, maxval=high)
    first, second = state.candidates[_win_tournaments(parents_key, state, (2, batch_size))]
    cross = jax.vmap(partial(sbx_crossover, low=low, high=high))
    mutate = jax.vmap(partial(polynomial_mutation, low=low, high=high))
    children = cross(jax.random.split(crossover_key, batch_size), first, second)
    children = mutate(jax.random.split(mutation_key, batch_size), children)
    return jnp.where(jnp.isfinite(state.scores).all(), children, uniform)

  @jax.jit
  def tell(state: NSGA2State, candidates: Array, scores: Array) -> NSGA2State:
    _check_scores(candidates, scores, num_tasks)
    finite = jnp.isfinite(scores).all(axis=-1, keepdims=True)
    everyone = jnp.concatenate([state.candidates, jnp.where(finite, candidates, low)])
    their_scores = jnp.concatenate([state.scores, jnp.where(finite, scores, -jnp.inf)])
    ranks = front_ranks(their_scores)
    crowding = crowding_distances(their_scores, ranks)
    kept = jnp.lexsort((-crowding, ranks))[:population_size]
    return NSGA2State(everyone[kept], their_scores[kept], ranks[kept], crowding[kept])

  return VectorSearch(initial, ask, tell)


def front_ranks(scores: Float[Array, "N K"]) -> Int[Array, "N"]:
  """Non-dominated sorting: the front of each individual, from 0; N for a row that is not finite.

  One dominates another if no score of it is lower and one is higher. Equal rows share a front.
  """
  size = scores.shape[0]
  finite = jnp.isfinite(scores).all(axis=-1)
  one, other = scores[:, None], scores[None]
  dominates = (one >= other).all(axis=-1) & (one > other).any(axis=-1) & finite[:, None]

  def peel(front: Array, ranks: Array) -> Array:
    left = (ranks == size) & finite
    dominated = (dominates & left[:, None]).any(axis=0)
    return jnp.where(left & ~dominated, front, ranks)

  # As many rounds as there can be fronts: an end that no score can prevent.
  return jax.lax.fori_loop(0, size, peel, jnp.full(size, size, jnp.int32))


def crowding_distances(scores: Float[Array, "N K"], ranks: Int[Array, "N"]) -> Float[Array, "N"]:
  """How far the neighbors in its own front are: summed over objectives, in units of the front's spread in each.

  The ends of a front have distance inf. An objective in which a front has no spread counts for nothing, its ends
  included. Of equal scores the one with the lower index comes first. Individuals of rank N (see `front_ranks`) have 0.
  """
  size = ranks.shape[0]
  scores = jnp.where(ranks[:, None] < size, scores, 0.0)

  def along(values: Array) -> Array:
    order = jnp.lexsort((values, ranks))
    ordered, fronts = values[order], ranks[order]
    cut = fronts[1:] != fronts[:-1]
    edge = jnp.ones(1, bool)
    at_end = jnp.concatenate([edge, cut]) | jnp.concatenate([cut, edge])
    spread = jax.ops.segment_max(values, ranks, size + 1)[fronts] - jax.ops.segment_min(values, ranks, size + 1)[fronts]
    spreads = spread > 0
    gap = (jnp.roll(ordered, -1) - jnp.roll(ordered, 1)) / jnp.where(spreads, spread, 1.0)
    return jnp.zeros_like(values).at[order].set(jnp.where(spreads, jnp.where(at_end, jnp.inf, gap), 0.0))

  return jax.vmap(along, in_axes=1)(scores).sum(axis=0)


def sbx_crossover(
  key: PRNGKey, first: Float[Array, "D"], second: Float[Array, "D"], *, low: float, high: float
) -> Float[Array, "D"]:
  """Simulated binary crossover, bounded: one child of two parents within `[low, high]^D`.

  With probability `CROSSOVER_RATE`, each variable with probability 1/2: one of the two values that lie symmetrically
  about the parents' mean, closer together or farther apart. Every other variable is the first parent's.

  Reference: Deb & Agrawal 1995, Complex Systems 9, 115-148, with bounds as in Deb's code of NSGA-II, which returns
  both children.
  """
  pair_key, variable_key, side_key, spread_key = jax.random.split(key, 4)
  smaller, larger = jnp.minimum(first, second), jnp.maximum(first, second)
  differ = smaller < larger
  gap = jnp.where(differ, larger - smaller, 1.0)
  above = jax.random.bernoulli(side_key, 0.5, first.shape)
  # The share of the distribution that lies within the bound is stretched to 1.
  room = jnp.where(above, high - larger, smaller - low)
  share = 2.0 - (1.0 + 2.0 * room / gap) ** -(DISTRIBUTION_INDEX + 1.0)
  drawn = jax.random.uniform(spread_key, first.shape) * share
  factor = jnp.where(drawn <= 1.0, drawn, 1.0 / (2.0 - drawn)) ** (1.0 / (DISTRIBUTION_INDEX + 1.0))
  value = 0.5 * (smaller + larger) + jnp.where(above, 0.5, -0.5) * factor * gap
  crossed = jax.random.bernoulli(variable_key, 0.5, first.shape) & jax.random.bernoulli(pair_key, CROSSOVER_RATE)
  return jnp.where(crossed & differ, jnp.clip(value, low, high), first)


def polynomial_mutation(key: PRNGKey, candidate: Float[Array, "D"], *, low: float, high: float) -> Float[Array, "D"]:
  """Polynomial mutation, bounded: moves each variable with probability 1/D, within `[low, high]`.

  Reference: Deb & Goyal 1996, Computer Science and Informatics 26(4), 30-45, with bounds as in Deb's code of NSGA-II.
  """
  variable_key, step_key = jax.random.split(key)
  drawn = jax.random.uniform(step_key, candidate.shape)
  power = DISTRIBUTION_INDEX + 1.0
  # Rounding must not take the base of a root below 0.
  to_low = jnp.clip((candidate - low) / (high - low), 0.0, 1.0)
  to_high = jnp.clip((high - candidate) / (high - low), 0.0, 1.0)
  down = (2.0 * drawn + (1.0 - 2.0 * drawn) * (1.0 - to_low) ** power) ** (1.0 / power) - 1.0
  up = 1.0 - (2.0 * (1.0 - drawn) + (2.0 * drawn - 1.0) * (1.0 - to_high) ** power) ** (1.0 / power)
  moved = candidate + jnp.where(drawn < 0.5, down, up) * (high - low)
  chosen = jax.random.bernoulli(variable_key, 1.0 / candidate.shape[0], candidate.shape)
  return jnp.where(chosen, jnp.clip(moved, low, high), candidate)


def _win_tournaments(key: PRNGKey, state: NSGA2State, shape: tuple[int, ...]) -> Array:
  """Indices of the winners of tournaments between two, by rank and then crowding; a tie is won by the first drawn."""
  first, second = jax.random.randint(key, (2, *shape), 0, state.ranks.shape[0])
  lower, equal = state.ranks[second] < state.ranks[first], state.ranks[second] == state.ranks[first]
  return jnp.where(lower | (equal & (state.crowding[second] > state.crowding[first])), second, first)


def _check_sizes(dimension: int, batch_size: int) -> None:
  if dimension < 1 or batch_size < 1:
    raise ValueError(f"dimension, batch_size: expected at least 1, got {dimension}, {batch_size}")


def _check_box(low: float, high: float) -> None:
  if not low < high:
    raise ValueError(f"low, high: expected low < high, got {low}, {high}")


def _check_scores(candidates: Array, scores: Array, num_tasks: int | None = None) -> None:
  tasks = "K" if num_tasks is None else num_tasks
  if scores.ndim != 2 or scores.shape[0] != candidates.shape[0] or num_tasks not in (None, scores.shape[1]):
    raise ValueError(f"scores: expected [{candidates.shape[0]}, {tasks}], got {list(scores.shape)}")
