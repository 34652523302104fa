"""How it is searched: the protocol that CycleQD, evolution strategies, NSGA-II and any QDax emitter share.

A method of a comparison is a function `make(context, *, setting) -> Algorithm`: all the loop knows of it is the name
under which it was configured. `cqd_jax.search.methods` has those of this package.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

from cqd_jax.archive.repertoire import CyclingRepertoire
from cqd_jax.genotypes.space import KeepBasis, Space
from cqd_jax.tasks.problem import Scored, TrainingSignal
from cqd_jax.types import Genotype, Metrics, PRNGKey

State: TypeAlias = Any
"""A pytree: it is what a checkpoint holds."""


class Info(NamedTuple):
  """What an algorithm says of P children; a pytree.

  Attributes:
    parents: int `[P, 2]` identities in the order in which individuals were scored; -1: none. None: not known.
    archive: int `[P]`, the archive whose elites the parents were. None: not known.
    note: whatever the history should keep of each child, leaves `[P, ...]` by name, as "weights" or "angle".
    extra: what the algorithm wants to see again in `tell`.
  """

  parents: Any = None
  archive: Any = None
  note: Mapping[str, Any] = {}
  extra: Mapping[str, Any] = {}


class Population(NamedTuple):
  """What a search offers in the end.

  Attributes:
    genotypes: leaves `[M, ...]`.
    values: `[M, K, B]` as in `Scored`.
    identities: int `[M]`, in the order in which individuals were scored; the initial population comes first.
    scores: `[M, K]` float32.
    chosen: settings that the search chose, by name, to be shown beside its best individual.
  """

  genotypes: Genotype
  values: Any
  identities: Any
  scores: Any
  chosen: Mapping[str, float] = {}


@runtime_checkable
class Algorithm(Protocol):
  """A search. The methods are pure and traceable, and the state is a pytree: what is killed goes on to the bit.

  Optional attributes: `space`, what the genotypes mean (default: the root space of the run); `variation`, a line on how
  children are made, for the history; `repertoire(state)`, the archives, where there are any; `budget`, how many
  children to score where that is not the run's to say; `traceable = False`, where ask and tell are NumPy's;
  `writes_model = True`, where the best individual is a result that a run keeps as a model folder; `num_teachers`, how
  many individuals answer the training questions that it learns from.
  """

  batch_size: int

  def init(self, key: PRNGKey, initial: Genotype, scored: Scored) -> State:
    """The state before the first batch, from the scored initial population of its space; on the host."""

  def ask(self, state: State, key: PRNGKey) -> tuple[Genotype, Info]:
    """P children, leaves `[P, ...]`."""

  def tell(self, state: State, genotypes: Genotype, scored: Scored, info: Info) -> tuple[State, Metrics]:
    """The state that has learned from them, and its figures. A row of NaN is a child that failed or was not scored."""

  def population(self, state: State) -> Population:
    """What the search offers; on the host."""


@runtime_checkable
class Teachers(Protocol):
  """Those of a run that answer training questions, so that gradients can follow what passed.

  They are asked in `Algorithm.init`, on the host: answers are executed then. What was asked before is remembered.
  """

  def check(self, labels: str) -> None:
    """Raises ValueError where `training_signal` could not serve; nobody is asked yet."""

  def training_signal(self, *, labels: str, members: int) -> TrainingSignal:
    """To learn from.

    Args:
      labels: "experts": the experts' verified answers; "swarm": those of `members` of the swarm as well, chosen to
        complement one another on validation; "references": the answers that came with the questions.
      members: of the swarm.

    Raises:
      ValueError: if the problem has no such signal, or nothing passed.
    """

  def average_of_swarm(self, space: Space, size: int) -> Genotype:
    """The plain average of the `size` members with the best means on validation, leaves `[...]`, in `space`.

    Raises:
      ValueError: if they are individuals of another space.
    """


class NoTeachers:
  """Where nobody can be asked: a rehearsal, or a search by itself."""

  def check(self, labels: str) -> None:
    """Nothing is known to be wrong."""
    del labels

  def training_signal(self, *, labels: str, members: int) -> TrainingSignal:
    """See `Teachers`; raises ValueError."""
    raise ValueError(f"labels: {labels} ({members}), but there is nobody here who could be asked")

  def average_of_swarm(self, space: Space, size: int) -> Genotype:
    """See `Teachers`; raises ValueError."""
    raise ValueError(f"start: expected a swarm of {size} in {space.name} space, and there is none")


NOBODY = NoTeachers()


@dataclasses.dataclass(frozen=True)
class SearchContext:
  """What a method is made from.

  Attributes:
    root: the space in which base and experts of the run were read.
    keep: the run's bases of core spaces.
    task_names: K.
    budget: children that it may score.
    teachers: whose answers gradients may follow.
    first: whether this is the first method of the run, before which there is no swarm.
  """

  root: Space
  keep: KeepBasis
  task_names: tuple[str, ...]
  budget: int
  teachers: Teachers = NOBODY
  first: bool = False

  @property
  def num_tasks(self) -> int:
    """K."""
    return len(self.task_names)


MakeAlgorithm: TypeAlias = Callable[[SearchContext], Algorithm]
"""A method plug with its settings bound."""


def archives_of(algorithm: Algorithm, state: State) -> CyclingRepertoire | None:
  """The archives of a search, where it has any."""
  repertoire = getattr(algorithm, "repertoire", None)
  return None if repertoire is None else repertoire(state)


def space_of(algorithm: Algorithm, root: Space) -> Space:
  """What the genotypes of a search mean."""
  space: Space = getattr(algorithm, "space", root)
  return space
