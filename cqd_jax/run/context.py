"""What the stages of a run share, whatever it scores and however it searches."""

import dataclasses
import functools
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
from jax.sharding import Mesh
from rich.console import Console

from cqd_jax.config.settings import OutputSettings
from cqd_jax.genotypes import CoreBasis
from cqd_jax.genotypes.space import Space
from cqd_jax.run.files import RunFiles
from cqd_jax.run.scoring import Clock, Scorer
from cqd_jax.run.teachers import RunTeachers
from cqd_jax.search.algorithm import MakeAlgorithm
from cqd_jax.store.basis import load_basis, save_basis
from cqd_jax.store.history import History
from cqd_jax.tasks.problem import Problem
from cqd_jax.terminal.interrupt import Interrupt
from cqd_jax.trees import Path as TreePath
from cqd_jax.types import Genotype, Params, PRNGKey

BASIS = "basis.safetensors"
"""The file of a run directory that keeps its core space."""


def name_experts(own: Sequence[str], task_names: Sequence[str]) -> tuple[str, ...]:
  """The experts' names: those of the tasks where there is one each, else their own, numbered where two are alike."""
  if len(own) in (0, len(task_names)):
    return tuple(task_names)
  return tuple(name if own.count(name) == 1 else f"{name} {index}" for index, name in enumerate(own))


@dataclasses.dataclass(frozen=True)
class Method:
  """A search of a run.

  Attributes:
    name: as shown in tables; its random numbers follow from it and the seed.
    make: makes the algorithm.
  """

  name: str
  make: MakeAlgorithm

  @property
  def slug(self) -> str:
    """The name as that of a folder."""
    words = "".join(letter if letter.isalnum() else " " for letter in self.name.lower()).split()
    return "-".join(words) or "method"

  def key(self, seed: int) -> PRNGKey:
    """The key of all its random numbers: another method beside it changes nothing."""
    return jax.random.fold_in(jax.random.key(seed), zlib.crc32(self.name.encode()))


@runtime_checkable
class ModelWriter(Protocol):
  """Writes individuals as models, in the form that suits what they are models of."""

  def whole(
    self, folder: Path, leaves: Iterable[tuple[TreePath, jax.Array]], about: Mapping[str, Any], card: str
  ) -> None:
    """Writes a whole model from the paths and leaves of its params; atomic."""

  def adapter(self, folder: Path, core: tuple[CoreBasis, Genotype], about: Mapping[str, Any], card: str) -> None:
    """Writes what an individual changes of the base; atomic. Raises ValueError where there is no such form."""


@dataclasses.dataclass(frozen=True)
class RunContext:
  """What every stage needs.

  Attributes:
    files: of the run directory.
    console: where progress goes.
    problem: what is scored.
    root: the space in which base and experts were read; of what plain merges are made.
    history: where everything is recorded.
    interrupt: whether somebody asked to stop; stages look at it where nothing would be lost.
    output: what the run leaves behind.
    seed: of everything random.
    budget: children that each method may score.
    swarm_sizes: for how many members to report what they solve together.
    expert_names: E, as rows of the table name them.
    writer: how models are written.
    parents: the base and the experts for model cards, by name.
    mesh: the devices; None: one.
    unit: what a score is, in words.
    clock: counts the scoring.
  """

  files: RunFiles
  console: Console
  problem: Problem
  root: Space
  history: History
  interrupt: Interrupt
  output: OutputSettings
  seed: int
  budget: int
  swarm_sizes: tuple[int, ...]
  expert_names: tuple[str, ...]
  writer: ModelWriter
  parents: Mapping[str, Any]
  mesh: Mesh | None = None
  unit: str = "share of questions answered right"
  clock: Clock = dataclasses.field(default_factory=Clock)
  kept: dict[int, str] = dataclasses.field(default_factory=dict)

  @functools.cached_property
  def scorer(self) -> Scorer:
    """Scores individuals, each once."""
    return Scorer(self.problem, self.history, self.clock)

  @functools.cached_property
  def teachers(self) -> RunTeachers:
    """Whose answers gradients follow."""
    return RunTeachers(self.problem, self.root, self.scorer, self.history, self.console, self.interrupt.check)

  @property
  def task_names(self) -> tuple[str, ...]:
    """The K names."""
    return tuple(self.problem.task_names)

  def keep_basis(self, rank: int, make: Callable[[], CoreBasis]) -> CoreBasis:
    """The basis of a rank that this run keeps; the first that is asked for has the plain name."""
    name = self.kept.setdefault(rank, BASIS if not self.kept else f"basis-rank-{rank}.safetensors")
    return keep_basis(self.files.path / name, self.root.base, make)


def keep_basis(file: Path, base: Params, make: Callable[[], CoreBasis]) -> CoreBasis:
  """The basis that a file keeps; made, and kept there, if there is none: genotypes mean nothing without it.

  Raises:
    ValueError: naming the file, if it is damaged.
  """
  if file.is_file():
    return load_basis(file, base)
  basis = make()
  save_basis(file, basis)
  return basis


def check_names(methods: Sequence[Method]) -> None:
  """Raises ValueError unless all methods can be told apart, in tables and as folders."""
  seen: dict[str, str] = {}
  for method in methods:
    if method.slug in seen:
      raise ValueError(f"methods: two are named {method.name!r} ({seen[method.slug]!r}); give one another `name`")
    seen[method.slug] = method.name
