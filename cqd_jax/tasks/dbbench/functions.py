"""What MySQL has and SQLite lacks. Part of the harness that is sent to the sandbox: only the standard library."""

import datetime
import functools
import hashlib
import math
import re
import sqlite3
import unicodedata
import zlib
from collections.abc import Callable
from typing import Any

LONGEST = 1 << 20
"""Bytes of the longest text that a function makes, as MySQL's `max_allowed_packet` limits them."""

NOW = datetime.datetime(2024, 1, 1)
"""The time, in every database: what is replayed gives what it gave."""

NUMBER = re.compile(r"\s*[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?")
FORMATS = {"i": "%M", "s": "%S", "M": "%B", "W": "%A", "e": "%-d", "c": "%-m", "h": "%I", "T": "%H:%M:%S", "%": "%%"}


def fold(text: str) -> str:
  """What texts are compared by: neither case nor accents count."""
  if text.isascii():
    return text.lower()
  return _folded(text) if len(text) < 1000 else _folded.__wrapped__(text)


@functools.lru_cache(maxsize=4096)
def _folded(text: str) -> str:
  decomposed = unicodedata.normalize("NFKD", text)
  return "".join(each for each in decomposed if not unicodedata.combining(each)).casefold()


def collate(first: str, second: str) -> int:
  """-1, 0 or 1: how two texts are ordered."""
  one, other = fold(first), fold(second)
  return (one > other) - (one < other)


def number(value: Any) -> Any:
  """A value as a number: of a text the number that it begins with, or 0."""
  if value is None or isinstance(value, int | float):
    return value
  found = NUMBER.match(text(value))
  return float(found[0]) if found else 0.0


def text(value: Any) -> Any:
  """A value as the text that MySQL prints."""
  if isinstance(value, float):
    if math.isfinite(value) and value == int(value) and abs(value) < 1e15:
      return str(int(value))
    return repr(value).replace("e+", "e")
  if isinstance(value, bytes):
    return value.decode(errors="replace")
  return value if value is None else str(value)


def like(pattern: Any, value: Any, escape: str = "\\") -> bool | None:
  """`value LIKE pattern ESCAPE escape`."""
  if pattern is None or value is None:
    return None
  return bool(_like(fold(text(pattern)), escape).fullmatch(fold(text(value))))


@functools.lru_cache(maxsize=256)
def _like(pattern: str, escape: str) -> re.Pattern[str]:
  parts, escaped = [], False
  for character in pattern:
    if escaped or character not in ("%", "_", escape):
      parts.append(re.escape(character))
      escaped = False
    elif character == escape:
      escaped = True
    elif character == "_":
      parts.append(".")
    elif parts[-1:] != [".*"]:  # several together would be tried in all divisions of a text
      parts.append(".*")
  return re.compile("".join(parts), re.DOTALL)


def matches(pattern: Any, value: Any) -> bool | None:
  """`value REGEXP pattern`."""
  if pattern is None or value is None:
    return None
  return re.search(text(pattern), text(value), re.IGNORECASE) is not None


def substr(value: str, start: Any, length: Any = None) -> str:
  """From a place on that counts from 1, or from the end where it is negative."""
  begin, size = int(number(start)), len(value)
  first = begin - 1 if begin > 0 else size + begin
  if begin == 0 or first < 0:
    return ""
  return value[first:] if length is None else value[first : first + max(int(number(length)), 0)]


def substring_index(value: str, separator: str, count: Any) -> str:
  """What stands before so many separators; from the right where their number is negative."""
  parts, wanted = value.split(separator) if separator else [""], int(number(count))
  return separator.join(parts[:wanted] if wanted >= 0 else parts[wanted:])


def trim(side: str, what: str, value: str) -> str:
  """Without what stands before or behind, however often."""
  while what and side != "TRAILING" and value.startswith(what):
    value = value[len(what) :]
  while what and side != "LEADING" and value.endswith(what):
    value = value[: -len(what)]
  return value


