"""The published data of DBBench: questions about a table, with the right answer or the hash of the table after it."""

import ast
import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

MODIFICATIONS = ("INSERT", "UPDATE", "DELETE")


@dataclasses.dataclass(frozen=True)
class Table:
  """A table; all columns are text, as in the published benchmark.

  Attributes:
    name: of the table.
    columns: their names.
    rows: the values of each row as text, None for NULL.
  """

  name: str
  columns: tuple[str, ...]
  rows: tuple[tuple[str | None, ...], ...]


@dataclasses.dataclass(frozen=True)
class Sample:
  """One question.

  Attributes:
    index: its place in the file, from 0.
    description: the question.
    add_description: what the model is told of the table.
    kind: "INSERT", "UPDATE", "DELETE", or what kind of a question it is.
    label: the right values; of a modification the statement that makes it.
    table: what is asked about.
    answer_md5: the hash of the table after a modification, as `grading.table_hash` gives it; else "".
  """

  index: int
  description: str
  add_description: str
  kind: str
  label: tuple[str, ...]
  table: Table
  answer_md5: str = ""

  @property
  def modifies(self) -> bool:
    """Whether the table is graded, and not the answer."""
    return self.kind in MODIFICATIONS

  @property
  def question(self) -> str:
    """As it is put to the model."""
    return f"{self.description}\n{self.add_description}"


def read_samples(path: str | Path) -> list[Sample]:
  """Reads a file of samples: a JSON object on each line, or one JSON list of them.

  Raises:
    ValueError: naming the file, the line and the field that is not as published.
  """
  path = Path(path).expanduser()
  try:
    text = path.read_text(encoding="utf-8")
  except (OSError, UnicodeDecodeError) as error:
    raise ValueError(f"data: expected a file of DBBench samples, got {path} ({error})") from error
  if text.lstrip().startswith("["):
    entries = _decoded(text, str(path))
    samples = [_sample(index, entry, f"{path}[{index}]") for index, entry in enumerate(entries)]
  else:
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    samples = [
      _sample(index, _decoded(line, f"{path}, line {number}"), f"{path}, line {number}")
      for index, (number, line) in enumerate(lines)
    ]
  if not samples:
    raise ValueError(f"data: expected DBBench samples, got an empty file {path}")
  return samples


def _decoded(text: str, where: str) -> Any:
  try:
    return json.loads(text)
  except (ValueError, RecursionError) as error:
    raise ValueError(f"{where}: expected JSON ({error})") from error


def _sample(index: int, entry: Any, where: str) -> Sample:
  if not isinstance(entry, Mapping):
    raise ValueError(f"{where}: expected an object, got {_shown(entry)}")
  kind = entry.get("type")
  if isinstance(kind, list) and kind:
    kind = kind[0]
  if not isinstance(kind, str):
    raise ValueError(f"{where}: type: expected a text, or a list of one, got {_shown(entry.get('type'))}")
  return Sample(
    index=index,
    description=_text(entry, "description", where),
    add_description=_text(entry, "add_description", where),
    kind=kind,
    label=_label(entry.get("label", [] if kind in MODIFICATIONS else None), where),
    table=_table(entry.get("table"), where),
    answer_md5=_hash(entry.get("answer_md5"), where) if kind in MODIFICATIONS else "",
  )


def _text(entry: Mapping[str, Any], field: str, where: str) -> str:
  value = entry.get(field)
  if not isinstance(value, str):
    raise ValueError(f"{where}: {field}: expected a text, got {_shown(value)}")
  return value


def _label(value: Any, where: str) -> tuple[str, ...]:
  values = [value] if isinstance(value, str | int | float) else value
  if not isinstance(values, list) or not all(isinstance(each, str | int | float) for each in values):
    raise ValueError(f"{where}: label: expected a list of texts, got {_shown(value)}")
  return tuple(str(each) for each in values)


def _hash(value: Any, where: str) -> str:
  """The hash out of "[('03b2...',)]", which is how a client of MySQL prints a row, or as it is."""
  found: Any = value
  if isinstance(value, str) and value.startswith("["):
    try:
      ((found,),) = ast.literal_eval(value)
    except (ValueError, SyntaxError, TypeError):
      found = None
  if not isinstance(found, str) or not re.fullmatch(r"[0-9a-f]{32}", found):
    raise ValueError(f"{where}: answer_md5: expected [('MD5',)] with 32 hexadecimal digits, got {_shown(value)}")
  return found


def _table(value: Any, where: str) -> Table:
  info = value.get("table_info") if isinstance(value, Mapping) else None
  if not isinstance(value, Mapping) or not isinstance(info, Mapping):
    raise ValueError(f"{where}: table: expected an object with table_name and table_info, got {_shown(value)}")
  name, columns, rows = value.get("table_name"), info.get("columns"), info.get("rows")
  if not isinstance(name, str) or not name:
    raise ValueError(f"{where}: table.table_name: expected a text, got {_shown(name)}")
  if not isinstance(columns, list) or not columns:
    raise ValueError(f"{where}: table.table_info.columns: expected a list of columns, got {_shown(columns)}")
  names = [each.get("name") if isinstance(each, Mapping) else None for each in columns]
  for place, column in enumerate(names):
    if not isinstance(column, str) or not column:
      raise ValueError(f"{where}: table.table_info.columns[{place}]: expected a name, got {_shown(columns[place])}")
  if not isinstance(rows, list):
    raise ValueError(f"{where}: table.table_info.rows: expected a list of rows, got {_shown(rows)}")
  found = [_row(row, len(names), f"{where}: table.table_info.rows[{place}]") for place, row in enumerate(rows)]
  return Table(name, tuple(map(str, names)), tuple(found))


def _row(row: Any, size: int, where: str) -> tuple[str | None, ...]:
  if not isinstance(row, Sequence) or isinstance(row, str) or len(row) != size:
    raise ValueError(f"{where}: expected {size} values, got {_shown(row)}")
  for cell in row:
    if cell is not None and not isinstance(cell, str | int | float):
      raise ValueError(f"{where}: expected texts, numbers or null, got {_shown(cell)}")
  return tuple(None if cell is None else str(cell) for cell in row)


def _shown(value: Any) -> str:
  text = repr(value)
  return text if len(text) <= 80 else f"{text[:77]}..."
