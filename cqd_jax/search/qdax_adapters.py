"""Adapters: our operators in QDax's emitters, and QDax's emitters on our repertoire.

The third way needs none: `CycleQDEmitter` is a QDax emitter and works inside `MultiEmitter` and `MAPElites`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array
from qdax.core.emitters.emitter import Emitter, EmitterState

from cqd_jax.archive.repertoire import CyclingRepertoire
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
    self._emitter = emitter
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
    """Updates the state of the emitter whose turn it was."""
    assert emitter_state is not None
    assert repertoire is not None
    assert fitnesses is not None
    active = self._active(emitter_state, repertoire)
    own, others = split_scores(fitnesses, active)
    state = jax.tree.map(lambda leaf: leaf[active], emitter_state.states)
    state = self._emitter.state_update(state, repertoire.archive(active), genotypes, own, others, extra_scores)
    states = jax.tree.map(lambda all_states, new: all_states.at[active].set(new), emitter_state.states, state)
    updated: PerArchiveState = emitter_state.replace(iteration=emitter_state.iteration + 1, states=states)
    return updated

  def _active(self, emitter_state: PerArchiveState, repertoire: CyclingRepertoire) -> Array:
    return (emitter_state.iteration // self._flip_interval) % repertoire.num_tasks
