"""What a model's turn says: an operation on the database, or the final answer; and whether that is right."""

import ast
import hashlib
import re
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

OBSERVED_CHARACTERS = 800
TRUNCATED = "[TRUNCATED]"

LONGEST_LITERAL = 20_000
"""Longer answers are not read as literals: no right answer is that long, and Python's parser has its limits."""


def operation(answer: str) -> str | None:
  """The statement that a turn asks to have executed, on one line; None where it is no operation.

  It is one if its first line with "Action:" says Operation and it has a block of SQL.
  """
  action = re.search(r"Action:[ \t]*([^\r\n]*)", answer)
  if action is None or action[1].strip() != "Operation":
    return None
  block = re.search(r"```sql\s(.*?)```", answer, re.DOTALL)
  return None if block is None else block[1].strip().replace("\r\n", " ").replace("\n", " ")


def final_answer(answer: str) -> str | None:
  """The rest of the line after "Final Answer:", preferably one that begins a line; None where there is none."""
  found = re.search(r"^Final Answer:(.*)", answer, re.MULTILINE) or re.search(r"Final Answer:(.*)", answer)
  return None if found is None else found[1].strip()


def observed(text: str) -> str:
  """What a model is shown of a result."""
  return text if len(text) <= OBSERVED_CHARACTERS else text[:OBSERVED_CHARACTERS] + TRUNCATED


def is_right(answer: str, label: Sequence[str]) -> bool:
  """Whether a final answer is the right one.

  The answer is read as a list; whatever is no literal list is a list of one text. One against one compare as numbers
  if both are, else as texts; several compare as sets, so that neither order nor repetition counts.
  """
  given = _as_list(answer)
  if len(given) == 1 and len(label) == 1:
    return _same(given[0], label[0])
  try:
    return set(given) == set(label)
  except TypeError:  # lists in the list
    return False


def table_hash(prefixes: Iterable[str]) -> str | None:
  """The hash of a table: MD5 of its rows' MD5 prefixes, sorted and joined by commas; None of an empty table.

  A row's prefix are the first 5 characters of `md5(concat_ws(',', columns))`.
  """
  ordered = sorted(prefixes)
  return hashlib.md5(",".join(ordered).encode()).hexdigest() if ordered else None


def _as_list(answer: str) -> list[Any]:
  text = answer.strip()
  if len(text) > LONGEST_LITERAL:
    return [text]
  try:
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")  # of backslashes in texts
      value = ast.literal_eval(text)
  except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
    return [text]
  return list(value) if isinstance(value, list | tuple | set) else [text]


def _same(given: Any, expected: str) -> bool:
  try:
    number = float(given)
    return number == float(expected) or str(given) == expected
  except (ValueError, TypeError, OverflowError):
    pass
  try:
    return str(given) == expected
  except (ValueError, RecursionError):  # a number of too many digits
    return False
