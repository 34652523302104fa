"""How individuals were scored, one row for each individual, split and problem: values, answers that passed, and cost.

The rows are in the history's file, which `cqd_jax.store.history` opens; here is what they hold.
"""

import dataclasses
import json
import sqlite3
import zlib
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np

from cqd_jax.tasks.problem import Transcript, Usage

Answers: TypeAlias = Sequence[tuple[int, int, Sequence[str]]]
"""Of one individual: task, sample, and what it said turn by turn."""

TABLE = (
  "CREATE TABLE evaluations (split TEXT NOT NULL, problem TEXT NOT NULL, individual TEXT NOT NULL, "
  "scored BLOB NOT NULL, shape TEXT NOT NULL, seconds REAL NOT NULL, answers BLOB, samples INTEGER NOT NULL, "
  "turns INTEGER, prompt_tokens INTEGER, answer_tokens INTEGER, transcripts TEXT, "
  "PRIMARY KEY (split, problem, individual))"
)
INSERT = f"INSERT OR REPLACE INTO evaluations VALUES ({', '.join('?' * 12)})"

LONGEST_ANSWER = 20_000
"""Characters of an answer that is kept."""


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """How one individual was scored.

  Attributes:
    values: float32 `[K, B]`, as in `Scored`.
    answers: those that passed.
    usage: what its answers took; None where nothing is counted.
    transcripts: dialogues to be looked at.
  """

  values: np.ndarray
  answers: Answers = ()
  usage: Usage | None = None
  transcripts: Sequence[Transcript] = ()


def row_of(
  split: str, problem: str, name: str, evaluation: Evaluation, seconds: float, transcripts: str | None
) -> tuple[Any, ...]:
  """What `INSERT` takes; the transcripts are written elsewhere, and here only named."""
  values = np.asarray(evaluation.values, np.float32)
  return (
    split,
    problem,
    name,
    zlib.compress(values.tobytes(), 1),
    json.dumps(values.shape),
    seconds,
    _pack(evaluation.answers),
    int((~np.isnan(values)).sum()),
    *(evaluation.usage or (None, None, None)),
    transcripts,
  )


def values_by_name(
  connection: sqlite3.Connection, split: str, problem: str, names: Sequence[str]
) -> dict[str, tuple[np.ndarray, float]]:
  """Values `[K, B]` and seconds of those that were scored."""
  query = "SELECT scored, shape, seconds FROM evaluations WHERE split = ? AND problem = ? AND individual = ?"
  known = {}
  for name in dict.fromkeys(names):
    row = connection.execute(query, (split, problem, name)).fetchone()
    if row is not None:
      known[name] = (_values(row[0], row[1]), float(row[2]))
  return known


def answers_by_question(
  connection: sqlite3.Connection, split: str, problem: str, names: Sequence[str] | None
) -> dict[tuple[int, int], dict[tuple[str, ...], str]]:
  """By task and sample the distinct answers that passed, with the name of the individual that gave each first.

  Raises:
    ValueError: if a row is damaged.
  """
  query = "SELECT individual, answers FROM evaluations WHERE split = ? AND problem = ? ORDER BY rowid"
  told = {name: packed for name, packed in connection.execute(query, (split, problem)) if packed is not None}
  found: dict[tuple[int, int], dict[tuple[str, ...], str]] = {}
  for name in told if names is None else dict.fromkeys(names):
    for task, sample, turns in _unpack(told[name]) if name in told else []:
      found.setdefault((task, sample), {}).setdefault(tuple(turns), name)
  return found


def solved_by_somebody(connection: sqlite3.Connection, split: str) -> list[tuple[int, int]]:
  """For each task how many questions somebody solved, of how many; of the problem scored last. [] of none."""
  last = connection.execute(
    "SELECT problem FROM evaluations WHERE split = ? ORDER BY rowid DESC LIMIT 1", (split,)
  ).fetchone()
  if last is None:
    return []
  asked = solved = np.zeros(1, bool)
  query = "SELECT scored, shape FROM evaluations WHERE split = ? AND problem = ?"
  for packed, shape in connection.execute(query, (split, *last)):
    values = _values(packed, shape)
    asked, solved = asked | ~np.isnan(values), solved | (values >= 1)
  return list(zip(solved.sum(axis=1).tolist(), asked.sum(axis=1).tolist(), strict=True))


def _values(packed: bytes, shape: str) -> np.ndarray:
  return np.frombuffer(zlib.decompress(packed), np.float32).reshape(json.loads(shape))


def _pack(answers: Answers) -> bytes | None:
  """None for none."""
  kept = [(task, sample, turns) for task, sample, turns in answers if sum(map(len, turns)) <= LONGEST_ANSWER]
  return zlib.compress(json.dumps(kept).encode(), 1) if kept else None


def _unpack(packed: bytes) -> list[tuple[int, int, list[str]]]:
  try:
    found = json.loads(zlib.decompress(packed))
    return [(int(task), int(sample), [str(turn) for turn in turns]) for task, sample, turns in found]
  except (zlib.error, ValueError, TypeError) as error:
    raise ValueError(f"the answers of an individual cannot be read ({error})") from error
