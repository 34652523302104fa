"""The repertoire of CycleQD: K archives over one pool of individuals.

An individual that is elite in several archives is stored once. The pool has `capacity` slots, each with a genotype,
its K scores and its lineage; an archive is a row of slot numbers, one per cell. An insertion touches only what the
batch touches: its cost grows with the batch, never with the number of cells or slots.
"""

import functools
from typing import Any, cast

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Num
from qdax.core.containers.ga_repertoire import GARepertoire
from qdax.core.containers.mapelites_repertoire import MapElitesRepertoire
from qdax.core.containers.repertoire import Repertoire
from qdax.core.emitters.repertoire_selectors.selector import Selector
from qdax.core.emitters.repertoire_selectors.uniform_selector import UniformSelector

from cqd_jax.archive.cells import Cells, check_num_tasks, other_tasks, stacked_centroids
from cqd_jax.checks import check_population, same_structure
from cqd_jax.trees import as_arrays
from cqd_jax.types import ArrayField, ExtraScores, Genotype, PRNGKey

EMPTY = -1


class Lineage(flax.struct.PyTreeNode):
  """Where individuals come from.

  Attributes:
    identity: `[M]` int32, the running number of the individual among all that were ever offered; -1: none.
    parents: `[M, 2]` int32, the identities of its parents; -1: none, or not known.
    born: `[M]` int32, the batch in which it was offered; 0 for the initial population.
  """

  identity: ArrayField
  parents: ArrayField
  born: ArrayField


class Individual(flax.struct.PyTreeNode):
  """One individual: its genotype (leaves `[...]`), `[K]` scores, extra scores and lineage (scalars and `[2]`)."""

  genotype: Genotype
  scores: ArrayField
  extra_scores: ExtraScores
  lineage: Lineage


