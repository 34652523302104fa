"""Problems of text: episodes played by an engine, their answers executed, all candidates and tasks round by round."""

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from cqd_jax.genotypes.space import Candidates, Space, population_of_one, population_size
from cqd_jax.tasks.dialogue import Dialogue, advance_dialogues, ask, transcripts_of, usage_of
from cqd_jax.tasks.episode import (
  Answer,
  Choosing,
  ChoosingEngine,
  Engine,
  Episode,
  Message,
  TrainableEngine,
  as_episode,
)
from cqd_jax.tasks.execution import Execute, Harness, Service
from cqd_jax.tasks.problem import Sample, Scored, TrainingSignal, Transcript, Verified
from cqd_jax.tasks.source import source_digest
from cqd_jax.tasks.task import AskedSplit, Example, Split, Task
from cqd_jax.types import Genotype


class TextProblem:
  """K tasks for language models; see `cqd_jax.tasks.task` and `cqd_jax.tasks.episode` for what a task is.

  In each round all open dialogues of all candidates and tasks go to the engine in one call, and their answers to the
  sandbox in one; equal answers are executed once.

  Args:
    tasks: K tasks or episodes. They may have different numbers of samples.
    engine: produces the answers.
    execute: runs them, as a rule a sandbox that starts when it is needed.
    max_new_tokens: most tokens that an answer may have, where an episode does not say so itself.
    transcripts: by split, how many dialogues of each task come with the scores of an individual, to be kept.
    num_labels: how many training questions of each task are the split "labels".

  Attributes:
    decode_seconds: spent in the engine so far.
    decoded_tokens: of all answers so far; 0 where the engine does not count.
    grade_seconds: spent in executing and judging so far.

  Raises:
    ValueError: naming the task: a name twice, or two harnesses of one name that differ; that the engine cannot serve.
  """

  def __init__(
    self,
    tasks: Sequence[Task | Episode],
    engine: Engine,
    execute: Execute,
    *,
    max_new_tokens: int,
    num_labels: int = 200,
    transcripts: Mapping[AskedSplit, int] | None = None,
  ):
    self.episodes = tuple(as_episode(task) for task in tasks)
    self.task_names = tuple(episode.name for episode in self.episodes)
    if len(set(self.task_names)) != len(self.task_names):
      raise ValueError(f"tasks: expected names that differ, got {', '.join(self.task_names)}")
    harnesses_of(tasks)
    choosing = [episode.name for episode in self.episodes if isinstance(episode, Choosing)]
    if choosing and not isinstance(engine, ChoosingEngine):
      raise ValueError(
        f"engine: {type(engine).__name__} cannot say how likely a text is, by which {choosing[0]} chooses its answers; "
        "expected one as `local`"
      )
    self.engine = engine
    self._execute = execute
    self._max_new_tokens = max_new_tokens
    self._num_labels = num_labels
    self._num_transcripts = dict(transcripts or {})
    self._examples: dict[AskedSplit, list[list[Example]]] = {}
    self._fingerprints: dict[AskedSplit, str] = {}
    self.decode_seconds = self.grade_seconds = 0.0
    self.decoded_tokens = 0

  def examples(self, split: AskedSplit) -> list[list[Example]]:
    """The samples of each task."""
    if split not in self._examples:
      if split == "labels":
        self._examples[split] = [asked[: self._num_labels] for asked in self.examples("train")]
      else:
        own: Split = split
        self._examples[split] = [list(episode.examples(own)) for episode in self.episodes]
    return self._examples[split]

  def fingerprint(self, split: AskedSplit) -> str:
    """For each task its samples, grader and harness; and what decoding depends on."""
    if split not in self._fingerprints:
      parts = [
        f"{_word(episode.name)}={_digest_of(episode, asked)}"
        for episode, asked in zip(self.episodes, self.examples(split), strict=True)
      ]
      decoding = f"decoding={self.engine.fingerprint}-{self._max_new_tokens}"
      self._fingerprints[split] = " ".join([*parts, decoding])
    return self._fingerprints[split]

  def score(self, split: AskedSplit, individuals: Genotype, space: Space) -> Scored:
    """See `Problem`; plays every dialogue to its end."""
    started = time.perf_counter()
    dialogues = self.play(split, individuals, space)
    asked = self.examples(split)
    values = np.full((len(dialogues), len(asked), max(map(len, asked), default=0)), np.nan, np.float32)
    for p, by_task in enumerate(dialogues):
      for k, own in enumerate(by_task):
        values[p, k, : len(own)] = [dialogue.score for dialogue in own]
    count = self._num_transcripts.get(split, 0)
    return Scored(
      values,
      time.perf_counter() - started,
      verified=[_passed(by_task) for by_task in dialogues],
      usage=[usage_of(by_task) for by_task in dialogues],
      transcripts=[transcripts_of(by_task, count) for by_task in dialogues] if count else (),
    )

  def samples(self, split: AskedSplit, individual: Genotype, space: Space, count: int) -> Sequence[Sample]:
    """Some samples of each task: first some that the individual fails, then some that it solves."""
    (by_task,) = self.play(split, population_of_one(individual), space)
    return [self._sample(split, transcript) for transcript in transcripts_of(by_task, count)]

  def shown(self, split: AskedSplit, transcripts: Sequence[Transcript], count: int) -> Sequence[Sample] | None:
    """See `Transcribed`."""
    enough = sum(min(count, len(asked)) for asked in self.examples(split))
    return [self._sample(split, each) for each in transcripts] if len(transcripts) == enough else None

  def _sample(self, split: AskedSplit, transcript: Transcript) -> Sample:
    example = self.examples(split)[transcript.task][transcript.sample]
    name, turns = self.task_names[transcript.task], transcript.turns
    said = [text for role, text in turns if role == "assistant"]
    answer = said[-1] if said else ""
    if [role for role, _ in turns] in (["user"], ["user", "assistant"]):
      turns = ()
    return Sample(name, example.prompt, example.answer, answer, transcript.score, turns=turns, reason=transcript.reason)

  def references(self, split: AskedSplit) -> list[Verified]:
    """See `Labeled`: the right answers that came with questions of one turn."""
    return [
      Verified(task, sample, (example.answer,))
      for task, (episode, asked) in enumerate(zip(self.episodes, self.examples(split), strict=True))
      for sample, example in enumerate(asked)
      if episode.max_turns == 1 and example.answer
    ]

  def training_signal(self, answers: Sequence[Verified]) -> TrainingSignal:
    """See `Trainable`; the engine has to know the model: each turn is learned after all that was said before it.

    Raises:
      ValueError: if the engine has no gradients, or a task has no answer to learn from.
    """
    if not isinstance(self.engine, TrainableEngine):
      raise ValueError(f"engine: {type(self.engine).__name__} has no gradients; expected one as `local`")
    dialogues: list[list[tuple[Message, ...]]] = [[] for _ in self.episodes]
    for answer in answers:
      dialogues[answer.task].append(self._replayed(answer))
    if empty := [name for name, own in zip(self.task_names, dialogues, strict=True) if not own]:
      raise ValueError(f"labels: no verified answer to any question of {empty[0]}; there is nothing to learn from")
    return self.engine.training_signal(dialogues)

  def _replayed(self, answer: Verified) -> tuple[Message, ...]:
    """A dialogue as it went, executed again where it has several turns."""
    episode, example = self.episodes[answer.task], self.examples("labels")[answer.task][answer.sample]
    dialogue = Dialogue(episode, example, tuple(episode.opening(example)), self._max_new_tokens)
    for turn in answer.turns:
      job = dialogue.take(Answer(turn))
      if len(dialogue.answers) < len(answer.turns):
        dialogue.hear(None if job is None else self._execute([job])[0])
    return dialogue.messages

  def play(self, split: AskedSplit, individuals: Genotype, space: Space) -> list[list[list[Dialogue]]]:
    """All dialogues of P individuals to their end: `[P][K][B_k]`."""
    # Candidates share the beginnings, so that whether all are asked the same is seen at a glance.
    begun = [
      [(episode, example, tuple(episode.opening(example)), self._max_new_tokens, choices(example)) for example in asked]
      for episode, asked in zip(self.episodes, self.examples(split), strict=True)
      for choices in [_choices_of(episode)]
    ]
    dialogues = [[[Dialogue(*each) for each in own] for own in begun] for _ in range(population_size(individuals))]
    candidates = Candidates(individuals, space)
    still_open = [[dialogue for own in by_task for dialogue in own] for by_task in dialogues]
    while any(still_open):
      self._round(candidates, still_open)
      still_open = [[dialogue for dialogue in own if dialogue.score is None] for own in still_open]
    return dialogues

  def _round(self, candidates: Candidates, still_open: Sequence[Sequence[Dialogue]]) -> None:
    """One answer to each open dialogue, and what comes of it."""
    started = time.perf_counter()
    answered = ask(self.engine, candidates, still_open)
    decoded = time.perf_counter()
    advance_dialogues(answered, self._execute)
    self.decode_seconds += decoded - started
    self.decoded_tokens += sum(answer.answer_tokens for _, answer in answered)
    self.grade_seconds += time.perf_counter() - decoded


