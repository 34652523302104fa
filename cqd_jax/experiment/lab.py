"""What the stages of an experiment share: the models, the two splits that score them, and what a method gives."""

import dataclasses
import time
from collections.abc import Callable

import jax
import numpy as np
from jaxtyping import Bool
from rich.console import Console

from cqd_jax.config import ExperimentSettings
from cqd_jax.operators import apply_task_vector
from cqd_jax.tasks.evaluation import Evaluation
from cqd_jax.types import Genotype, Params

Passed = Bool[np.ndarray, "N K B"]


@dataclasses.dataclass
class Clock:
  """Where the time of scoring goes.

  Attributes:
    candidates: models scored.
    answers: answers graded.
    decode_s: seconds of decoding, from params to texts.
    grade_s: seconds of executing and judging.
  """

  candidates: int = 0
  answers: int = 0
  decode_s: float = 0.0
  grade_s: float = 0.0


@dataclasses.dataclass(frozen=True)
class Lab:
  """What every stage needs.

  Attributes:
    settings: of the experiment.
    console: where progress goes.
    base: params of the base model.
    experts: the experts' task vectors, leaves `[K, ...]`.
    validation: scores candidates while searching.
    test: scores what is reported.
    clock: counts the scoring.
  """

  settings: ExperimentSettings
  console: Console
  base: Params
  experts: Params
  validation: Evaluation
  test: Evaluation
  clock: Clock = dataclasses.field(default_factory=Clock)

  def score(self, evaluation: Evaluation, task_vectors: Genotype) -> Passed:
    """Which questions each of P task vectors (leaves `[P, ...]`) answers right, `[P, K, B]`."""
    started = time.perf_counter()
    answers = evaluation.answer(_materialise(self.base, task_vectors))
    decoded = time.perf_counter()
    passed = evaluation.grade(answers)
    self.clock.candidates += len(passed)
    self.clock.answers += passed.size
    self.clock.decode_s += decoded - started
    self.clock.grade_s += time.perf_counter() - decoded
    return passed


@dataclasses.dataclass(frozen=True)
class Method:
  """A way to get a model, and what it gave.

  Attributes:
    name: as shown in the table.
    model: task vector of its one best model, leaves `[...]`; None if it is a swarm alone.
    evaluations: candidates that it scored on validation.
    members: the task vector of a member, by its index into `passed`; None if the method has no population.
    passed: `[N, K, B]` validation questions that each of its candidates answers right.
    chosen: settings that the method chose on validation, by name.
  """

  name: str
  model: Params | None
  evaluations: int
  members: Callable[[int], Params] | None = None
  passed: Passed | None = None
  chosen: dict[str, float] = dataclasses.field(default_factory=dict)


def individual(population: Genotype, index: int) -> Params:
  """One individual of a population."""
  return jax.tree.map(lambda leaf: leaf[index], population)


def population_of_one(genotype: Params) -> Genotype:
  """An individual with a leading population axis."""
  return jax.tree.map(lambda leaf: leaf[None], genotype)


@jax.jit
def _materialise(base: Params, task_vectors: Genotype) -> Params:
  return jax.vmap(apply_task_vector, in_axes=(None, 0))(base, task_vectors)
