"""Adapters: our operators in QDax's emitters, and QDax's emitters on our repertoire.

The third way needs none: `CycleQDEmitter` is a QDax emitter and works inside `MultiEmitter` and `MAPElites`.
"""

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float
from qdax.core.emitters.cma_emitter import CMAEmitter
from qdax.core.emitters.cma_pool_emitter import CMAPoolEmitter
from qdax.core.emitters.emitter import Emitter, EmitterState
from qdax.core.emitters.multi_emitter import MultiEmitter
from qdax.core.emitters.omg_mega_emitter import OMGMEGAEmitter

from cqd_jax.archive.repertoire import EMPTY, CyclingRepertoire
from cqd_jax.checks import check_population
from cqd_jax.operators import Child
from cqd_jax.search.emitters import Crossover, Mutation, split_scores
from cqd_jax.types import ArrayField, ExtraScores, Genotype, PRNGKey


def as_mutation_fn(mutation: Mutation) -> Callable[[Genotype, PRNGKey], Genotype]:
  """An operator `mutation(key, individual)` as the `mutation_fn(population, key)` of QDax's emitters."""

  def mutation_fn(population: Genotype, key: PRNGKey) -> Genotype:
    keys = jax.random.split(key, check_population(population, "population"))
    return jax.vmap(mutation)(keys, population)

  return mutation_fn


def as_variation_fn(crossover: Crossover) -> Callable[[Genotype, Genotype, PRNGKey], Genotype]:
  """An operator `crossover(key, first, second)` as the `variation_fn` of QDax's emitters, batched.

  Of a `Child` the genotype is taken; QDax's emitters have no place for the note.
  """

  def variation_fn(first: Genotype, second: Genotype, key: PRNGKey) -> Genotype:
    keys = jax.random.split(key, check_population(first, "first"))
    children = jax.vmap(crossover)(keys, first, second)
    return children.genotype if isinstance(children, Child) else children

  return variation_fn


class PerArchiveState(EmitterState):
  """State of `PerArchiveEmitter`: int32 `iteration`, and the states of the K emitters on a leading axis."""

  iteration: ArrayField
  states: ArrayField


