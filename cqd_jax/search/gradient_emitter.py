"""Children that take gradient steps before they are scored: a QDax `Emitter`, and CycleQD with it."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from qdax.core.containers.ga_repertoire import GARepertoire

from cqd_jax.archive.make_cells import check_cells, from_experts
from cqd_jax.archive.repertoire import CyclingRepertoire
from cqd_jax.archive.selectors import Rule, elite_sampling
from cqd_jax.genotypes.space import MakeSpace, Space, dense
from cqd_jax.operators.mutation import no_mutation
from cqd_jax.search.algorithm import Algorithm, SearchContext, Teachers
from cqd_jax.search.archive_search import ArchiveSearch, MakeCells
from cqd_jax.search.emitters import Crossover, CycleQDEmitter, CycleQDState, Mutation
from cqd_jax.search.gradient import begin_descent, descend
from cqd_jax.search.schedules import Schedule, cycle
from cqd_jax.search.variation import variation_of
from cqd_jax.tasks.problem import TrainingSignal
from cqd_jax.types import ExtraScores, Genotype, PRNGKey

FOLLOWED = ("simplex", "active")


class GradientEmitter(CycleQDEmitter):
  """`CycleQDEmitter`, some of whose children then go down the tasks' losses by a few steps of Adam.

  Args:
    space: what genotypes mean.
    teachers: whose answers are learned; asked in `init`.
    steps: S, of each child.
    learning_rate: of each step.
    share: of the children in a batch, in (0, 1]; the others are left as they are.
    follow: how much each task's loss counts for a child: "simplex", drawn uniformly from the simplex; "active", only
      the task of the archive that its parents are from.
    labels: whose answers, as in `Teachers.training_signal`.
    side_by_side: children that take their steps at a time; fewer take less memory.
    settings: of `CycleQDEmitter`.

  Raises:
    ValueError: naming the argument that is out of range.
  """

  def __init__(
    self,
    *,
    space: Space,
    teachers: Teachers,
    steps: int = 10,
    learning_rate: float = 2e-4,
    share: float = 1.0,
    follow: str = "simplex",
    labels: str = "experts",
    side_by_side: int = 4,
    **settings: Any,
  ):
    super().__init__(**settings)
    if steps < 1 or side_by_side < 1:
      raise ValueError(f"steps, side_by_side: expected at least 1, got {steps}, {side_by_side}")
    if not learning_rate > 0:
      raise ValueError(f"learning_rate: expected more than 0, got {learning_rate}")
    if not 0 < share <= 1:
      raise ValueError(f"share: expected more than 0 and at most 1, got {share}")
    if follow not in FOLLOWED:
      raise ValueError(f"follow: expected one of {', '.join(FOLLOWED)}, got {follow!r}")
    teachers.check(labels)
    self.num_teachers = space.num_experts if labels == "experts" else 0
    self._space = space
    self._teachers = teachers
    self._rates = jnp.full(steps, learning_rate, jnp.float32)
    self._count = max(round(share * self.batch_size), 1)
    self._follow = follow
    self._labels = labels
    self._side_by_side = min(side_by_side, self._count)
    self._signal: TrainingSignal | None = None

  def init(
    self,
    key: PRNGKey,
    repertoire: CyclingRepertoire | GARepertoire,
    genotypes: Genotype,
    fitnesses: Array,
    descriptors: Array,
    extra_scores: ExtraScores,
  ) -> CycleQDState:
    """See `CycleQDEmitter`; those who teach are asked.

    Raises:
      ValueError: if there is nothing to learn from, or the repertoire does not know the tasks.
    """
    if not isinstance(repertoire, CyclingRepertoire):
      raise ValueError("repertoire: gradients follow the tasks of a CyclingRepertoire; an ordinary archive has none")
    self._signal = self._teachers.training_signal(labels=self._labels, members=1)
    return super().init(key, repertoire, genotypes, fitnesses, descriptors, extra_scores)

  def emit(
    self,
    repertoire: CyclingRepertoire | GARepertoire | None,
    emitter_state: CycleQDState | None,
    key: PRNGKey,
  ) -> tuple[Genotype, ExtraScores]:
    """See `CycleQDEmitter`.

    Noted are also "loss" `[P, K]`, before the last step, and "task_weights" `[P, K]`; NaN of who took no steps.
    """
    assert isinstance(repertoire, CyclingRepertoire)
    assert self._signal is not None
    signal, count, num_tasks = self._signal, self._count, repertoire.num_tasks
    own_key, weights_key, step_key = jax.random.split(key, 3)
    children, extra_info = super().emit(repertoire, emitter_state, own_key)
    weights = self._weigh(weights_key, extra_info["archive"][:count], num_tasks)

    def teach(given: tuple[PRNGKey, Genotype, Array]) -> tuple[Genotype, Array]:
      child_key, child, own = given
      descent, losses = descend(
        child_key, begin_descent(child), signal.data, own, self._rates, space=self._space, signal=signal
      )
      return descent.genotype, losses[-1]

    first = jax.tree.map(lambda leaf: leaf[:count], children)
    taught, losses = jax.lax.map(
      teach, (jax.random.split(step_key, count), first, weights), batch_size=self._side_by_side
    )
    children = jax.tree.map(lambda own, all_: jnp.concatenate([own, all_[count:]]), taught, children)
    note = {"loss": self._for_all(losses), "task_weights": self._for_all(weights)}
    return children, {**extra_info, "note": {**extra_info.get("note", {}), **note}}

  def _weigh(self, key: PRNGKey, archives: Array, num_tasks: int) -> Float[Array, "C K"]:
    if self._follow == "active":
      return jax.nn.one_hot(archives, num_tasks, dtype=jnp.float32)
    drawn: Array = jax.random.dirichlet(key, jnp.ones(num_tasks), archives.shape)
    return drawn

  def _for_all(self, noted: Float[Array, "C K"]) -> Float[Array, "P K"]:
    rest = jnp.full((self.batch_size - self._count, noted.shape[1]), jnp.nan, noted.dtype)
    return jnp.concatenate([noted, rest])


def gradient(
  context: SearchContext,
  *,
  batch_size: int = 4,
  genotype: MakeSpace = dense,
  cells: MakeCells = from_experts,
  selection: Rule = elite_sampling,
  schedule: Schedule = cycle,
  crossover: Crossover | None = None,
  mutation: Mutation = no_mutation,
  steps: int = 10,
  learning_rate: float = 2e-4,
  share: float = 1.0,
  follow: str = "simplex",
  labels: str = "experts",
) -> Algorithm:
  """CycleQD whose children take gradient steps on verified answers to training questions before they are scored.

  Args:
    context: of the run.
    batch_size: children per iteration.
    genotype: what an individual is stored as: dense, core, coefficients.
    cells: how archives are cut into cells.
    selection: how parents are sampled.
    schedule: where parents come from.
    crossover: how two parents become a child. Not given: linear, or line where individuals are coefficients.
    mutation: what happens to a child then, before its steps.
    steps: of Adam, of each child.
    learning_rate: of each step. Cores and coefficients want larger ones than weights.
    share: of the children that take steps.
    follow: how the tasks' losses count: simplex (weights drawn for each child), active (the parents' archive only).
    labels: whose answers are learned: experts, or references.

  Raises:
    ValueError: naming the setting that cannot be used.
  """
  if labels not in ("experts", "references"):
    raise ValueError(f"labels: expected experts or references, got {labels!r}")
  space = genotype(context.root, context.keep)
  check_cells(cells, context.num_tasks)
  variation = variation_of(space, context.num_tasks, crossover, mutation)
  emitter = GradientEmitter(
    space=space,
    teachers=context.teachers,
    steps=steps,
    learning_rate=learning_rate,
    share=share,
    follow=follow,
    labels=labels,
    batch_size=batch_size,
    crossover=variation.crossover,
    mutation=variation.mutation,
    task_context=variation.task_context,
    rule=selection,
    schedule=schedule,
  )
  words = ", ".join(filter(None, [variation.words, f"{steps} gradient steps"]))
  return ArchiveSearch(emitter, space=space, cells=cells, budget=context.budget, variation=words)
