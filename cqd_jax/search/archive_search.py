"""Any QDax emitter on K archives whose roles cycle, as an `Algorithm`; CycleQD is the one with `CycleQDEmitter`."""

from typing import Any, TypeAlias

import flax.struct
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from qdax.core.emitters.emitter import Emitter

from cqd_jax.archive.cells import Cells
from cqd_jax.archive.repertoire import CyclingRepertoire
from cqd_jax.genotypes.space import Space, population_size, take
from cqd_jax.search.algorithm import Info, Population
from cqd_jax.search.cycleqd import CycleQD
from cqd_jax.tasks.problem import Scored
from cqd_jax.types import Genotype, Metrics, PRNGKey

MakeCells: TypeAlias = Any
"""`(scores [E, K] of the experts, key) -> Cells`: a cells plug with its settings bound."""


class ArchiveState(flax.struct.PyTreeNode):
  """What an archive search goes on from.

  Attributes:
    repertoire: the archives; extra score "values" `[M, K, B]`, as in `Scored`.
    emitter_state: of the emitter.
  """

  repertoire: CyclingRepertoire
  emitter_state: Any


class ArchiveSearch:
  """Quality-Diversity with one emitter; `parents` and `archive` in its info are kept where it names them for all.

  Args:
    emitter: `CycleQDEmitter`, or any emitter of QDax: one that needs to know its archive inside `PerArchiveEmitter`.
    space: what genotypes mean.
    cells: makes the cells from the experts' scores.
    budget: children that will be offered at most; no more slots are ever needed.
    variation: how children are made beside crossover, in words.

  Attributes:
    batch_size: P, of the emitter.
    space: as given.
    variation: as given.
    num_teachers: whose answers the emitter learns from.
  """

  def __init__(self, emitter: Emitter, *, space: Space, cells: MakeCells, budget: int, variation: str = ""):
    self.batch_size = int(emitter.batch_size)
    self.space = space
    self.variation = variation
    self.num_teachers = int(getattr(emitter, "num_teachers", 0))
    self._cells = cells
    self._budget = budget
    self._cycleqd = CycleQD(None, emitter)

  def init(self, key: PRNGKey, initial: Genotype, scored: Scored) -> ArchiveState:
    """See `Algorithm`. The cells follow from the experts, the first of the initial population.

    Raises:
      ValueError: if no individual got finite scores on all tasks.
    """
    scored = scored.with_scores()
    scores = np.asarray(scored.scores)
    cells: Cells = self._cells(scores[: self.space.num_experts], key)
    repertoire, emitter_state, _ = self._cycleqd.init_ask_tell(
      initial,
      scores,
      cells,
      key,
      extra_scores={"values": jnp.asarray(scored.values, jnp.float32)},
      capacity=population_size(initial) + -(-self._budget // self.batch_size) * self.batch_size,  # no more will ever be
    )
    return ArchiveState(repertoire, emitter_state)

  def ask(self, state: ArchiveState, key: PRNGKey) -> tuple[Genotype, Info]:
    """See `Algorithm`."""
    genotypes, told = self._cycleqd.ask(state.repertoire, state.emitter_state, key)
    known = {name: told[name] for name in ("parents", "archive") if self._is_of_all(told.get(name))}
    notes = {name: leaf for name, leaf in told.get("note", {}).items() if self._is_of_all(leaf)}
    return genotypes, Info(**known, note=notes, extra=dict(told))

  def tell(self, state: ArchiveState, genotypes: Genotype, scored: Scored, info: Info) -> tuple[ArchiveState, Metrics]:
    """See `Algorithm`; the figures are those of `cycling_metrics`."""
    scored = scored.with_scores()
    repertoire, emitter_state, metrics = self._cycleqd.tell(
      genotypes=genotypes,
      scores=scored.scores,
      repertoire=state.repertoire,
      emitter_state=state.emitter_state,
      extra_scores={"values": scored.values},
      extra_info=dict(info.extra),
    )
    return ArchiveState(repertoire, emitter_state), metrics

  def population(self, state: ArchiveState) -> Population:
    """All elites, in the order of their slots."""
    repertoire = state.repertoire
    alive = np.flatnonzero(np.asarray(repertoire.alive))
    return Population(
      genotypes=take(repertoire.genotypes, alive),
      values=np.asarray(repertoire.extra_scores["values"])[alive],
      identities=np.asarray(repertoire.lineage.identity)[alive],
      scores=np.asarray(repertoire.scores)[alive],
    )

  def repertoire(self, state: ArchiveState) -> CyclingRepertoire:
    """The archives."""
    return state.repertoire

  def _is_of_all(self, leaf: Array | None) -> bool:
    """Whether something is reported of every child; QDax's `MultiEmitter` reports what its first emitter says."""
    return leaf is not None and leaf.ndim > 0 and leaf.shape[0] == self.batch_size
