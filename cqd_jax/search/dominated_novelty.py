"""Dominated Novelty Search on skill vectors: who is worse than another has to be unlike it (arXiv:2502.00593)."""

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from cqd_jax.archive.selectors import select_pairs
from cqd_jax.genotypes.space import Space, population_size, take
from cqd_jax.operators.crossover import Child
from cqd_jax.search.algorithm import Info, Population
from cqd_jax.search.members import NOBODY, Members, chosen, first_members, joined, members_of, where
from cqd_jax.search.variation import Variation
from cqd_jax.tasks.problem import Scored
from cqd_jax.types import ArrayField, Genotype, Metrics, PRNGKey


class NoveltyState(flax.struct.PyTreeNode):
  """N individuals.

  Attributes:
    members: the archive, in the order in which they came.
    task_context: what the mutation gets of a task, leaves `[K, ...]`, or None.
    iteration: int32, batches told so far from which something was learned.
    asked: int32, the identity of the next child.
  """

  members: Members
  task_context: Genotype | None
  iteration: ArrayField
  asked: ArrayField


class DominatedNovelty:
  """An archive of N models without cells; it offers all of them.

  An individual is described by its values on all samples of all tasks. Parents are drawn uniformly, the two of a child
  without replacement. Of the archive and a batch of children the N of highest `dominated_novelty` stay; who failed is
  never among them, and from a batch that failed whole nothing is learned.

  Args:
    variation: crossover and mutation. A mutation with an entry per task gets that of a random task for each child.
    space: of the genotypes.
    batch_size: children per iteration.
    size: N, at least as many as begin.
    neighbors: how many fitter individuals count, the nearest.
    rotating: whether fitness is the score of one task after another, one per iteration, instead of their mean.

  Raises:
    ValueError: naming the setting that is out of range.

  Reference: Bahlous-Boldi et al. 2025, arXiv:2502.00593. On models that are merged, with a Boolean skill for each
  sample: AC/DC, github.com/SakanaAI/AC-DC, which has 3 neighbors; there the distance to a fitter one may also be the
  share of skills that the other lacks, weighted by how rare they are.
  """

  def __init__(
    self, variation: Variation, *, space: Space, batch_size: int, size: int, neighbors: int, rotating: bool = False
  ):
    if batch_size < 1:
      raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
    if neighbors < 1:
      raise ValueError(f"neighbors: expected at least 1, got {neighbors}")
    initial = population_size(space.initial)
    if size < initial:
      raise ValueError(f"population_size: expected a place for each of {initial} initial individuals, got {size}")
    self.batch_size = batch_size
    self.space = space
    self.variation = variation.words
    self._variation = variation
    self._size = size
    self._neighbors = neighbors
    self._rotating = rotating

  def init(self, key: PRNGKey, initial: Genotype, scored: Scored) -> NoveltyState:
    """See `Algorithm`.

    Raises:
      ValueError: if no individual got finite scores on all tasks.
    """
    del key
    return NoveltyState(
      members=first_members(initial, scored, self._size),
      task_context=jax.tree.map(jnp.copy, self._variation.task_context),
      iteration=jnp.int32(0),
      asked=jnp.int32(population_size(initial)),
    )

  def ask(self, state: NoveltyState, key: PRNGKey) -> tuple[Genotype, Info]:
    """See `Algorithm`; the note is that of the crossover."""
    pair_key, cross_key, mutation_key, task_key = jax.random.split(key, 4)
    members, size = state.members, self.batch_size
    there = (members.identities != NOBODY).astype(jnp.float32)
    pairs = select_pairs(pair_key, there / there.sum(), size)
    first, second = (take(members.genotypes, pairs[:, each]) for each in (0, 1))
    children = jax.vmap(self._variation.crossover)(jax.random.split(cross_key, size), first, second)
    children, note = children if isinstance(children, Child) else (children, {})
    if self._variation.mutation is not None:
      keys = jax.random.split(mutation_key, size)
      tasks = jax.random.randint(task_key, (size,), 0, members.scores.shape[1])
      contexts = () if state.task_context is None else (take(state.task_context, tasks),)
      children = jax.vmap(self._variation.mutation)(keys, children, *contexts)
    return children, Info(parents=members.identities[pairs], note=note)

  def tell(self, state: NoveltyState, genotypes: Genotype, scored: Scored, info: Info) -> tuple[NoveltyState, Metrics]:
    """See `Algorithm`; the figures are the best mean and the number of members."""
    del info
    batch = members_of(genotypes, scored, state.asked)
    everyone = joined(state.members, batch)
    novelty = dominated_novelty(self._fitnesses(everyone, state.iteration), _skills(everyone), self._neighbors)
    # In the order in which they came, so that of equals whoever was there before stays ahead.
    kept = jnp.sort(jnp.argsort(-novelty)[: self._size])
    learned = state.replace(members=chosen(everyone, kept), iteration=state.iteration + 1)
    succeeded = (batch.identities != NOBODY).any()
    state = where(succeeded, learned, state).replace(asked=state.asked + self.batch_size)
    there = state.members.identities != NOBODY
    return state, {"best_mean": state.members.fitnesses.max(), "num_elites": there.sum(dtype=jnp.int32)}

  def population(self, state: NoveltyState) -> Population:
    """The archive."""
    return state.members.population()

  def _fitnesses(self, members: Members, iteration: Array) -> Float[Array, "N"]:
    if not self._rotating:
      return members.fitnesses
    scores = jnp.take(members.scores, iteration % members.scores.shape[1], axis=1)
    return jnp.where(members.identities == NOBODY, -jnp.inf, scores)


def dominated_novelty(
  fitnesses: Float[Array, "N"], descriptors: Float[Array, "N D"], neighbors: int
) -> Float[Array, "N"]:
  """How unlike those that are fitter an individual is: the mean distance to the nearest of them.

  Args:
    fitnesses: -inf for an individual that does not count.
    descriptors: compared by Euclidean distance.
    neighbors: how many of the fitter count; all, where there are fewer.

  Returns:
    inf for the one than which none is fitter, -inf for those that do not count. Of equal fitness the one that comes
    first is the fitter, so that a copy has novelty 0 and the original keeps its own.

  Reference: Bahlous-Boldi et al. 2025, arXiv:2502.00593, in which equals do not dominate each other: there all copies
  of the best have novelty inf.
  """
  size = fitnesses.shape[0]
  there = fitnesses > -jnp.inf
  one, other = fitnesses[:, None], fitnesses[None]
  earlier = jnp.arange(size)[None] < jnp.arange(size)[:, None]
  fitter = ((other > one) | ((other == one) & earlier)) & there[None]
  distances = jnp.sqrt(jnp.square(descriptors[:, None] - descriptors[None]).sum(axis=-1))
  nearest = jnp.sort(jnp.where(fitter, distances, jnp.inf), axis=1)[:, :neighbors]
  count = jnp.minimum(fitter.sum(axis=1), neighbors)
  total = jnp.where(jnp.isfinite(nearest), nearest, 0.0).sum(axis=1)
  novelty = jnp.where(count > 0, total / jnp.maximum(count, 1), jnp.inf)
  return jnp.where(there, novelty, -jnp.inf)


def _skills(members: Members) -> Float[Array, "N D"]:
  """The values on all samples in a row. Padding, NaN in all of a problem, tells nobody from another."""
  values = members.values.reshape(members.size, -1)
  return jnp.where(jnp.isnan(values), 0.0, values)
