"""What the stages of an experiment share: the questions, the models, where scores are kept, and what a method gives."""

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
from jaxtyping import Bool
from rich.console import Console

from cqd_jax.config.settings import ExperimentSettings, check_settings
from cqd_jax.hub.load import open_pretrained
from cqd_jax.run.space import MergeSpace
from cqd_jax.run.text_interface import TextInterface, interface_of, miniature_interface
from cqd_jax.sandbox.sandbox import Sandbox
from cqd_jax.store.history import History, Scored
from cqd_jax.tasks.evaluation import Evaluation
from cqd_jax.tasks.lookup import make_tasks
from cqd_jax.tasks.task import Split, Task
from cqd_jax.terminal.interrupt import Interrupt
from cqd_jax.trees import fingerprint
from cqd_jax.types import Genotype, Params

Passed = Bool[np.ndarray, "N K B"]


@dataclasses.dataclass(frozen=True)
class Suite:
  """The tasks of an experiment, and the two splits that score models on them.

  Attributes:
    tasks: K tasks.
    language: of the models that are asked.
    validation: scores candidates while searching.
    test: scores what is reported.
  """

  tasks: tuple[Task, ...]
  language: TextInterface
  validation: Evaluation
  test: Evaluation


@contextlib.contextmanager
def open_suite(settings: ExperimentSettings) -> Iterator[Suite]:
  """The suite that the settings describe, with a sandbox that executes answers while the block runs.

  Raises:
    ValueError: naming the setting or the folder that cannot be used.
    SandboxUnavailable: where nothing isolates answers and `settings.unsafe` is not set.
  """
  tasks = tasks_of(settings)
  check_settings(settings, len(tasks))
  check_questions(tasks)
  language = miniature_interface() if settings.base is None else interface_of(open_pretrained(settings.base))
  workers = settings.workers or os.cpu_count() or 1
  with Sandbox([task.harness for task in tasks], workers=workers, unsafe=settings.unsafe) as sandbox:

    def evaluation(split: Split) -> Evaluation:
      return Evaluation(
        tasks,
        split,
        encode=language.encode,
        decode=language.decode,
        config=language.config,
        execute=sandbox.run,
        max_new_tokens=settings.max_new_tokens,
        end_ids=language.end_ids,
        pad_id=language.pad_id,
        group_size=settings.candidates_per_batch,
        num_buckets=settings.prompt_buckets,
      )

    yield Suite(tasks, language, evaluation("validation"), evaluation("test"))


def tasks_of(settings: ExperimentSettings) -> tuple[Task, ...]:
  """The tasks that the settings name.

  Raises:
    ValueError: naming the one that cannot be made.
  """
  own = settings.tasks
  sizes: dict[Split, int] = {"train": own.train, "validation": own.validation, "test": own.test}
  return make_tasks(own.names, sizes=sizes, seed=settings.seed)


def check_questions(tasks: Sequence[Task]) -> None:
  """Raises unless all tasks have equally many questions, and some, in the splits that are asked."""
  splits: tuple[Split, ...] = ("validation", "test")
  for split in splits:
    counts = {task.name: len(task.examples(split)) for task in tasks}
    if len(set(counts.values())) > 1 or not min(counts.values()):
      raise ValueError(f"tasks: expected as many questions of each task in {split}, and some, got {counts}")


@dataclasses.dataclass
class Clock:
  """Where the time of scoring goes.

  Attributes:
    candidates: models scored.
    answers: answers graded.
    decode_s: seconds of decoding, from params to texts.
    grade_s: seconds of executing and judging.
    record_s: seconds of writing history, checkpoints and metrics, as far as evolution waits for it.
  """

  candidates: int = 0
  answers: int = 0
  decode_s: float = 0.0
  grade_s: float = 0.0
  record_s: float = 0.0

  @contextlib.contextmanager
  def recording(self) -> Iterator[None]:
    """Counts a block as recording."""
    started = time.perf_counter()
    yield
    self.record_s += time.perf_counter() - started


@dataclasses.dataclass(frozen=True)
class RunContext:
  """What every stage needs.

  Attributes:
    settings: of the experiment.
    console: where progress goes.
    merges: base and experts, and what merges of them are.
    suite: scores models.
    history: where scores are kept.
    interrupt: whether somebody asked to stop; stages look at it where nothing would be lost.
    clock: counts the scoring.
  """

  settings: ExperimentSettings
  console: Console
  merges: MergeSpace
  suite: Suite
  history: History
  interrupt: Interrupt
  clock: Clock = dataclasses.field(default_factory=Clock)

  @property
  def task_names(self) -> list[str]:
    """The K names."""
    return self.suite.validation.task_names

  def score(
    self, evaluation: Evaluation, population: Genotype, models: Callable[[Genotype], Params] | None = None
  ) -> Scored:
    """Which questions each of P individuals (leaves `[P, ...]`) answers right.

    A population that was scored once is remembered, by its bits, also by the next process of a resumed run.

    Args:
      evaluation: the questions.
      population: genotypes.
      models: `Space.models`; None: they are of the merge space.
    """
    name = np.asarray(fingerprint(population)).tobytes().hex()
    if (known := self.history.recall(evaluation.split, name)) is not None:
      return known
    started = time.perf_counter()
    answers = evaluation.answer((models or self.merges.models)(population))
    decoded = time.perf_counter()
    passed = evaluation.grade(answers)
    graded = time.perf_counter()
    self.clock.candidates += len(passed)
    self.clock.answers += passed.size
    self.clock.decode_s += decoded - started
    self.clock.grade_s += graded - decoded
    scored = Scored(passed, graded - started)
    with self.clock.recording():
      self.history.remember(evaluation.split, name, scored)
    return scored


@dataclasses.dataclass(frozen=True)
class Method:
  """A way to get a model, and what it gave.

  Attributes:
    name: as shown in the table.
    model: its one best model, an individual of the merge space, leaves `[...]`; None if it is a swarm alone.
    evaluations: candidates that it scored on validation.
    members: a member, likewise, by its index into `passed`; None if the method has no population.
    passed: `[N, K, B]` validation questions that each of its candidates answers right.
    chosen: settings that the method chose on validation, by name.
  """

  name: str
  model: Genotype | None
  evaluations: int
  members: Callable[[int], Genotype] | None = None
  passed: Passed | None = None
  chosen: dict[str, float] = dataclasses.field(default_factory=dict)


def individual(population: Genotype, index: int) -> Genotype:
  """One individual of a population."""
  return jax.tree.map(lambda leaf: leaf[index], population)


def population_of_one(genotype: Genotype) -> Genotype:
  """An individual with a leading population axis."""
  return jax.tree.map(lambda leaf: leaf[None], genotype)