class PerArchiveEmitter(Emitter):
  """Drives the K archives by an emitter that was written for one: K copies of it, each on its own archive, in turn.

  So QDax's emitters, those that keep a state about their archive (CMA-ME) included, run inside `CycleQD`. Copy t mod K
  emits at iteration t and learns from what it emitted, given as the fitnesses and descriptors of its archive.

  A child that failed (a score that is not finite) ranks last with all of them: the emitter is told of a fitness below
  all others in a cell that has an elite, and of another child's extra scores in place of its own. From a batch that
  failed whole nothing is learned, and the next archive has its turn.

  Args:
    emitter: any QDax emitter over one MAP-Elites archive. All archives must have the same number of cells if it looks
      at them cell by cell.
    flip_interval: iterations after which the next archive has its turn.

  Raises:
    ValueError: if `flip_interval` is below 1.
  """

  def __init__(self, emitter: Emitter, *, flip_interval: int = 1):
    if flip_interval < 1:
      raise ValueError(f"flip_interval: expected at least 1, got {flip_interval}")
    self._emitter = _ranking_failures_last(emitter)
    self._flip_interval = flip_interval

  @property
  def batch_size(self) -> int:
    """Of the emitter inside."""
    return int(self._emitter.batch_size)

  def init(
    self,
    key: PRNGKey,
    repertoire: CyclingRepertoire,
    genotypes: Genotype,
    fitnesses: Array,
    descriptors: Array,
    extra_scores: ExtraScores,
  ) -> PerArchiveState:
    """The K states before the first batch."""
    del descriptors

    def init_one(archive: int, subkey: PRNGKey) -> EmitterState | None:
      own, others = split_scores(fitnesses, archive)
      return self._emitter.init(subkey, repertoire.archive(archive), genotypes, own, others, extra_scores)

    keys = jax.random.split(key, repertoire.num_tasks)
    states = [init_one(archive, keys[archive]) for archive in range(repertoire.num_tasks)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(list(map(jnp.asarray, leaves))), *states)
    return PerArchiveState(iteration=jnp.int32(0), states=stacked)

  def emit(
    self, repertoire: CyclingRepertoire | None, emitter_state: PerArchiveState | None, key: PRNGKey
  ) -> tuple[Genotype, ExtraScores]:
    """What the emitter of the active archive emits."""
    assert repertoire is not None
    assert emitter_state is not None
    active = self._active(emitter_state, repertoire)
    state = jax.tree.map(lambda leaf: leaf[active], emitter_state.states)
    genotypes, extra_info = self._emitter.emit(repertoire.archive(active), state, key)
    return genotypes, {**extra_info, "archive": jnp.full(self.batch_size, active)}

  def state_update(
    self,
    emitter_state: PerArchiveState | None,
    repertoire: CyclingRepertoire | None = None,
    genotypes: Genotype | None = None,
    fitnesses: Array | None = None,
    descriptors: Array | None = None,
    extra_scores: ExtraScores | None = None,
  ) -> PerArchiveState:
    """Updates the state of the emitter whose turn it was; of all, where an emitter learns from others' children."""
    assert emitter_state is not None
    assert repertoire is not None
    assert fitnesses is not None
    failed = ~jnp.isfinite(fitnesses).all(axis=1)
    extra_scores = {**_copied_over(failed, extra_scores or {}), FAILED: failed}
    states = emitter_state.states
    for archive in self._learners(emitter_state, repertoire):
      own, others = _without_failures(repertoire, archive, fitnesses, failed)
      before = jax.tree.map(lambda leaf, i=archive: leaf[i], states)
      learned = self._emitter.state_update(before, repertoire.archive(archive), genotypes, own, others, extra_scores)
      state = jax.tree.map(lambda old, new: jnp.where(failed.all(), old, new), before, learned)
      states = jax.tree.map(lambda all_states, new, i=archive: all_states.at[i].set(new), states, state)
    updated: PerArchiveState = emitter_state.replace(iteration=emitter_state.iteration + 1, states=states)
    return updated

  def _learners(self, emitter_state: PerArchiveState, repertoire: CyclingRepertoire) -> Iterable[Array | int]:
    # OMG-MEGA keeps the gradients of all elites of its archive, whoever emitted them.
    if self._emitter.use_all_data or isinstance(self._emitter, OMGMEGAEmitter):
      return range(repertoire.num_tasks)
    return (self._active(emitter_state, repertoire),)

  def _active(self, emitter_state: PerArchiveState, repertoire: CyclingRepertoire) -> Array:
    return (emitter_state.iteration // self._flip_interval) % repertoire.num_tasks


FAILED = "failed"
"""The extra score that tells the ranking of a CMA emitter which children failed."""


def _without_failures(
  repertoire: CyclingRepertoire, archive: Array | int, scores: Float[Array, "P K"], failed: Bool[Array, "P"]
) -> tuple[Float[Array, "P"], Float[Array, "P K-1"]]:
  """Fitnesses and descriptors of one archive; of failed children a fitness below all and the oldest elite's cell.

  In that cell a child is no discovery, and its improvement over the elite is below that of every other child.
  """
  fitnesses, descriptors = split_scores(scores, archive)
  slots = repertoire.slots[archive]
  occupied = slots != EMPTY
  elites, elsewhere = split_scores(repertoire.scores[slots], archive)
  known = jnp.concatenate([jnp.where(failed, jnp.nan, fitnesses), jnp.where(occupied, elites, jnp.nan)])
  low, high = jnp.nanmin(known), jnp.nanmax(known)
  born = jnp.where(occupied, repertoire.lineage.born[slots], jnp.iinfo(jnp.int32).max)
  oldest = jnp.argmin(born)
  return (
    jnp.where(failed, low - (high - low) - 1.0, fitnesses),
    jnp.where(failed[:, None], elsewhere[oldest][None], descriptors),
  )


def _copied_over(failed: Bool[Array, "P"], extra_scores: ExtraScores) -> dict[str, Any]:
  """Extra scores in which a failed child has those of the first that did not fail."""
  size = failed.shape[0]
  rows = jnp.where(failed, jnp.argmin(failed), jnp.arange(size))

  def copied(leaf: Any) -> Any:
    has_rows = getattr(leaf, "ndim", 0) > 0 and leaf.shape[0] == size
    return jnp.asarray(leaf)[rows] if has_rows else leaf

  return {name: jax.tree.map(copied, value) for name, value in extra_scores.items()}


def _ranking_failures_last(emitter: Emitter) -> Emitter:
  """The emitter; CMA emitters, also those inside pools and `MultiEmitter`, with a ranking that knows who failed.

  That of random directions looks at descriptors alone, so no fitness could put a child last.
  """
  if not isinstance(emitter, CMAEmitter | CMAPoolEmitter | MultiEmitter):
    return emitter
  own = copy.copy(emitter)
  if isinstance(own, MultiEmitter):
    own.emitters = tuple(_ranking_failures_last(each) for each in own.emitters)
    return own
  if isinstance(own, CMAPoolEmitter):
    own._emitter = _ranking_failures_last(own._emitter)
    return own
  rank = emitter._ranking_criteria

  def ranking_criteria(*, extra_scores: Mapping[str, Any] | None = None, **given: Any) -> Array:
    criteria = rank(extra_scores=extra_scores, **given)
    failed = (extra_scores or {}).get(FAILED)
    if failed is None:
      return criteria
    lowest = jnp.where(failed, jnp.inf, criteria).min()
    return jnp.where(failed, lowest - jnp.maximum(1.0, jnp.abs(lowest)), criteria)

  own._ranking_criteria = ranking_criteria
  return own