def pad(value: str, size: Any, fill: str, *, left: bool) -> str | None:
  """To a length."""
  wanted = int(number(size))
  if wanted < 0 or wanted > LONGEST or (not fill and wanted > len(value)):
    return None
  more = (fill * (wanted // max(len(fill), 1) + 1))[: max(wanted - len(value), 0)]
  return more + value[:wanted] if left else value[:wanted] + more


def concat(*values: Any) -> str | None:
  """All of them, or nothing where one is NULL."""
  return None if None in values else "".join(map(text, values))


def concat_ws(separator: Any, *values: Any) -> str | None:
  """With a separator between them; NULLs are left out."""
  return None if separator is None else text(separator).join(text(value) for value in values if value is not None)


def date(value: Any) -> datetime.datetime | None:
  """The time that a text of MySQL's form says."""
  found = re.match(r"\s*(\d{4})-(\d{1,2})-(\d{1,2})(?:[ T](\d{1,2}):(\d{1,2})(?::(\d{1,2}))?)?", text(value))
  try:
    year, month, day, *clock = [int(part or 0) for part in found.groups()] if found else [0, 0, 0]
    return datetime.datetime(year, month, day, *clock)  # type: ignore[arg-type]
  except ValueError:
    return None


def date_format(value: Any, form: str) -> str | None:
  """A time in a form."""
  when = date(value)
  return when.strftime(_strftime(form)) if when else None


def str_to_date(value: str, form: str) -> str | None:
  """The time that a text of a form says."""
  try:
    when = datetime.datetime.strptime(value.strip(), _strftime(form).replace("%-", "%"))
  except ValueError:
    return None
  return str(when) if re.search("%[HhiIsSTkr]", form) else str(when.date())


def _strftime(form: str) -> str:
  return re.sub("%(.)", lambda found: FORMATS.get(found[1], "%" + found[1]), form)


def _part(name: str) -> Callable[[Any], Any]:
  """A function that gives a part of a time."""

  def part(value: Any) -> Any:
    when = date(value)
    return when and (when.strftime(name) if name in ("%B", "%A") else int(when.strftime(name)))

  return part


def _repeated(value: str, count: Any) -> str | None:
  times = max(int(number(count)), 0)
  return value * times if len(value) * times <= LONGEST else None


def _truncated(value: Any, digits: Any) -> float:
  scale = 10.0 ** int(number(digits))
  return math.trunc(number(value) * scale) / scale


def _find(value: str, within: str, start: Any = 1) -> int:
  return fold(within).find(fold(value), int(number(start)) - 1) + 1


def _place(value: Any, among: list[Any]) -> int:
  return among.index(value) + 1 if value in among else 0


def _days_between(one: str, other: str) -> int | None:
  first, second = date(one), date(other)
  return (first.date() - second.date()).days if first and second else None


def _safe(function: Callable[..., Any]) -> Callable[..., Any]:
  """NULL for numbers that have no such value."""

  def call(*values: Any) -> Any:
    try:
      return function(*values)
    except (ValueError, OverflowError, ZeroDivisionError):
      return None

  return call


# Of texts: all arguments come as texts, and NULL gives NULL.
OF_TEXTS: dict[str, tuple[int, Callable[..., Any]]] = {
  "md5": (1, lambda value: hashlib.md5(value.encode()).hexdigest()),
  "sha1": (1, lambda value: hashlib.sha1(value.encode()).hexdigest()),
  "crc32": (1, lambda value: zlib.crc32(value.encode())),
  "upper": (1, str.upper), "ucase": (1, str.upper), "lower": (1, str.lower), "lcase": (1, str.lower),
  "reverse": (1, lambda value: value[::-1]),
  "mysql_length": (1, lambda value: len(value.encode())),
  "mysql_left": (2, lambda value, size: value[: max(int(number(size)), 0)]),
  "mysql_right": (2, lambda value, size: value[max(len(value) - max(int(number(size)), 0), 0) :]),
  "mysql_substr": (-1, substr),
  "mysql_trim": (3, trim),
  "mysql_insert": (4, lambda value, at, size, new: value[: int(at) - 1] + new + value[int(at) - 1 + int(size) :]),
  "substring_index": (3, substring_index),
  "repeat": (2, _repeated),
  "space": (1, lambda count: _repeated(" ", count)),
  "lpad": (3, functools.partial(pad, left=True)), "rpad": (3, functools.partial(pad, left=False)),
  "locate": (-1, _find),
  "instr": (2, lambda within, value: _find(value, within)),
  "strcmp": (2, collate),
  "find_in_set": (2, lambda value, among: _place(fold(value), fold(among).split(","))),
  "format": (2, lambda value, digits: f"{number(value):,.{max(int(number(digits)), 0)}f}"),
  "year": (1, _part("%Y")), "month": (1, _part("%m")), "day": (1, _part("%d")), "dayofmonth": (1, _part("%d")),
  "hour": (1, _part("%H")), "minute": (1, _part("%M")), "monthname": (1, _part("%B")), "dayname": (1, _part("%A")),
  "date_format": (2, date_format), "str_to_date": (2, str_to_date),
  "datediff": (2, _days_between),
  "regexp_replace": (3, lambda value, pattern, new: re.sub(pattern, new.replace("\\", "\\\\"), value, flags=re.I)),
  "regexp_substr": (2, lambda value, pattern: (re.search(pattern, value, re.I) or [None])[0]),
}  # fmt: skip

# Of numbers: all arguments come as numbers.
OF_NUMBERS: dict[str, tuple[int, Callable[..., Any]]] = {
  "floor": (1, math.floor), "ceil": (1, math.ceil), "ceiling": (1, math.ceil), "sqrt": (1, math.sqrt),
  "pow": (2, math.pow), "power": (2, math.pow), "mod": (2, math.fmod), "exp": (1, math.exp), "ln": (1, math.log),
  "log10": (1, math.log10), "log2": (1, math.log2), "truncate": (2, _truncated),
}  # fmt: skip

# Of anything.
OTHERS: dict[str, tuple[int, Callable[..., Any]]] = {
  "mysql_number": (1, number), "mysql_text": (1, text), "mysql_isnull": (1, lambda value: value is None),
  "like": (2, like), "regexp": (2, matches),
  "concat": (-1, concat), "concat_ws": (-1, concat_ws),
  "greatest": (-1, lambda *values: None if None in values else max(values, key=_order)),
  "least": (-1, lambda *values: None if None in values else min(values, key=_order)),
  "field": (-1, lambda value, *among: _place(text(value), [*map(text, among)])),
  "elt": (-1, lambda place, *values: values[int(place) - 1] if 0 < int(place) <= len(values) else None),
  "now": (0, lambda: str(NOW)), "curdate": (0, lambda: str(NOW.date())),
  "mysql_database": (0, lambda: "main"), "version": (0, lambda: "8.0.0"),
}  # fmt: skip


def _order(value: Any) -> tuple[bool, Any]:
  return (isinstance(value, str), fold(value) if isinstance(value, str) else value)


class Sum:
  """SUM, which of texts is a floating-point number; also over a window."""

  def __init__(self) -> None:
    self.total: Any = 0
    self.count = 0

  def step(self, value: Any) -> None:
    """One value more."""
    if value is not None:
      self.total += number(value)
      self.count += 1

  def inverse(self, value: Any) -> None:
    """One value less."""
    if value is not None:
      self.total -= number(value)
      self.count -= 1

  def value(self) -> Any:
    """The sum so far; NULL of nothing."""
    return self.total if self.count else None

  finalize = value


class GroupConcat:
  """GROUP_CONCAT([DISTINCT] value ORDER BY key SEPARATOR separator)."""

  def __init__(self) -> None:
    self.parts: list[tuple[Any, str]] = []
    self.distinct, self.falling, self.separator = 0, 0, ","

  def step(self, distinct: int, separator: str, key: Any, falling: int, value: Any) -> None:
    """One value more."""
    self.distinct, self.falling, self.separator = distinct, falling, separator
    if value is not None:
      self.parts.append((_order(key if key is not None else 0), value))

  def finalize(self) -> str | None:
    """All of them."""
    values = [value for _, value in sorted(self.parts, key=lambda part: part[0], reverse=bool(self.falling))]
    if self.distinct:
      values = list({fold(value): value for value in reversed(values)}.values())[::-1]
    return self.separator.join(values)[:LONGEST] if values else None


def install(database: sqlite3.Connection) -> None:
  """Adds all of it to a database."""
  database.create_collation("mysql", collate)
  for name, (count, function) in OF_TEXTS.items():
    database.create_function(name, count, _of(text, _safe(function)), deterministic=True)
  for name, (count, function) in OF_NUMBERS.items():
    database.create_function(name, count, _of(number, _safe(function)), deterministic=True)
  for name, (count, function) in OTHERS.items():
    database.create_function(name, count, _safe(function), deterministic=True)
  database.create_function("like", 3, like, deterministic=True)
  database.create_window_function("sum", 1, Sum)
  database.create_aggregate("mysql_group_concat", 5, GroupConcat)  # type: ignore[arg-type]


def _of(kind: Callable[[Any], Any], function: Callable[..., Any]) -> Callable[..., Any]:
  def call(*values: Any) -> Any:
    return None if None in values else function(*map(kind, values))

  return call