def _choices_of(episode: Episode) -> Callable[[Example], tuple[str, ...]]:
  """Of an example the choices; () where answers are written."""
  if isinstance(episode, Choosing):
    return lambda example: tuple(episode.choices(example))
  return lambda example: ()


def _passed(by_task: Sequence[Sequence[Dialogue]]) -> list[Verified]:
  """The answers of one candidate that reached the full score."""
  return [
    Verified(task, sample, tuple(dialogue.answers))
    for task, own in enumerate(by_task)
    for sample, dialogue in enumerate(own)
    if dialogue.score is not None and dialogue.score >= 1
  ]


def harnesses_of(tasks: Sequence[Task | Episode]) -> list[Harness | Service]:
  """The harnesses and services of tasks, each once: two tasks may share one.

  Raises:
    ValueError: naming the tasks of which two different harnesses have one name.
  """
  found: dict[str, tuple[Harness | Service, str]] = {}
  for task in tasks:
    if task.harness is None:
      continue
    harness, owner = found.setdefault(task.harness.name, (task.harness, task.name))
    if harness != task.harness:
      raise ValueError(f"tasks: {owner} and {task.name} have different harnesses named {harness.name!r}")
  return [harness for harness, _ in found.values()]


def _digest_of(episode: Episode, asked: Sequence[Example]) -> str:
  """Of the samples, of what executes answers and of what judges them."""
  grader = getattr(episode, "task", episode)
  content: list[Any] = [
    [[example.prompt, example.answer, repr(example.expected)] for example in asked],
    _digested(episode.harness),
    getattr(episode, "max_new_tokens", None),
    source_digest(grader),
  ]
  return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def _digested(harness: Harness | Service | None) -> list[Any]:
  """What of it an outcome depends on."""
  if harness is None:
    return []
  if isinstance(harness, Service):
    return [harness.name, harness.fingerprint]
  return [harness.name, harness.source, repr(harness.setup), harness.cpu_seconds]


def _word(name: str) -> str:
  """A name as one word, for a fingerprint whose parts are told apart by spaces."""
  return "".join("_" if character.isspace() or character == "=" else character for character in name)