class CyclingRepertoire(Repertoire):
  """K archives over one pool of M slots; made by `init`, changed by `add`.

  In archive k the fitness is the score on task k and the descriptor the scores on the other tasks (CycleQD,
  arXiv:2410.14735). Every individual is offered to all archives: it takes a cell that is empty or whose elite scores
  strictly less.

  Attributes:
    genotypes: leaves `[M, ...]`.
    scores: `[M, K]` float32.
    extra_scores: leaves `[M, ...]`, the keys given to `init`.
    lineage: see `Lineage`.
    slots: `[K, N]` int32, the slot of the elite of a cell; -1: empty.
    held: `[M, K]` bool, whether an archive holds the individual of a slot.
    free: `[M]` int32, a stack whose first `num_free` entries are the free slots.
    num_free: int32.
    num_offered: int32, individuals offered so far; the identity of the next one.
    num_batches: int32, batches offered so far.
    num_rejected: int32, individuals refused because a score was NaN or infinite.
    num_dropped: int32, individuals lost for want of a slot: 0 unless `add` was traced with too small a capacity.
    cells: how descriptors are cut into cells.
  """

  genotypes: Genotype
  scores: ArrayField
  extra_scores: ExtraScores
  lineage: Lineage
  slots: ArrayField
  held: ArrayField
  free: ArrayField
  num_free: ArrayField
  num_offered: ArrayField
  num_batches: ArrayField
  num_rejected: ArrayField
  num_dropped: ArrayField
  cells: Cells

  @classmethod
  def init(
    cls,
    genotypes: Genotype,
    scores: Num[Array, "P K"] | Num[np.ndarray, "P K"],
    cells: Cells,
    *,
    extra_scores: ExtraScores | None = None,
    capacity: int | None = None,
  ) -> "CyclingRepertoire":
    """A repertoire with an initial population.

    Args:
      genotypes: leaves `[P, ...]`; with P = 0 they only give the shapes.
      scores: finite scores on the K tasks; a row with NaN or inf is refused and counted.
      cells: a `Grid` or `Centroids` over K tasks.
      extra_scores: leaves `[P, ...]`; these keys are kept for every individual from now on.
      capacity: number of slots M. By default as many as there are cells in all archives, which always suffices. A
        smaller pool grows in `add` and `reserve`, both on the host; in a traced `add` it cannot.

    Raises:
      ValueError: naming the argument whose shape or type does not fit.
    """
    genotypes, extra_scores = as_arrays((genotypes, extra_scores or {}))
    scores = jnp.asarray(scores, jnp.float32)
    population = check_population(genotypes, "genotypes")
    if scores.ndim != 2 or scores.shape != (population, cells.num_tasks):
      raise ValueError(
        f"scores: expected shape ({population}, {cells.num_tasks}), one row per individual and one column per task of "
        f"cells, got {scores.shape}"
      )
    check_num_tasks(cells.num_tasks, "cells")
    if extra_scores:
      check_population(extra_scores, "extra_scores", population)
    most = sum(cells.num_cells)
    size = min(most, capacity) if capacity is not None else most
    if size < 1:
      raise ValueError(f"capacity: expected at least 1, got {capacity}")

    def slots_for(leaf: Array) -> Array:
      return jnp.zeros((size, *leaf.shape[1:]), leaf.dtype)

    zero = functools.partial(jnp.zeros, (), jnp.int32)
    empty = cls(
      genotypes=jax.tree.map(slots_for, genotypes),
      scores=jnp.full((size, cells.num_tasks), -jnp.inf, jnp.float32),
      extra_scores=jax.tree.map(slots_for, extra_scores),
      lineage=Lineage(
        identity=jnp.full(size, EMPTY, jnp.int32),
        parents=jnp.full((size, 2), EMPTY, jnp.int32),
        born=jnp.full(size, EMPTY, jnp.int32),
      ),
      slots=jnp.full((cells.num_tasks, max(cells.num_cells)), EMPTY, jnp.int32),
      held=jnp.zeros((size, cells.num_tasks), bool),
      free=jnp.arange(size - 1, -1, -1, dtype=jnp.int32),  # popped from the end: slot 0 first
      num_free=jnp.int32(size),
      num_offered=zero(),
      num_batches=zero(),
      num_rejected=zero(),
      num_dropped=zero(),
      cells=jax.tree.map(jnp.copy, cells),  # donated later; the caller's own must live on
    )
    return empty.add(genotypes=genotypes, scores=scores, extra_scores=extra_scores, donate=True)

  def add(
    self,
    genotypes: Genotype,
    scores: Num[Array, "P K"] | Num[np.ndarray, "P K"],
    *,
    extra_scores: ExtraScores | None = None,
    parents: Int[Array, "..."] | Int[np.ndarray, "..."] | None = None,
    donate: bool = False,
  ) -> "CyclingRepertoire":
    """Offers a batch of individuals to all archives.

    The archives that result do not depend on the order within the batch, but for ties: of equal fitness in one cell,
    the incumbent stays, else the lowest index in the batch enters. A row of scores with NaN or inf is refused and
    counted in `num_rejected`. Compiled on first use; can be traced in a larger program.

    Args:
      genotypes: leaves `[P, ...]`, shaped as in `init`.
      scores: scores on the K tasks, compared in float32.
      extra_scores: leaves `[P, ...]`, at least the keys given to `init`; other keys are left out.
      parents: `[P, 2]` identities of the parents; -1 where unknown.
      donate: give this repertoire's buffers to the new one, so that no pool is copied; `self` must not be used after.

    Returns:
      The new repertoire, a larger one if the free slots of a capacity-bound pool could have run out.

    Raises:
      ValueError: naming the argument whose structure, shape or dtype does not fit.
    """
    genotypes, extra_scores = as_arrays((genotypes, extra_scores or {}))
    scores = jnp.asarray(scores, jnp.float32)
    population = _check_batch(self, genotypes, scores)
    parents = jnp.full((population, 2), EMPTY, jnp.int32) if parents is None else jnp.asarray(parents)
    if parents.shape != (population, 2):
      raise ValueError(f"parents: expected shape ({population}, 2), got {parents.shape}")
    kept_extra = _select_extra_scores(self, extra_scores, population)
    roomy = self if isinstance(self.num_free, jax.core.Tracer) else self.reserve(population)
    # In a larger program donation is that program's affair; under vmap a pool without a batch axis could not be used.
    traced = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((self, genotypes, scores)))
    insert = _insert_donating if donate and not traced else _insert
    return insert(roomy, genotypes, scores, kept_extra, parents)

  def reserve(self, num_slots: int) -> "CyclingRepertoire":
    """A repertoire with room for a batch of `num_slots`, whatever it holds; on the host, never while tracing.

    Returns `self` where there is room; else one with at least twice the slots (at most one per cell of all archives).
    """
    most = sum(self.cells.num_cells)
    if self.capacity >= most or int(self.num_free) >= num_slots:
      return self
    size = min(most, max(2 * self.capacity, self.capacity + num_slots))
    added = size - self.capacity
    genotypes, extra_scores, held = _pad_slots((self.genotypes, self.extra_scores, self.held), added=added, fill=0)
    num_free = int(self.num_free)
    free = np.zeros(size, np.int32)
    free[:added] = np.arange(size - 1, self.capacity - 1, -1)
    free[added : added + num_free] = np.asarray(self.free)[:num_free]
    return self.replace(
      genotypes=genotypes,
      scores=_pad_slots(self.scores, added=added, fill=-np.inf),
      extra_scores=extra_scores,
      lineage=_pad_slots(self.lineage, added=added, fill=EMPTY),
      held=held,
      free=jnp.asarray(free),
      num_free=jnp.int32(num_free + added),
    )

  @property
  def num_tasks(self) -> int:
    """K."""
    return self.slots.shape[0]

  @property
  def capacity(self) -> int:
    """M, the slots of the pool."""
    return self.scores.shape[0]

  @property
  def alive(self) -> Bool[Array, "M"]:
    """Which slots hold an individual."""
    return self.held.any(axis=-1)

  @property
  def num_elites(self) -> Int[Array, ""]:
    """How many distinct individuals the archives hold."""
    return self.capacity - self.num_free

  @property
  def fitnesses(self) -> Float[Array, "K N"]:
    """The fitness of every cell's elite; -inf where empty."""
    own = self.scores[self.slots, jnp.arange(self.num_tasks)[:, None]]
    return jnp.where(self.slots == EMPTY, -jnp.inf, own)

  def archive(self, k: int | np.integer | Int[Array, ""]) -> MapElitesRepertoire:
    """Archive k as an ordinary QDax repertoire; its genotypes are copied together.

    Args:
      k: task, 0..K-1. Where it is traced and archives differ in size, cells that archive k lacks are empty, with
        infinitely far centroids.

    Raises:
      ValueError: if a concrete k is out of range.
    """
    slots = self.slots[k]
    centroids = stacked_centroids(self.cells)[k]
    if isinstance(k, int | np.integer):
      if not 0 <= k < self.num_tasks:
        raise ValueError(f"k: expected 0 <= k < {self.num_tasks}, got {k}")
      slots, centroids = (array[: self.cells.num_cells[k]] for array in (slots, centroids))
    occupied = slots != EMPTY

    def gather(leaf: Array) -> Array:
      mask = occupied.reshape(-1, *(1,) * (leaf.ndim - 1))
      return jnp.where(mask, leaf[slots], jnp.zeros((), leaf.dtype))

    descriptors = jnp.take(self.scores, jnp.asarray(other_tasks(self.num_tasks))[k], axis=1)
    return MapElitesRepertoire(
      genotypes=jax.tree.map(gather, self.genotypes),
      fitnesses=jnp.where(occupied, self.scores[slots, k], -jnp.inf)[:, None],
      descriptors=gather(descriptors),
      centroids=centroids,
      extra_scores=jax.tree.map(gather, self.extra_scores),
      keys_extra_scores=tuple(self.extra_scores),
    )

  def population(self) -> GARepertoire:
    """The distinct elites as a QDax repertoire with `[M, K]` fitnesses, -inf in free slots; nothing is copied."""
    return GARepertoire(
      genotypes=self.genotypes,
      fitnesses=jnp.where(self.alive[:, None], self.scores, -jnp.inf),
      extra_scores=self.extra_scores,
      keys_extra_scores=tuple(self.extra_scores),
    )

  def select(self, key: PRNGKey, num_samples: int, selector: Selector | None = None) -> GARepertoire:
    """Draws from the distinct elites of all archives, uniformly with replacement by default.

    So a QDax emitter that knows one repertoire runs on this one. `CycleQDEmitter` selects in one archive instead.
    """
    chosen = (selector or UniformSelector()).select(self.population(), key, num_samples)
    return cast(GARepertoire, chosen)

  def best(self, k: int | np.integer | None = None) -> Individual:
    """The fittest elite of archive k, or with None the one with the best mean score; the lowest slot of equals.

    Raises:
      ValueError: if k is out of range; outside of jit, if there is no elite.
    """
    if k is not None and not 0 <= k < self.num_tasks:
      raise ValueError(f"k: expected 0 <= k < {self.num_tasks}, got {k}")
    if not isinstance(self.num_free, jax.core.Tracer) and int(self.num_elites) == 0:
      raise ValueError("the repertoire is empty: it has no best individual")
    # The best score on task k is always in archive k, so the whole pool may be searched.
    merit = self.scores.mean(axis=-1) if k is None else self.scores[:, k]
    return self.individual(jnp.argmax(jnp.where(self.alive, merit, -jnp.inf)))

  def individual(self, slot: int | Int[Array, ""]) -> Individual:
    """What a slot of the pool holds."""
    pool = (self.genotypes, self.scores, self.extra_scores, self.lineage)
    return Individual(*_read_slot(pool, slot))


