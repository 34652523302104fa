"""One sample of one candidate, played turn by turn; and what is kept of it to be looked at."""

import functools
from collections.abc import Sequence
from typing import Any, TypeVar

from cqd_jax.genotypes.space import Candidates
from cqd_jax.tasks.episode import (
  Acting,
  Answer,
  Choosing,
  ChoosingEngine,
  CountingEngine,
  Engine,
  Episode,
  Likelihoods,
  Message,
  Request,
)
from cqd_jax.tasks.execution import Execute, Job, Outcome, execute_distinct
from cqd_jax.tasks.problem import Transcript, Usage
from cqd_jax.tasks.task import Example

T = TypeVar("T")

NOTHING = Outcome("ok")
"""What an episode gets where there was nothing to execute."""

LONGEST_TEXT, MOST_TURNS = 4000, 40
"""Characters of a text, and texts, that a transcript keeps; of more, the middle is left out."""


class Dialogue:
  """One sample of one candidate, as far as it has come.

  Args:
    episode: whose sample it is.
    example: the sample.
    opening: with what the dialogue begins.
    max_new_tokens: that an answer may have, unless the episode says so itself.
    choices: that the episode has for the sample; () where answers are written.

  Attributes:
    messages: all that was said.
    answers: the model's turns among them.
    score: of the sample, once it is known.
    reason: why it failed, where that is known; else "".
    prompt_tokens: read so far.
    answer_tokens: decoded so far.
  """

  def __init__(
    self,
    episode: Episode,
    example: Example,
    opening: tuple[Message, ...],
    max_new_tokens: int,
    choices: tuple[str, ...] = (),
  ):
    self.episode = episode
    self.example = example
    self.messages = opening
    self.answers: list[str] = []
    self.score: float | None = None
    self.reason = ""
    self.prompt_tokens = self.answer_tokens = 0
    self._max_new_tokens = int(getattr(episode, "max_new_tokens", max_new_tokens))
    self._choices = choices
    self._num_opening = len(opening)
    self._troubles: list[str | None] = []

  @property
  def request(self) -> Request:
    """What the engine is asked next."""
    return Request(self.messages, self._max_new_tokens, self._choices)

  def chosen(self, found: Likelihoods) -> Answer:
    """What the model answers where it is asked to choose."""
    if found.refused:
      return Answer("", found.prompt_tokens, refused=found.refused)
    assert isinstance(self.episode, Choosing)
    return Answer(self.episode.choose(self.example, found.values), found.prompt_tokens)

  def take(self, answer: Answer) -> Job | None:
    """The model's next turn; what to execute after it. Where the engine refuses to answer, the dialogue has failed."""
    self.prompt_tokens += answer.prompt_tokens
    self.answer_tokens += answer.answer_tokens
    if answer.refused:
      self.score, self.reason = 0.0, answer.refused
      return None
    self.messages += (Message("assistant", answer.text),)
    self.answers.append(answer.text)
    return self.episode.job(self.example, self.answers)

  def hear(self, outcome: Outcome | None) -> None:
    """What came of it (None: nothing was executed). A dialogue that does not end in time has failed."""
    trouble = ""
    if outcome is not None and outcome.status != "ok":
      trouble = f"{outcome.status}: {outcome.detail}" if outcome.detail else outcome.status
    self._troubles.append(None if outcome is None else trouble)
    reply = self.episode.reply(self.example, self.answers, NOTHING if outcome is None else outcome)
    if not isinstance(reply, Message):
      self.score = float(reply)
      self.reason = "" if self.score >= 1 else trouble
    elif len(self.answers) >= self.episode.max_turns:
      self.score, self.reason = 0.0, f"no end after {len(self.answers)} turns"
    else:
      self.messages += (reply,)

  def transcript(self, task: int, sample: int) -> Transcript:
    """Of a dialogue that has ended."""
    assert self.score is not None
    turns: list[tuple[str, str]] = []
    for index, message in enumerate(self.messages):
      turns.append((message.role, _cut(message.content)))
      answered, other = divmod(index - self._num_opening, 2)
      if index >= self._num_opening and not other and (executed := self._executed(answered)):
        turns.append(("executed", executed))
    if len(turns) > MOST_TURNS:
      half = MOST_TURNS // 2
      turns = [*turns[:half], ("", f"[{len(turns) - MOST_TURNS} left out]"), *turns[-half:]]
    return Transcript(task, sample, tuple(turns), self.score, _cut(self.reason))

  def _executed(self, answered: int) -> str:
    """What was executed of an answer, and how that ended where it did not end well."""
    trouble = self._troubles[answered]
    if trouble is None:
      return ""
    episode: Any = self.episode
    answers = self.answers[: answered + 1]
    action = episode.action(self.example, answers) if _acts(type(self.episode)) else ""
    return _cut("\n".join(part for part in (action, trouble) if part))


