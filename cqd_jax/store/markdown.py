"""Texts of anybody's in Markdown: names of tasks, folders and models stay text, and in their place."""

import re
from collections.abc import Iterable, Sequence

SPECIAL = re.compile(r"""[\\`*\[\]<>|~&$] | (?<![^\W_])_ | _(?![^\W_]) | (?<!\S)\#+(?!\S)""", re.VERBOSE)
"""What means something anywhere in a line: of underscores those that are not within a word, of # those on their own."""

OPENING = re.compile(r"(?:[-+=]|\d{1,9}[.)])(?=\s|$)|[-=]+$")
"""What means something at the beginning of a line, as of a list."""


def escape(text: str) -> str:
  """A text as Markdown that shows it, on one line: for headings, paragraphs, items of lists, and cells of tables.

  What is no Unicode text (as in names of files) is replaced by U+FFFD.
  """
  whole = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
  line = SPECIAL.sub(lambda found: "".join(f"\\{character}" for character in found[0]), " ".join(whole.split()))
  if opening := OPENING.match(line):
    at = opening.end() - 1  # a number means something by what follows it
    line = f"{line[:at]}\\{line[at:]}"
  return line


def code(text: str) -> str:
  """A text as code within a line; more backquotes surround it than it has in a row."""
  line = " ".join(text.split())
  fence = "`" * (1 + max(map(len, re.findall(r"`+", line)), default=0))
  return f"{fence}{line}{fence}" if len(fence) == 1 else f"{fence} {line} {fence}"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  """A table in Markdown; its texts are escaped."""
  ruled = [_row(map(escape, header)), "|" + "---|" * len(header), *(_row(map(escape, row)) for row in rows)]
  return "\n".join(ruled) + "\n"


def _row(cells: Iterable[str]) -> str:
  return f"| {' | '.join(cells)} |"