def _check_batch(repertoire: CyclingRepertoire, genotypes: Genotype, scores: Array) -> int:
  population = check_population(genotypes, "genotypes")
  if not same_structure(repertoire.genotypes, genotypes):
    structures = map(jax.tree.structure, (repertoire.genotypes, genotypes))
    raise ValueError("genotypes: expected the structure {}, got {}".format(*structures))
  pool = jax.tree.leaves_with_path(repertoire.genotypes)
  for (path, slot), leaf in zip(pool, jax.tree.leaves(genotypes), strict=True):
    if slot.shape[1:] != leaf.shape[1:] or slot.dtype != leaf.dtype:
      raise ValueError(
        f"genotypes{jax.tree_util.keystr(path)}: expected {slot.dtype}[P, {', '.join(map(str, slot.shape[1:]))}], "
        f"got {leaf.dtype}{list(leaf.shape)}"
      )
  if scores.shape != (population, repertoire.num_tasks):
    raise ValueError(f"scores: expected shape ({population}, {repertoire.num_tasks}), got {scores.shape}")
  return population


def _select_extra_scores(repertoire: CyclingRepertoire, extra_scores: ExtraScores, population: int) -> ExtraScores:
  missing = repertoire.extra_scores.keys() - extra_scores.keys()
  if missing:
    raise ValueError(f"extra_scores: misses {sorted(missing)}, kept since init")
  kept = {name: extra_scores[name] for name in repertoire.extra_scores}
  if kept:
    check_population(kept, "extra_scores", population)
  return kept


