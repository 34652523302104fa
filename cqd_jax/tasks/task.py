"""What a task is, and how the answers of a whole population are graded at once.

A task says what to ask, how to execute an answer, and whether what came back is right. To bring your own, write a
class with these five members; it need not inherit from anything:

```python
class Doubling:
  name = "doubling"
  harness = Harness("doubling", "run = eval")

  def examples(self, split):
    numbers = {"train": range(0, 50), "validation": range(50, 60), "test": range(60, 90)}[split]
    return [Example(f"twice {n}", f"2*{n}", expected=2 * n) for n in numbers]

  def job(self, example, answer):
    return Job("doubling", answer)

  def passed(self, example, outcome):
    return outcome.status == "ok" and type(outcome.value) is int and outcome.value == example.expected
```

The answer is text that a model wrote, so it is executed only by the harness, inside a sandbox, and the verdict is
formed by `passed`, outside, from plain JSON that has to be distrusted: compare it with something that never entered
the sandbox, and mind that `True == 1 == 1.0` in Python. Keep the payload of `job` free of what only the example
knows where you can: equal payloads are executed once.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal, Protocol, TypeAlias, runtime_checkable

import numpy as np
from jaxtyping import Bool

from cqd_jax.tasks.execution import JSON, Execute, Harness, Job, Outcome, Service, execute_distinct

Split: TypeAlias = Literal["train", "validation", "test"]

AskedSplit: TypeAlias = Literal["train", "validation", "test", "labels"]
"""Of a problem: "labels" are the questions of the training split whose verified answers are learned from."""


@dataclasses.dataclass(frozen=True)
class Example:
  """One question.

  Attributes:
    prompt: what the model is asked.
    answer: a right answer ("gold"), as it is to be learnt.
    expected: what else grading needs; stays outside the sandbox unless the task's `job` hands it over.
  """

  prompt: str
  answer: str
  expected: JSON = dataclasses.field(default=None, hash=False)


@runtime_checkable
class Task(Protocol):
  """A skill with questions and executable answers; K of these make a suite. See the module's docstring."""

  @property
  def name(self) -> str:
    """Unique in a suite; the name of the task's score."""

  @property
  def harness(self) -> Harness | Service:
    """What executes an answer; the sandbox must have been started with it."""

  def examples(self, split: Split) -> Sequence[Example]:
    """The questions of a split, the same at every call; no meaning is in two splits."""

  def job(self, example: Example, answer: str) -> Job:
    """What to execute for this answer."""

  def passed(self, example: Example, outcome: Outcome) -> bool:
    """Whether the answer was right. Never raises, whatever JSON the outcome holds."""


def grade(task: Task, examples: Sequence[Example], answers: Sequence[str], execute: Execute) -> Bool[np.ndarray, " B"]:
  """Executes one answer per example and returns which were right, `[B]` bool.

  Raises:
    ValueError: if there are not as many answers as examples.
  """
  return grade_population([task], [examples], [[answers]], execute)[0, 0]


def grade_population(
  tasks: Sequence[Task],
  examples: Sequence[Sequence[Example]],
  answers: Sequence[Sequence[Sequence[str]]],
  execute: Execute,
) -> Bool[np.ndarray, "P K B"]:
  """Grades the answers of P candidates to B questions of each of K tasks in one call of `execute`.

  One call keeps every worker busy to the end, and a job that several candidates or questions share is executed once.

  Args:
    tasks: K tasks.
    examples: `[K][B]` questions.
    answers: `[P][K][B]` answers.
    execute: e.g. the `run` of a sandbox that was started with the harness of every task.

  Returns:
    Which answers were right, `[P, K, B]` bool.

  Raises:
    ValueError: if the nesting is not `[K][B]` and `[P][K][B]`, or `execute` returns too few or too many outcomes.
  """
  num_questions = _check_nesting(tasks, examples, answers)
  questions = [
    (task, example, task.job(example, answer))
    for candidate in answers
    for task, asked, given in zip(tasks, examples, candidate, strict=True)
    for example, answer in zip(asked, given, strict=True)
  ]
  outcomes = execute_distinct([job for _, _, job in questions], execute)
  verdicts = [task.passed(example, outcome) for (task, example, _), outcome in zip(questions, outcomes, strict=True)]
  return np.array(verdicts, dtype=bool).reshape(len(answers), len(tasks), num_questions)


def _check_nesting(
  tasks: Sequence[Task],
  examples: Sequence[Sequence[Example]],
  answers: Sequence[Sequence[Sequence[str]]],
) -> int:
  """Returns B, or raises a `ValueError` that names what does not fit."""
  if len(examples) != len(tasks):
    raise ValueError(f"examples: expected one list for each of {len(tasks)} tasks, got {len(examples)}")
  num_questions = len(examples[0]) if examples else 0
  for task, asked in zip(tasks, examples, strict=True):
    if len(asked) != num_questions:
      raise ValueError(f"examples: expected {num_questions} of every task, got {len(asked)} of {task.name}")
  for p, candidate in enumerate(answers):
    if len(candidate) != len(tasks):
      raise ValueError(f"answers[{p}]: expected one list for each of {len(tasks)} tasks, got {len(candidate)}")
    for task, given in zip(tasks, candidate, strict=True):
      if len(given) != num_questions:
        raise ValueError(f"answers[{p}]: expected {num_questions} answers to {task.name}, got {len(given)}")
  return num_questions
