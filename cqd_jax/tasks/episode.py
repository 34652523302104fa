"""A text task of one or more turns; a question with one answer is the case `max_turns` = 1.

An episode is stateless: all that was said so far is handed to it each time, and what executes answers replays them. So
any number of dialogues advance side by side, and a lost one can be played again. To bring your own, write a class with
these members; it need not inherit from anything (a task with one answer is shorter: `cqd_jax.tasks.task`):

```python
class Guessing:
  name = "guessing"
  harness = Harness("guessing", "run = eval")
  max_turns = 3

  def examples(self, split):
    numbers = {"train": range(0, 50), "validation": range(50, 60), "test": range(60, 90)}[split]
    return [Example("guess my number", str(n), expected=n) for n in numbers]

  def opening(self, example):
    return (Message("user", example.prompt),)

  def job(self, example, answers):
    return Job("guessing", answers[-1])  # None: nothing to execute

  def reply(self, example, answers, outcome):
    if outcome.value == example.expected:
      return 1.0  # a number ends the dialogue: it is the score
    if len(answers) == self.max_turns:
      return 0.0
    return Message("user", "no, guess again")  # a message goes on with it
```
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

from cqd_jax.genotypes.space import Candidates
from cqd_jax.tasks.execution import Harness, Job, Outcome, Service
from cqd_jax.tasks.problem import TrainingSignal
from cqd_jax.tasks.task import Example, Split, Task


class Message(NamedTuple):
  """A turn of a dialogue; `role` is "system", "user" or "assistant"."""

  role: str
  content: str


class Request(NamedTuple):
  """What an engine is asked to continue.

  Attributes:
    messages: the dialogue so far; the last one is not the assistant's.
    max_new_tokens: tokens that the answer may have.
    choices: where there are any, the answer is one of these, and the engine says how likely each is.
  """

  messages: tuple[Message, ...]
  max_new_tokens: int
  choices: tuple[str, ...] = ()


class Answer(NamedTuple):
  """What became of a request.

  Attributes:
    text: of the answer; "" where there is none.
    prompt_tokens: that the dialogue so far has.
    answer_tokens: that were decoded, the end included.
    refused: why there is no answer, as where the dialogue is longer than the model's context; "" where there is one.
  """

  text: str
  prompt_tokens: int = 0
  answer_tokens: int = 0
  refused: str = ""


class Likelihoods(NamedTuple):
  """How likely an engine finds the choices of a request.

  Attributes:
    values: for each choice the logarithm of its likelihood after the dialogue so far; () where they are refused.
    prompt_tokens: that were read, the dialogue for each choice.
    refused: as in `Answer`.
  """

  values: tuple[float, ...]
  prompt_tokens: int = 0
  refused: str = ""


@runtime_checkable
class Episode(Protocol):
  """A skill with dialogues and executable answers; K of these make a problem. See the module's docstring.

  Optional: `max_new_tokens`, where answers may be shorter or longer than the experiment's setting says; `action`, see
  `Acting`; `choices` and `choose`, see `Choosing`.
  """

  name: str
  max_turns: int

  @property
  def harness(self) -> Harness | Service | None:
    """What executes answers; None: nothing has to be executed."""

  def examples(self, split: Split) -> Sequence[Example]:
    """The samples of a split, the same at every call; no meaning is in two splits."""

  def opening(self, example: Example) -> tuple[Message, ...]:
    """With what the dialogue begins."""

  def job(self, example: Example, answers: Sequence[str]) -> Job | None:
    """What to execute after the latest of all answers so far; None: nothing, `reply` gets an empty outcome."""

  def reply(self, example: Example, answers: Sequence[str], outcome: Outcome) -> Message | float:
    """The next observation, or the score, which ends the dialogue. Never raises, whatever JSON the outcome holds."""


@runtime_checkable
class FromData(Protocol):
  """A task or episode whose samples come from a file; answers to them that were made elsewhere can be graded."""

  def samples(self) -> Sequence[Example]:
    """All samples of the file in its order, whatever the splits: the index of an answer is a place in it."""


@runtime_checkable
class Acting(Protocol):
  """An episode that can say what it executes, for a person who reads a dialogue."""

  def action(self, example: Example, answers: Sequence[str]) -> str:
    """What of the latest of all answers so far is executed, e.g. a statement; "" for nothing."""


@runtime_checkable
class Choosing(Protocol):
  """An episode whose answers are chosen among texts by how likely they are, which no model has to be asked to write."""

  def choices(self, example: Example) -> Sequence[str]:
    """The texts, at least one."""

  def choose(self, example: Example, likelihoods: Sequence[float]) -> str:
    """The answer, from the logarithms of their likelihoods."""


@runtime_checkable
class Engine(Protocol):
  """Answers requests with each of P individuals. One engine serves all tasks of a problem.

  Optional: `check()`, which raises where it could not serve; `respond`, see `CountingEngine`;
  `likelihoods`, see `ChoosingEngine`.
  """

  fingerprint: str
  """All that an answer depends on beside weights and request: tokenizer, chat template, sampling."""

  def generate(self, individuals: Candidates, requests: Sequence[Sequence[Request]]) -> list[list[str]]:
    """The answers.

    Args:
      individuals: P of them.
      requests: `[P][R_p]`; candidates may be asked different things, and different numbers of them.

    Returns:
      Texts `[P][R_p]`.
    """


@runtime_checkable
class CountingEngine(Protocol):
  """An engine that counts its tokens, and that may refuse a request without failing the others."""

  def respond(self, individuals: Candidates, requests: Sequence[Sequence[Request]]) -> list[list[Answer]]:
    """As `Engine.generate`, with all that is known of each answer."""


@runtime_checkable
class ChoosingEngine(Protocol):
  """An engine that can say how likely a text is."""

  def likelihoods(self, individuals: Candidates, requests: Sequence[Sequence[Request]]) -> list[list[Likelihoods]]:
    """Of the choices of requests `[P][R_p]`."""


@runtime_checkable
class TrainableEngine(Protocol):
  """An engine that can be differentiated: it knows the model behind the answers."""

  def training_signal(self, dialogues: Sequence[Sequence[tuple[Message, ...]]]) -> TrainingSignal:
    """To learn the assistant's turns of K lists of dialogues, none of them empty."""


class OneTurn:
  """A `Task` as an episode of one turn."""

  max_turns = 1

  def __init__(self, task: Task):
    self.task = task
    self.name = task.name
    self.harness = task.harness
    if hasattr(task, "max_new_tokens"):
      self.max_new_tokens = task.max_new_tokens

  def examples(self, split: Split) -> Sequence[Example]:
    """The task's."""
    return self.task.examples(split)

  def opening(self, example: Example) -> tuple[Message, ...]:
    """The question."""
    return (Message("user", example.prompt),)

  def job(self, example: Example, answers: Sequence[str]) -> Job:
    """The task's job for the one answer."""
    return self.task.job(example, answers[0])

  def action(self, example: Example, answers: Sequence[str]) -> str:
    """What of the answer is executed, where the task has an `action(example, answer)` that says so."""
    said = getattr(self.task, "action", None)
    return said(example, answers[0]) if said else ""

  def reply(self, example: Example, answers: Sequence[str], outcome: Outcome) -> float:
    """1 for a right answer, else 0."""
    del answers
    return float(self.task.passed(example, outcome))


def as_episode(task: Task | Episode) -> Episode:
  """A task as an episode; an episode as it is."""
  return task if isinstance(task, Episode) else OneTurn(task)
