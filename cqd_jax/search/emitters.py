"""The emitter of CycleQD: parents from the active archive, crossover, mutation. A QDax `Emitter`.

Inside `CycleQD` an emitter is given the `CyclingRepertoire`, and the `[P, K]` scores as both fitnesses and descriptors.
Inside QDax's own loops it is given one ordinary archive, an archive of Pareto fronts (MOME), or a population.
`CycleQDEmitter` works on all of these.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from qdax.core.containers.ga_repertoire import GARepertoire
from qdax.core.emitters.emitter import Emitter, EmitterState

from cqd_jax.archive.cells import Grid, grid_coordinates, other_tasks
from cqd_jax.archive.repertoire import EMPTY, CyclingRepertoire
from cqd_jax.archive.selectors import Rule, elite_sampling, select_pairs
from cqd_jax.checks import check_population
from cqd_jax.operators.crossover import Child
from cqd_jax.search.schedules import SCHEDULES, Schedule, num_distinct
from cqd_jax.types import ArrayField, ExtraScores, Genotype, PRNGKey

Crossover: TypeAlias = Callable[[PRNGKey, Genotype, Genotype], Any]
Mutation: TypeAlias = Callable[..., Genotype]


class CycleQDState(EmitterState):
  """State of `CycleQDEmitter`.

  Attributes:
    iteration: int32, batches emitted so far.
    task_context: what the mutation gets of the active task; leaves `[K, ...]`, or None.
  """

  iteration: ArrayField
  task_context: Genotype | None = None


class CycleQDEmitter(Emitter):
  """Emits children of pairs of elites: `mutation(key, crossover(key, first, second))`.

  Args:
    batch_size: P, children per iteration.
    crossover: operator on two individuals, as `partial(linear_crossover, std=0.01)`. It returns a `Child`, or only the
      child's genotype.
    mutation: operator on one individual, as `partial(svd_mutation, max_scale=2)`; None for none. With `task_context`
      it gets a third argument: the entry of the active task, as the factors of `expert_svd_mutation`.
    task_context: leaves `[K, ...]`, one entry per task.
    rule: which elites become parents; see `cqd_jax.archive.selectors`.
    schedule: where parents come from at iteration t (counted in units of `flip_interval`). "cycle": all from archive
      t mod K, the paper. "round_robin": those of child p from archive (t + p) mod K, what the asynchronous workers of
      the reference code amount to. "fixed": all from archive 0, the paper's ablation without cycling. Or a function as
      in `cqd_jax.search.schedules`.
    flip_interval: iterations after which the schedule moves on.
    crossover_has_aux: whether `crossover` returns a pair of the child and something to report of it, as
      `partial(linear_merge, std=0.01, with_weights=True)` does. A `Child` needs no such word.

  Raises:
    ValueError: naming the argument that is out of range.

  Reference: Kuroki et al. 2025, arXiv:2410.14735.
  """

  def __init__(
    self,
    *,
    batch_size: int,
    crossover: Crossover,
    mutation: Mutation | None = None,
    task_context: Genotype | None = None,
    rule: Rule = elite_sampling,
    schedule: str | Schedule = "cycle",
    flip_interval: int = 1,
    crossover_has_aux: bool = False,
  ):
    if batch_size < 1:
      raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
    if flip_interval < 1:
      raise ValueError(f"flip_interval: expected at least 1, got {flip_interval}")
    if not callable(schedule) and schedule not in SCHEDULES:
      raise ValueError(f"schedule: expected 'cycle', 'round_robin' or 'fixed', got {schedule!r}")
    if task_context is not None and mutation is None:
      raise ValueError("task_context: given, but there is no mutation that could use it")
    self._batch_size = batch_size
    self._crossover = crossover
    self._mutation = mutation
    self._task_context = task_context
    self._rule = rule
    self._schedule = schedule if callable(schedule) else SCHEDULES[schedule]
    self._flip_interval = flip_interval
    self._crossover_has_aux = crossover_has_aux

  @property
  def batch_size(self) -> int:
    """P."""
    return self._batch_size

  def init(
    self,
    key: PRNGKey,
    repertoire: CyclingRepertoire | GARepertoire,
    genotypes: Genotype,
    fitnesses: Array,
    descriptors: Array,
    extra_scores: ExtraScores,
  ) -> CycleQDState:
    """The state before the first batch. Raises ValueError if `task_context` has no entry for each archive."""
    del key, genotypes, fitnesses, descriptors, extra_scores
    if self._task_context is not None:
      if not isinstance(repertoire, CyclingRepertoire):
        raise ValueError("task_context: needs a CyclingRepertoire; an ordinary archive does not know its task")
      check_population(self._task_context, "task_context", repertoire.num_tasks)
    # A copy: the state may be donated, and this emitter must be able to start another run.
    return CycleQDState(iteration=jnp.int32(0), task_context=jax.tree.map(jnp.copy, self._task_context))

  def emit(
    self,
    repertoire: CyclingRepertoire | GARepertoire | None,
    emitter_state: CycleQDState | None,
    key: PRNGKey,
  ) -> tuple[Genotype, ExtraScores]:
    """Makes P children.

    Returns:
      The genotypes, leaves `[P, ...]`, and `{"parents": [P, 2], "archive": [P]}`: the identities of the parents (-1
      where the repertoire keeps none) and the archive they come from. Where the crossover returns a `Child` also
      "note": its note, and with `crossover_has_aux` "crossover": what it reports; leaves `[P, ...]` of both.
    """
    assert repertoire is not None
    assert emitter_state is not None
    pair_key, crossover_key, mutation_key = jax.random.split(key, 3)
    if isinstance(repertoire, CyclingRepertoire):
      archives = self._active_archives(emitter_state.iteration, repertoire.num_tasks)
      genotypes, slots = repertoire.genotypes, self._select_in_archives(repertoire, archives, pair_key)
      identities = repertoire.lineage.identity[slots]
    else:
      archives = jnp.zeros(self._batch_size, jnp.int32)
      genotypes, slots = self._select_among_members(repertoire, pair_key)
      identities = jnp.full(slots.shape, EMPTY, jnp.int32)

    first, second = (jax.tree.map(lambda leaf, i=i: leaf[slots[:, i]], genotypes) for i in (0, 1))
    children = jax.vmap(self._crossover)(jax.random.split(crossover_key, self._batch_size), first, second)
    extra_info: ExtraScores = {"parents": identities, "archive": archives}
    if self._crossover_has_aux:
      children, extra_info["crossover"] = children
    elif isinstance(children, Child):
      children, extra_info["note"] = children
    if self._mutation is not None:
      keys = jax.random.split(mutation_key, self._batch_size)
      children = self._mutate(keys, children, emitter_state.task_context, archives)
    return children, extra_info

  def state_update(
    self,
    emitter_state: CycleQDState | None,
    repertoire: CyclingRepertoire | GARepertoire | None = None,
    genotypes: Genotype | None = None,
    fitnesses: Array | None = None,
    descriptors: Array | None = None,
    extra_scores: ExtraScores | None = None,
  ) -> CycleQDState:
    """The state after a batch: the schedule moves on."""
    del repertoire, genotypes, fitnesses, descriptors, extra_scores
    assert emitter_state is not None
    state: CycleQDState = emitter_state.replace(iteration=emitter_state.iteration + 1)
    return state

  def _mutate(
    self, keys: PRNGKey, children: Genotype, task_context: Genotype | None, archives: Int[Array, "P"]
  ) -> Genotype:
    assert self._mutation is not None
    if task_context is None:
      return jax.vmap(self._mutation)(keys, children)
    if not getattr(self._schedule, "same_for_all", False):
      contexts = jax.tree.map(lambda leaf: leaf[archives], task_context)
      return jax.vmap(self._mutation)(keys, children, contexts)
    # All children are of one archive: its entry is taken once, and not copied for each of them.
    context = jax.tree.map(lambda leaf: leaf[archives[0]], task_context)
    return jax.vmap(self._mutation, in_axes=(0, 0, None))(keys, children, context)

  def _active_archives(self, iteration: Int[Array, ""], num_tasks: int) -> Int[Array, "P"]:
    return self._schedule(iteration // self._flip_interval, self._batch_size, num_tasks).astype(jnp.int32)

  def _select_in_archives(
    self, repertoire: CyclingRepertoire, archives: Int[Array, "P"], key: PRNGKey
  ) -> Int[Array, "P 2"]:
    """Slots of the parents. Probabilities are worked out once for each archive that the batch draws from."""
    known = num_distinct(self._schedule, self._batch_size, repertoire.num_tasks)
    num = repertoire.num_tasks if known is None else known
    share = self._batch_size if known is None else -(-self._batch_size // num)
    distinct = jnp.arange(num, dtype=jnp.int32) if known is None else archives[:num]
    probabilities = jax.vmap(lambda archive: self._probabilities(repertoire, archive))(distinct)
    pairs = jax.vmap(select_pairs, in_axes=(0, 0, None))(jax.random.split(key, num), probabilities, share)
    slots = jnp.take_along_axis(repertoire.slots[distinct], pairs.reshape(num, -1), axis=1).reshape(num, share, 2)
    if known is None:  # of each archive a pair for every child, who takes that of its own
      return slots[archives, jnp.arange(self._batch_size)]
    # Child p draws from the archive numbered p mod num, its p // num-th pair.
    return slots.swapaxes(0, 1).reshape(-1, 2)[: self._batch_size]

  def _probabilities(self, repertoire: CyclingRepertoire, archive: Int[Array, ""]) -> Float[Array, "N"]:
    slots = repertoire.slots[archive]
    scores = repertoire.scores[slots]
    descriptors = jnp.take(scores, jnp.asarray(other_tasks(repertoire.num_tasks))[archive], axis=1)
    # Voronoi cells have no coordinates: there a rule that reads bins is given the descriptors.
    bins = descriptors
    if isinstance(repertoire.cells, Grid):
      bins = jnp.asarray(grid_coordinates(repertoire.cells))[archive]
    return self._rule(scores[:, archive], descriptors, bins, slots != EMPTY)

  def _select_among_members(self, repertoire: GARepertoire, key: PRNGKey) -> tuple[Genotype, Int[Array, "P 2"]]:
    """All members of a repertoire of QDax, leaves `[M, ...]`, and which of them are the parents.

    A cell with a Pareto front (MOME) has several members. To a rule the first objective is the fitness; the others are
    descriptors, before those that the member has.
    """
    fitnesses = getattr(repertoire, "fitnesses", None)
    if fitnesses is None or fitnesses.ndim not in (2, 3):
      raise ValueError(
        "repertoire: expected a CyclingRepertoire, or fitnesses [N, objectives] or [N, front, objectives], got "
        f"{type(repertoire).__name__}" + ("" if fitnesses is None else f" with {list(fitnesses.shape)}")
      )
    of_front = fitnesses.ndim - 1

    def flat(leaf: Array) -> Array:
      return leaf.reshape(-1, *leaf.shape[of_front:])

    objectives = flat(fitnesses)
    descriptors = getattr(repertoire, "descriptors", None)
    others = [objectives[:, 1:]] if descriptors is None else [objectives[:, 1:], flat(descriptors)]
    columns = jnp.concatenate(others, axis=1)
    probabilities = self._rule(objectives[:, 0], columns, columns, (objectives != -jnp.inf).all(axis=1))
    return jax.tree.map(flat, repertoire.genotypes), select_pairs(key, probabilities, self._batch_size)


def split_scores(scores: Float[Array, "P K"], archive: Int[Array, ""] | int) -> tuple[Array, Array]:
  """Scores as the fitnesses `[P]` and descriptors `[P, K-1]` of one archive."""
  others = jnp.asarray(np.asarray(other_tasks(scores.shape[1])))[archive]
  return scores[:, archive], jnp.take(scores, others, axis=1)
