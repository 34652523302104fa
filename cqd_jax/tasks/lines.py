"""Files of samples: JSON Lines, or one JSON array, as benchmarks are published."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple


class Record(NamedTuple):
  """A sample as it is written.

  Attributes:
    where: file and line, or file and entry, for messages.
    fields: by name.
  """

  where: str
  fields: dict[str, Any]

  def text(self, name: str, default: str | None = None) -> str:
    """A field that has to be text; raises ValueError naming it."""
    value = self.fields.get(name, default)
    if type(value) is not str:
      raise ValueError(f"{self.where}: {name}: expected text, got {_shown(self.fields, name)}")
    return value

  def texts(self, name: str, default: tuple[str, ...] | None = None) -> tuple[str, ...]:
    """A field that has to be a list of texts; raises ValueError naming it."""
    value = self.fields.get(name, default)
    if not isinstance(value, list | tuple) or any(type(each) is not str for each in value):
      raise ValueError(f"{self.where}: {name}: expected a list of texts, got {_shown(self.fields, name)}")
    return tuple(value)


def read_records(path: Path) -> list[Record]:
  """The samples of a file.

  Args:
    path: of JSON Lines, in which empty lines do not count, or of one array of objects.

  Raises:
    ValueError: naming the file, and the line where there is one.
  """
  try:
    text = path.read_text(encoding="utf-8-sig")
  except (OSError, UnicodeDecodeError) as error:
    raise ValueError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
  records = list(_entries(path, text) if text.lstrip().startswith("[") else _lines(path, text))
  if not records:
    raise ValueError(f"{path}: expected samples, got an empty file")
  return records


def _lines(path: Path, text: str) -> Iterator[Record]:
  for number, line in enumerate(text.split("\n"), 1):
    if line.strip():
      yield _record(f"{path}:{number}", _parsed(line, f"{path}:{number}"))


def _entries(path: Path, text: str) -> Iterator[Record]:
  for number, entry in enumerate(_parsed(text, str(path))):
    yield _record(f"{path}: entry {number}", entry)


def _parsed(text: str, where: str) -> Any:
  try:
    return json.loads(text)
  except (ValueError, RecursionError) as error:
    raise ValueError(f"{where}: no JSON ({error})") from error


def _record(where: str, entry: Any) -> Record:
  if not isinstance(entry, dict):
    raise ValueError(f"{where}: expected an object, got {type(entry).__name__}")
  return Record(where, entry)


def _shown(fields: dict[str, Any], name: str) -> str:
  return repr(fields[name])[:60] if name in fields else f"none (there are {', '.join(fields) or 'no fields'})"