def _first_of_best(
  cells: Int[Array, "P K"], scores: Float[Array, "P K"], contends: Bool[Array, "P K"], num_cells: int
) -> Bool[Array, "P K"]:
  """Of the contenders for one cell, the one of the highest score and then of the lowest index; per archive."""
  # Two scatters over all cells are the fastest (30 times, at 4,096 in 225 cells) until cells outnumber the batch so far
  # that clearing them is what costs.
  rule = _first_of_best_by_scatter if num_cells <= 256 * cells.shape[0] else _first_of_best_by_sort
  return jax.vmap(functools.partial(rule, num_cells=num_cells), in_axes=1, out_axes=1)(cells, scores, contends)


def _first_of_best_by_scatter(
  cells: Int[Array, "P"], scores: Float[Array, "P"], contends: Bool[Array, "P"], num_cells: int
) -> Bool[Array, "P"]:
  index = jnp.arange(cells.shape[0], dtype=jnp.int32)
  best = jnp.full(num_cells, -jnp.inf).at[jnp.where(contends, cells, num_cells)].max(scores, mode="drop")
  leads = contends & (scores == best[cells])
  first = jnp.full(num_cells, index.size).at[jnp.where(leads, cells, num_cells)].min(index, mode="drop")
  return leads & (first[cells] == index)


def _first_of_best_by_sort(
  cells: Int[Array, "P"], scores: Float[Array, "P"], contends: Bool[Array, "P"], num_cells: int
) -> Bool[Array, "P"]:
  index = jnp.arange(cells.shape[0], dtype=jnp.int32)
  keys = (jnp.where(contends, cells, num_cells), -scores, index)
  ordered_cells, _, order = jax.lax.sort(keys, num_keys=3)
  return jnp.zeros_like(contends).at[order].set(_starts_run(ordered_cells)) & contends