@functools.cache
def _acts(kind: type[Any]) -> bool:
  """Whether episodes of a class are `Acting`, which Python is slow to find out."""
  return issubclass(kind, Acting)


def ask(
  engine: Engine, candidates: Candidates, dialogues: Sequence[Sequence[Dialogue]]
) -> list[tuple[Dialogue, Answer]]:
  """The next answer to each of P lists of dialogues: all that are to be written by one call of the engine.

  Raises:
    ValueError: if the engine gives too few or too many.
  """
  asked = [[(dialogue, dialogue.request) for dialogue in own] for own in dialogues]
  writing = [[(dialogue, request) for dialogue, request in own if not request.choices] for own in asked]
  choosing = [[(dialogue, request) for dialogue, request in own if request.choices] for own in asked]
  answered = []
  if any(writing):
    answered += _paired(writing, _written(engine, candidates, _requests(writing)))
  if any(choosing):
    assert isinstance(engine, ChoosingEngine)
    found = _paired(choosing, engine.likelihoods(candidates, _requests(choosing)))
    answered += [(dialogue, dialogue.chosen(likelihoods)) for dialogue, likelihoods in found]
  return answered


def advance_dialogues(answered: Sequence[tuple[Dialogue, Answer]], execute: Execute) -> None:
  """Takes dialogues one turn further: all that their answers ask for is executed in one call, and heard."""
  taken = [(dialogue, dialogue.take(answer)) for dialogue, answer in answered]
  outcomes = iter(execute_distinct([job for _, job in taken if job is not None], execute))
  for dialogue, job in taken:
    if dialogue.score is None:
      dialogue.hear(None if job is None else next(outcomes))


def _requests(asked: Sequence[Sequence[tuple[Dialogue, Request]]]) -> list[list[Request]]:
  return [[request for _, request in own] for own in asked]


def _written(engine: Engine, candidates: Candidates, requests: list[list[Request]]) -> list[list[Answer]]:
  if isinstance(engine, CountingEngine):
    return engine.respond(candidates, requests)
  return [[Answer(text) for text in own] for own in engine.generate(candidates, requests)]


def _paired(
  asked: Sequence[Sequence[tuple[Dialogue, Request]]], given: Sequence[Sequence[T]]
) -> list[tuple[Dialogue, T]]:
  """Each dialogue with what the engine gave."""
  if [len(own) for own in given] != [len(own) for own in asked]:
    raise ValueError("engine: expected one answer to each request")
  return [
    (dialogue, each)
    for own, theirs in zip(asked, given, strict=True)
    for (dialogue, _), each in zip(own, theirs, strict=True)
  ]


def usage_of(by_task: Sequence[Sequence[Dialogue]]) -> Usage:
  """What all dialogues of one candidate took."""
  played = [dialogue for own in by_task for dialogue in own]
  return Usage(
    sum(len(dialogue.answers) for dialogue in played),
    sum(dialogue.prompt_tokens for dialogue in played),
    sum(dialogue.answer_tokens for dialogue in played),
  )


def transcripts_of(by_task: Sequence[Sequence[Dialogue]], count: int) -> list[Transcript]:
  """Up to `count` dialogues of each task: first some that failed, half of them where there are so many, then others."""
  kept = []
  for task, own in enumerate(by_task):
    failed = [sample for sample, dialogue in enumerate(own) if (dialogue.score or 0) < 1]
    solved = [sample for sample, dialogue in enumerate(own) if (dialogue.score or 0) >= 1]
    num_failed = min(len(failed), max(count // 2, count - len(solved)))
    chosen = [*failed[:num_failed], *solved[: count - num_failed]]
    kept += [own[sample].transcript(task, sample) for sample in chosen]
  return kept


def _cut(text: str) -> str:
  if len(text) <= LONGEST_TEXT:
    return text
  half = LONGEST_TEXT // 2
  return f"{text[:half]}\n[{len(text) - 2 * half} characters left out]\n{text[-half:]}"
