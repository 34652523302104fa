"""`cqd grade`: answers that were made anywhere, graded as those of the project's own models are."""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from cqd_jax.config.plugs import Plug, PlugError, resolve
from cqd_jax.sandbox.on_demand import SandboxOnDemand
from cqd_jax.store.run_dir import write_text
from cqd_jax.tasks.dialogue import Dialogue, advance_dialogues
from cqd_jax.tasks.episode import Answer, Episode, FromData, as_episode
from cqd_jax.tasks.execution import Execute
from cqd_jax.tasks.task import Example, Task
from cqd_jax.terminal.interrupt import Interrupt, interruptible
from cqd_jax.terminal.progress import progress

BATCH_LINES, BATCH_BYTES = 1000, 16 << 20
"""So much is read, and executed side by side, at a time: enough to keep all workers busy, and no more memory."""

LONGEST_LINE = 16 << 20
"""Bytes; a longer line is broken."""

MOST_SAID = 20
"""So many broken lines are named while grading."""

MOST_KEPT = 1000
"""So many broken lines are named in the result."""


class GradeError(ValueError):
  """Answers that cannot be graded; its text is for the user."""


class Given(NamedTuple):
  """A line: the place of a sample in the data, and what a model said, turn by turn."""

  place: int
  turns: tuple[str, ...]


class Line(NamedTuple):
  """A line of the file that is not empty.

  Attributes:
    number: from 1.
    content: an answer, or why it is none.
    size: bytes.
  """

  number: int
  content: Given | str
  size: int


class Grades:
  """What came of the lines so far, in their order.

  Attributes:
    passed: a byte for each line, 1 or 0.
    total: the sum of the scores.
    broken: number and reason of lines that are no answers, the first `MOST_KEPT` of them.
    num_broken: how many there are.
    answered: a byte for each sample of the data, 1 where a line answered it.
  """

  def __init__(self, num_samples: int) -> None:
    self.passed = bytearray()
    self.total = 0.0
    self.broken: list[tuple[int, str]] = []
    self.num_broken = 0
    self.answered = bytearray(num_samples)

  def add(self, line: Line, score: float) -> None:
    """The next line."""
    self.passed.append(score >= 1)
    self.total += score
    if isinstance(line.content, Given):
      self.answered[line.content.place] = 1
      return
    self.num_broken += 1
    if len(self.broken) < MOST_KEPT:
      self.broken.append((line.number, line.content))

  @property
  def score(self) -> float:
    """The mean over all lines; one that is broken counts as 0."""
    return self.total / len(self.passed)

  def as_json(self) -> dict[str, Any]:
    """What is written."""
    return {
      "passed": [bool(each) for each in self.passed],
      "score": self.score,
      "broken": [{"line": number, "why": why} for number, why in self.broken],
      "num_broken": self.num_broken,
      "unanswered": [index for index, each in enumerate(self.answered) if not each],
    }


def grade(
  plug: Plug,
  data: Path,
  answers: Path,
  out: Path,
  console: Console,
  complain: Callable[[str], None],
  *,
  workers: int | None = None,
  unsafe: bool = False,
) -> Grades:
  """Grades a file of answers, and writes the verdicts.

  Args:
    plug: of the task, without its data.
    data: of the task.
    answers: lines of `{"index": i, "turns": ["...", ...]}`; `i` is the place of the sample in the data, from 0.
    out: file to write, whole or not at all.
    console: where progress and the score go.
    complain: is told of broken lines.
    workers: answers that are executed at a time; None: one for each CPU.
    unsafe: execute without isolation where nothing isolates.

  Raises:
    GradeError: naming the file; if no line of it is an answer, nothing is written.
    ValueError: naming the data, or the setting of the task.
    Stopped: after Ctrl-C; nothing is written.
  """
  episode, samples = _task(plug, data)
  if not out.parent.is_dir() or out.is_dir():
    raise GradeError(f"{out}: expected a file in a folder that exists")
  total = _count(answers)
  harnesses = [] if episode.harness is None else [episode.harness]
  started = time.monotonic()
  with (
    SandboxOnDemand(harnesses, workers=workers, unsafe=unsafe) as execute,
    interruptible(complain) as interrupt,
    progress(console, f"grading {answers.name}", total) as advance,
  ):
    grades = _graded(answers, episode, samples, execute, interrupt, complain, advance)
  if grades.num_broken == len(grades.passed):
    first = f"; line {grades.broken[0][0]}: {grades.broken[0][1]}" if grades.broken else ""
    raise GradeError(f"{answers}: expected answers, got none in {len(grades.passed)} lines{first}")
  write_text(out, json.dumps(grades.as_json()) + "\n")
  _summarize(grades, len(samples), time.monotonic() - started, out, console)
  return grades