def _starts_run(ordered: Int[Array, "P"]) -> Bool[Array, "P"]:
  """Marks the first of each run of equal values."""
  return jnp.concatenate([jnp.ones_like(ordered[:1], bool), ordered[1:] != ordered[:-1]])


def _insert_batch(
  repertoire: CyclingRepertoire,
  genotypes: Genotype,
  scores: Float[Array, "P K"],
  extra_scores: ExtraScores,
  parents: Int[Array, "P 2"],
) -> CyclingRepertoire:
  size, num_tasks = repertoire.held.shape
  population = scores.shape[0]
  if population == 0:
    return repertoire.replace(num_batches=repertoire.num_batches + 1)
  archives = jnp.arange(num_tasks)[None]

  valid = jnp.isfinite(scores).all(axis=-1)
  cells = repertoire.cells.index(scores)
  incumbents = repertoire.slots[archives, cells]
  occupied = incumbents != EMPTY
  standing = jnp.where(occupied, repertoire.scores[incumbents, archives], -jnp.inf)
  contends = valid[:, None] & (scores > standing)
  if size < sum(repertoire.cells.num_cells):  # such a pool may be full; see `num_dropped`
    contender = contends.any(axis=-1)
    fits = jnp.cumsum(contender) <= repertoire.num_free
    num_dropped = repertoire.num_dropped + (contender & ~fits).sum(dtype=jnp.int32)
    contends &= fits[:, None]
  else:
    num_dropped = repertoire.num_dropped
  wins = _first_of_best(cells, scores, contends, repertoire.slots.shape[1])
  enters = wins.any(axis=-1)

  # Push the slots that no archive holds any more, each once though it may leave several archives in this batch.
  ousted = wins & occupied
  held = repertoire.held.at[jnp.where(ousted, incumbents, size), archives].set(False, mode="drop")
  dead = ousted & ~held[incumbents].any(axis=-1)
  dead_slots = jnp.sort(jnp.where(dead, incumbents, size).reshape(-1))
  frees = (dead_slots < size) & _starts_run(dead_slots)
  push_at = jnp.where(frees, repertoire.num_free + jnp.cumsum(frees) - 1, size)
  free = repertoire.free.at[push_at].set(dead_slots, mode="drop")
  num_free = repertoire.num_free + frees.sum(dtype=jnp.int32)

  # Pop one slot an entrant.
  popped = free[num_free - jnp.cumsum(enters, dtype=jnp.int32)]
  slot = jnp.where(enters, popped, size)

  def write(pool: Array, batch: Array) -> Array:
    return pool.at[slot].set(batch, mode="drop")

  lineage = Lineage(
    identity=repertoire.num_offered + jnp.arange(population, dtype=jnp.int32),
    parents=parents.astype(jnp.int32),
    born=jnp.full(population, repertoire.num_batches),
  )
  row = jnp.where(wins, cells, repertoire.slots.shape[1])
  return repertoire.replace(
    genotypes=jax.tree.map(write, repertoire.genotypes, genotypes),
    scores=write(repertoire.scores, scores),
    extra_scores=jax.tree.map(write, repertoire.extra_scores, extra_scores),
    lineage=jax.tree.map(write, repertoire.lineage, lineage),
    slots=repertoire.slots.at[archives, row].set(jnp.broadcast_to(slot[:, None], row.shape), mode="drop"),
    held=write(held, wins),
    free=free,
    num_free=num_free - enters.sum(dtype=jnp.int32),
    num_offered=repertoire.num_offered + population,
    num_batches=repertoire.num_batches + 1,
    num_rejected=repertoire.num_rejected + (~valid).sum(dtype=jnp.int32),
    num_dropped=num_dropped,
  )


@functools.partial(jax.jit, static_argnames=("added", "fill"))
def _pad_slots(pool: Any, *, added: int, fill: int | float) -> Any:
  """A pool with so many slots more, which hold nothing."""

  def pad(leaf: Array) -> Array:
    return jnp.pad(leaf, ((0, added),) + ((0, 0),) * (leaf.ndim - 1), constant_values=fill)

  return jax.tree.map(pad, pool)


@jax.jit
def _read_slot(pool: Any, slot: Any) -> Any:
  return jax.tree.map(lambda leaf: leaf[slot], pool)


_insert = jax.jit(_insert_batch)
_insert_donating = jax.jit(_insert_batch, donate_argnums=0)
