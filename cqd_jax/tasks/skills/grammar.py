"""From a grammar of meanings to a task with disjoint splits."""

import dataclasses
import hashlib
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Generic, TypeVar, get_args

from cqd_jax.tasks.execution import JSON, Harness, Job, Outcome
from cqd_jax.tasks.task import Example, Split

T = TypeVar("T")
M = TypeVar("M")

SIZES: Mapping[Split, int] = {"train": 3000, "validation": 100, "test": 300}
"""Examples per split, unless stated otherwise."""

ATTEMPTS, PATIENCE = 200, 50_000
"""Draws for every example that is wanted, and draws without a new one, after which a grammar counts as exhausted."""


def pick(rng: random.Random, options: Sequence[T]) -> T:
  """One of `options`, the same in every version of Python: only `random()` is promised to stay as it is."""
  return options[int(rng.random() * len(options))]


@dataclasses.dataclass(frozen=True)
class Grammar(Generic[M]):
  """How meanings are drawn, said, written down and evaluated.

  Attributes:
    draw: a random meaning.
    prompt: a meaning in English, in one of several wordings.
    answer: the meaning's normal form in the task's language: different meanings have different answers.
    given: what the harness returns for the answer, worked out without the sandbox.
    expected: what grading needs to know; None for a question that is not worth asking.
    near_misses: meanings that a careless reader might take this one for. What a near miss answers too is never asked
      for, since the wrong answer would pass.
  """

  draw: Callable[[random.Random], M]
  prompt: Callable[[M, random.Random], str]
  answer: Callable[[M], str]
  given: Callable[[M], JSON]
  expected: Callable[[M], JSON]
  near_misses: Callable[[M], Iterable[M]]


@dataclasses.dataclass(frozen=True)
class Skill(Generic[M]):
  """A miniature `Task` whose job is only the answer's text, so that equal answers are executed once.

  Attributes:
    name: of the task.
    harness: of the task; its setup holds all the data, equal for all examples.
    grammar: of the examples.
    verdict: whether an untrusted value is the expected one, `verdict(expected, value)`.
    sizes: examples per split.
    seed: which examples are drawn. The split of a meaning does not depend on it.
  """

  name: str
  harness: Harness
  grammar: Grammar[M]
  verdict: Callable[[JSON, JSON], bool]
  sizes: Mapping[Split, int] = dataclasses.field(default_factory=lambda: dict(SIZES))
  seed: int = 0
  _drawn: dict[Split, tuple[Example, ...]] = dataclasses.field(
    default_factory=dict, init=False, repr=False, compare=False
  )

  def __post_init__(self) -> None:
    for split in get_args(Split):
      if self.sizes.get(split, -1) < 0:
        raise ValueError(f"sizes: expected a number >= 0 for {split!r}, got {dict(self.sizes)}")

  def examples(self, split: Split) -> tuple[Example, ...]:
    """The examples of a split; in validation and test each has a meaning of its own."""
    if split not in self._drawn:
      self._drawn[split] = tuple(self._draw(split))
    return self._drawn[split]

  def job(self, example: Example, answer: str) -> Job:
    """The answer's text, whatever the example."""
    del example
    return Job(self.harness.name, answer)

  def passed(self, example: Example, outcome: Outcome) -> bool:
    """Whether the harness returned, and returned what was expected."""
    return outcome.status == "ok" and self.verdict(example.expected, outcome.value)

  def _draw(self, split: Split) -> list[Example]:
    rng = random.Random(f"{self.name} {split} {self.seed}")
    grammar, size = self.grammar, self.sizes[split]
    expected: dict[str, JSON] = {}  # by answer; None where a near miss would pass
    examples: dict[str, Example] = {}  # by what may not be repeated
    last = 0
    for attempt in range(size * ATTEMPTS):
      if len(examples) == size or attempt - last > PATIENCE:
        break
      meaning = grammar.draw(rng)
      answer = grammar.answer(meaning)
      if split_of(self.name, answer) != split:
        continue
      prompt = grammar.prompt(meaning, rng)
      if (unique := prompt if split == "train" else answer) in examples:
        continue
      if answer not in expected:
        expected[answer] = self._expected_if_sharp(meaning)
      if expected[answer] is not None:
        examples[unique] = Example(prompt, answer, expected[answer])
        last = attempt
    if len(examples) < size:
      raise ValueError(f"sizes[{split!r}]: expected at most the {len(examples)} examples of {self.name}, got {size}")
    return list(examples.values())

  def _expected_if_sharp(self, meaning: M) -> JSON:
    """What grading the meaning needs; None where it is not worth asking, or a near miss would pass."""
    expected = self.grammar.expected(meaning)
    if expected is None:
      return None
    near_misses = map(self.grammar.given, self.grammar.near_misses(meaning))
    return None if any(self.verdict(expected, value) for value in near_misses) else expected


def split_of(task: str, answer: str) -> Split:
  """The split of the meaning whose normal form is `answer`: 70% train, 10% validation, 20% test.

  By a hash of the meaning and not of its wording, so that no meaning is in two splits, whatever the seed.
  """
  digest = hashlib.blake2b(f"{task}: {answer}".encode(), digest_size=8).digest()
  share = int.from_bytes(digest, "big") / 2**64
  return "train" if share < 0.7 else "validation" if share < 0.8 else "test"
