"""What scoring took, by method: counted when an individual was scored, and so the same in every session."""

import dataclasses
import sqlite3
from collections.abc import Sequence
from typing import Any

EXPERTS, LABELS, TEST = "the experts", "training questions", "test questions"
"""Rows beside those of the methods: what all of them have in common."""

_SUMS = (
  "count(*), sum(samples), sum(seconds), sum(turns), sum(prompt_tokens), sum(answer_tokens) FROM evaluations "
  "WHERE split = ? AND problem = ?"
)
_WHOSE = "AND individual IN (SELECT individual FROM individuals WHERE {whose})"


@dataclasses.dataclass(frozen=True)
class Cost:
  """What some individuals took.

  Attributes:
    name: of the method, whose children they are; or what else they have in common.
    individuals: that were scored, each once.
    samples: questions that they answered.
    seconds: of scoring them.
    turns: answers that they gave; None where nothing is counted.
    prompt_tokens: that were read; likewise.
    answer_tokens: that were decoded; likewise.
  """

  name: str
  individuals: int
  samples: int
  seconds: float
  turns: int | None = None
  prompt_tokens: int | None = None
  answer_tokens: int | None = None


def costs_of(connection: sqlite3.Connection, methods: Sequence[str]) -> list[Cost]:
  """What the children of each method took on validation, the experts there, and all who answered other splits.

  An individual that two methods came to is counted with both, though it was scored once. Of each split, the problem
  that was scored last counts.
  """
  children = [
    _cost(connection, name, "validation", _WHOSE.format(whose="method = ? AND batch > 0"), (name,)) for name in methods
  ]
  experts = _cost(connection, EXPERTS, "validation", _WHOSE.format(whose="batch = 0"), ())
  others = [_cost(connection, name, split, "", ()) for name, split in ((LABELS, "labels"), (TEST, "test"))]
  return [cost for cost in (experts, *children, *others) if cost.individuals]


def _cost(connection: sqlite3.Connection, name: str, split: str, whose: str, arguments: Sequence[Any]) -> Cost:
  last = connection.execute(
    "SELECT problem FROM evaluations WHERE split = ? ORDER BY rowid DESC LIMIT 1", (split,)
  ).fetchone()
  if last is None:
    return Cost(name, 0, 0, 0.0)
  row = connection.execute(f"SELECT {_SUMS} {whose}", (split, *last, *arguments)).fetchone()
  individuals, samples, seconds, *counted = row
  return Cost(
    name,
    int(individuals),
    int(samples or 0),
    float(seconds or 0),
    *(None if each is None else int(each) for each in counted),
  )
