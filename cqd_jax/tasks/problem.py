"""What is scored: a `Problem` gives a float for each individual, task and sample, and knows itself by a fingerprint.

`TextProblem` puts questions to language models, `TracedProblem` is a function that JAX traces, of any pytree.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np

from cqd_jax.genotypes.space import Space
from cqd_jax.tasks.task import AskedSplit
from cqd_jax.types import Genotype, Params, PRNGKey


class Verified(NamedTuple):
  """An answer that passed: a label that cost nothing but an evaluation.

  Attributes:
    task: index of its task.
    sample: index of its question in the split.
    turns: what the model said, turn by turn.
  """

  task: int
  sample: int
  turns: tuple[str, ...]


class Usage(NamedTuple):
  """What the answers of one individual took.

  Attributes:
    turns: answers given; a dialogue may have several.
    prompt_tokens: that were read, each turn's dialogue so far whole; 0 where the engine does not count.
    answer_tokens: that were decoded; likewise.
  """

  turns: int
  prompt_tokens: int
  answer_tokens: int


class Transcript(NamedTuple):
  """A dialogue to be looked at.

  Attributes:
    task: index of its task.
    sample: index of its question in the split.
    turns: roles and texts. Beside "system", "user" and "assistant" there is "executed": what the episode says that it
      executed of the answer before, and how that ended where it did not end well.
    score: of the dialogue.
    reason: why it failed, where that is known; else "".
  """

  task: int
  sample: int
  turns: tuple[tuple[str, str], ...]
  score: float
  reason: str = ""


class Scored(NamedTuple):
  """How P individuals were scored.

  Attributes:
    values: float32 `[P, K, B]`: a verdict is 0 or 1, an IoU or a reward any number. NaN pads tasks that have fewer
      samples than others; a row whose evaluation failed is NaN whole.
    seconds: that it took.
    scores: `[P, K]` float32, filled in by `with_scores`; what archives and searches compare.
    verified: of each individual the answers that passed; () where there are none to keep.
    usage: of each individual; () where nothing is counted.
    transcripts: of each individual some dialogues; () where there are none to keep.
  """

  values: Any
  seconds: Any = 0.0
  scores: Any = None
  verified: Sequence[Sequence[Verified]] = ()
  usage: Sequence[Usage] = ()
  transcripts: Sequence[Sequence[Transcript]] = ()

  def with_scores(self) -> "Scored":
    """With `scores` as `task_scores` gives them, unless they are there."""
    return self if self.scores is not None else self._replace(scores=task_scores(self.values))


def task_scores(values: Any) -> Any:
  """The score of each task: the mean over the samples that are there, NaN where there is none.

  Args:
    values: `[..., K, B]`, NumPy (summed in float64) or JAX (in float32).

  Returns:
    `[..., K]`: float64 of a NumPy array, else float32.
  """
  if isinstance(values, np.ndarray):
    there = ~np.isnan(values)
    count, total = there.sum(axis=-1), np.where(there, values, 0).sum(axis=-1, dtype=np.float64)
    means: np.ndarray = np.divide(total, count, out=np.full(count.shape, np.nan), where=count > 0)
    return means
  known = ~jnp.isnan(values)
  count = known.sum(axis=-1)
  return jnp.where(count > 0, jnp.where(known, values, 0).sum(axis=-1) / jnp.maximum(count, 1), jnp.nan)


@dataclasses.dataclass(frozen=True)
class Sample:
  """One sample as a model answered it, to be looked at.

  Attributes:
    task: its name.
    prompt: what was asked.
    gold: a right answer; "" where there is none to show.
    answer: the model's.
    score: of it; 0 and 1 are shown as wrong and right.
    pictures: captions with images, uint8 `[H, W]` or `[H, W, 3]`.
    turns: roles and texts of a dialogue that is more than a question and an answer, as in `Transcript`; else ().
    reason: why it failed, where that is known; else "".
  """

  task: str
  prompt: str
  gold: str
  answer: str
  score: float
  pictures: tuple[tuple[str, Any], ...] = ()
  turns: tuple[tuple[str, str], ...] = ()
  reason: str = ""


@runtime_checkable
class Problem(Protocol):
  """What is scored. Individuals are genotypes of a space, since a served engine may want an adapter and not params."""

  task_names: tuple[str, ...]

  def fingerprint(self, split: AskedSplit) -> str:
    """Names all that a score depends on beside the individual: samples, grader, settings of decoding.

    Parts are told apart by spaces and named, as `"coding=1f3a decoding=77b0"`, so that what changed can be named.
    """

  def score(self, split: AskedSplit, individuals: Genotype, space: Space) -> Scored:
    """Scores P individuals, leaves `[P, ...]`, of a space that scores them (`Space.scored_in`)."""

  def samples(self, split: AskedSplit, individual: Genotype, space: Space, count: int) -> Sequence[Sample]:
    """Up to `count` samples of each task as one individual (leaves `[...]`) answers them; () if none can be shown."""


@runtime_checkable
class Transcribed(Protocol):
  """A problem whose dialogues are kept as it scores, so that none has to be played again to be shown."""

  def shown(self, split: AskedSplit, transcripts: Sequence[Transcript], count: int) -> Sequence[Sample] | None:
    """What `samples` gives, from the transcripts that are kept of an individual; None if they do not suffice."""


@runtime_checkable
class TracedScoring(Protocol):
  """A problem whose scoring JAX can trace, so that a search runs whole inside `jax.lax.scan`."""

  def traced_values(self, split: AskedSplit, individuals: Genotype, space: Space) -> Any:
    """`Scored.values` of P individuals, only by traceable operations."""


class TrainingSignal(NamedTuple):
  """What gradients follow. The functions are pure and traceable.

  Attributes:
    data: what batches are drawn from, a pytree of arrays.
    draw: `(key, data) -> batch`.
    loss: `(params, batch) -> losses [K]` float32 of ONE model, a loss for each task.
  """

  data: Any
  draw: Callable[[PRNGKey, Any], Any]
  loss: Callable[[Params, Any], Any]


@runtime_checkable
class Trainable(Protocol):
  """A problem with a differentiable training signal."""

  def training_signal(self, answers: Sequence[Verified]) -> TrainingSignal:
    """To learn these answers to questions of the split "labels"; a problem without answers has its own signal.

    Raises:
      ValueError: if there is nothing to learn from.
    """


@runtime_checkable
class Labeled(Protocol):
  """A problem whose answers are texts, some of them known to be right."""

  def references(self, split: AskedSplit) -> Sequence[Verified]:
    """The answers that came with the questions of a split."""


def changed_parts(before: str, now: str) -> list[str]:
  """The named parts in which two fingerprints differ."""
  return sorted({part.partition("=")[0] for part in set(before.split()) ^ set(now.split())})