def _task(plug: Plug, data: Path) -> tuple[Episode, Sequence[Example]]:
  """The task with its data, and all samples in their order."""
  make = resolve("tasks", plug.with_settings(data=str(data)), "TASK")
  task = make(sizes={"train": 0, "validation": 0, "test": 1}, seed=0)
  if not isinstance(task, Task | Episode) or not isinstance(task, FromData):
    raise PlugError(f"TASK: {plug.use} gives no `samples` of its data, so there is nothing that an index could mean")
  return as_episode(task), task.samples()


def _graded(
  answers: Path,
  episode: Episode,
  samples: Sequence[Example],
  execute: Execute,
  interrupt: Interrupt,
  complain: Callable[[str], None],
  advance: Callable[..., None],
) -> Grades:
  grades = Grades(len(samples))
  for batch in _batches(_lines(answers, len(samples))):
    for line, score in zip(batch, _scores(batch, episode, samples, execute), strict=True):
      if isinstance(line.content, str) and grades.num_broken < MOST_SAID:
        complain(f"{answers}:{line.number}: {line.content}")
      grades.add(line, score)
    interrupt.check()
    advance(len(batch), note=f"{grades.total:g} passed")
  if grades.num_broken > MOST_SAID:
    complain(f"{answers}: {grades.num_broken} broken lines in all")
  return grades


def _scores(batch: Sequence[Line], episode: Episode, samples: Sequence[Example], execute: Execute) -> list[float]:
  """Plays the dialogues of a batch side by side: round by round, as those of models are."""
  dialogues = [
    _begun(episode, samples[line.content.place]) if isinstance(line.content, Given) else None for line in batch
  ]
  turns = [iter(line.content.turns if isinstance(line.content, Given) else ()) for line in batch]
  still_open = [(dialogue, own) for dialogue, own in zip(dialogues, turns, strict=True) if dialogue is not None]
  while still_open:
    answered = [(dialogue, own, turn) for dialogue, own in still_open if (turn := next(own, None)) is not None]
    advance_dialogues([(dialogue, Answer(turn)) for dialogue, _, turn in answered], execute)
    still_open = [(dialogue, own) for dialogue, own, _ in answered if dialogue.score is None]
  # one whose turns ran out before it came to an end has failed
  return [0.0 if dialogue is None or dialogue.score is None else dialogue.score for dialogue in dialogues]


def _begun(episode: Episode, example: Example) -> Dialogue:
  return Dialogue(episode, example, tuple(episode.opening(example)), max_new_tokens=0)  # nothing is decoded


def _count(answers: Path) -> int:
  """Lines of a file that are not empty."""
  try:
    with answers.open("rb") as file:
      return sum(1 for line in iter(lambda: file.readline(LONGEST_LINE), b"") if line.strip())
  except OSError as error:
    raise GradeError(f"{answers}: cannot be read ({error.strerror})") from error


def _batches(lines: Iterator[Line]) -> Iterator[list[Line]]:
  batch: list[Line] = []
  size = 0
  for line in lines:
    batch.append(line)
    size += line.size
    if len(batch) == BATCH_LINES or size >= BATCH_BYTES:
      yield batch
      batch, size = [], 0
  if batch:
    yield batch


def _lines(answers: Path, num_samples: int) -> Iterator[Line]:
  """The lines of a file that are not empty; of one that is too long only the beginning is in memory."""
  with answers.open("rb") as file:
    number = 0
    while raw := file.readline(LONGEST_LINE):
      number += 1
      whole = raw.endswith(b"\n") or len(raw) < LONGEST_LINE
      if not whole:
        while (rest := file.readline(LONGEST_LINE)) and not rest.endswith(b"\n"):
          pass
        yield Line(number, f"longer than {LONGEST_LINE} bytes", len(raw))
      elif raw.strip():
        yield Line(number, _read(raw, num_samples), len(raw))


def _read(raw: bytes, num_samples: int) -> Given | str:
  """An answer, or why a line is none."""
  try:
    content = json.loads(raw.strip().decode("utf-8"))
  except (ValueError, RecursionError) as error:
    return f"no JSON ({error})"
  if not isinstance(content, dict):
    return f"expected an object with index and turns, got {type(content).__name__}"
  index, turns = content.get("index"), content.get("turns")
  if type(index) is not int:
    return f"index: expected a whole number, got {content.get('index')!r:.60}"
  if not 0 <= index < num_samples:
    return f"index: expected 0 to {num_samples - 1}, got {index!r:.60}"
  if not isinstance(turns, list) or any(not isinstance(turn, str) for turn in turns):
    return f"turns: expected a list of texts, got {turns!r:.60}"
  return Given(index, tuple(turns))


def _summarize(grades: Grades, num_samples: int, seconds: float, out: Path, console: Console) -> None:
  count = len(grades.passed)
  text = f"{sum(grades.passed)} of {count} answers passed, score {grades.score:.4f}, in {seconds:.1f} s: {out}"
  if grades.num_broken:
    text += f"; {grades.num_broken} broken lines count as failed"
  if left := num_samples - sum(grades.answered):
    text += f"; {left} of {num_samples} samples have no answer and do not count"
  console.print(text, highlight=False, soft_wrap=True)
