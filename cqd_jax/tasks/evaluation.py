"""Scores models on a suite of tasks: a population of params to texts, texts to verdicts."""

import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from jaxtyping import Bool

from cqd_jax.checks import check_population
from cqd_jax.low_rank import partition_shared
from cqd_jax.models import DecoderConfig, bucket_prompts, decode_population
from cqd_jax.tasks.execution import Execute
from cqd_jax.tasks.task import Example, Split, Task, grade_population
from cqd_jax.types import Params

Answers = list[list[list[str]]]
"""Texts `[P][K][B]`."""


class Evaluation:
  """The questions of one split of K tasks, put to whole populations.

  Args:
    tasks: K tasks, with equally many questions in the split.
    split: "validation" or "test" (or "train").
    encode: a question's text to the token ids with which a model is asked.
    decode: the token ids of an answer, without the end token, to its text.
    config: of the models.
    execute: runs the answers, as a rule a sandbox.
    max_new_tokens: most tokens an answer may have.
    end_ids: tokens of which each ends an answer.
    pad_id: token that fills rows.
    group_size: how many candidates are decoded together (fewer where that does not divide P).
    num_buckets: into how many buckets of like length the prompts are parted; see `bucket_prompts`.
  """

  def __init__(
    self,
    tasks: Sequence[Task],
    split: Split,
    *,
    encode: Callable[[str], list[int]],
    decode: Callable[[Iterable[int]], str],
    config: DecoderConfig,
    execute: Execute,
    max_new_tokens: int,
    end_ids: Sequence[int],
    pad_id: int,
    group_size: int = 1,
    num_buckets: int = 1,
  ):
    self.tasks = tuple(tasks)
    self.split = split
    self.examples: list[list[Example]] = [list(task.examples(split)) for task in tasks]
    self._decode_text = decode
    self._execute = execute
    self._config = config
    self._max_new_tokens = max_new_tokens
    self._end_ids = tuple(end_ids)
    self._pad_id = pad_id
    self._group_size = group_size
    prompts = [encode(example.prompt) for asked in self.examples for example in asked]
    self._buckets = bucket_prompts(prompts, num_buckets=num_buckets, pad_id=pad_id)

  @property
  def task_names(self) -> list[str]:
    """The K names."""
    return [task.name for task in self.tasks]

  def answer(self, population: Params) -> Answers:
    """Decodes all questions greedily with each of P models; params as of `decode_population`."""
    size = check_population(partition_shared(population)[0], "population")
    tokens, lengths = decode_population(
      population,
      self._config,
      self._buckets,
      max_new_tokens=self._max_new_tokens,
      end_ids=self._end_ids,
      pad_id=self._pad_id,
      group_size=math.gcd(size, self._group_size),
    )
    texts = [
      [self._decode_text(row[:length]) for row, length in zip(rows, ends, strict=True)]
      for rows, ends in zip(np.asarray(tokens).tolist(), np.asarray(lengths).tolist(), strict=True)
    ]
    return [self._by_task(candidate) for candidate in texts]

  def grade(self, answers: Answers) -> Bool[np.ndarray, "P K B"]:
    """Executes and judges answers `[P][K][B]`; equal answers are executed once."""
    return grade_population(self.tasks, self.examples, answers, self._execute)

  def __call__(self, population: Params) -> Bool[np.ndarray, "P K B"]:
    """Which questions each of P models answers right."""
    return self.grade(self.answer(population))

  def _by_task(self, texts: list[str]) -> list[list[str]]:
    remaining = iter(texts)
    return [[next(remaining) for _ in asked] for asked in self.examples]
