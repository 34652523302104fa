"""Regular expressions of anybody's, of which those that could be matched for ever are refused."""

import math
import re

MOST_CHARACTERS = 300
MOST_WAYS = 2_000_000
"""So many ways to read a name may there be: what an expression without repeated groups can cost at the most."""

NAME_CHARACTERS = 64

QUOTED = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]", re.DOTALL)
"""What stands for characters only: an escaped one, a set of them."""


class UnsupportedPattern(ValueError):
  """An expression that is not matched here; the message says why."""


def compile_pattern(text: str) -> re.Pattern[str]:
  """A regular expression as PEFT reads it in its patterns: of a module's name, or of the end of one.

  Python's engine tries one way after another, and a repeated group, as in `(a+)+b`, has ways without number. Without
  one, a repetition of single characters has as many ways as a name has characters, `?` has two, and a group as many as
  it has branches; their product bounds what an expression that passes here can cost.

  Raises:
    re.error: if it is no expression. OverflowError, RecursionError: the same, of large numbers and of deep groups.
    UnsupportedPattern: saying why, if it could be matched for ever.
  """
  if len(text) > MOST_CHARACTERS:
    raise UnsupportedPattern(f"longer than {MOST_CHARACTERS} characters")
  compiled = re.compile(rf"(.*\.)?({text})$")
  if re.search(r"\\[1-9]|\(\?P=", text):
    raise UnsupportedPattern("references to groups")
  plain = QUOTED.sub("x", text)
  if re.search(r"\)(?:[*+]|\{)", plain):
    raise UnsupportedPattern("a group that is repeated")
  if (ways := _ways(plain)) > MOST_WAYS:
    raise UnsupportedPattern(f"more than {MOST_WAYS:,} ways to read a name: {ways:.0e}")
  return compiled


def _ways(plain: str) -> float:
  """The product of what each part of an expression can choose between; branches of groups within groups add up."""
  repeated = len(re.findall(r"[*+]\??|\{\d*,?\d*\}\??", plain))
  optional = len(re.findall(r"(?<![*+}(])\?", plain))
  branches = [1 + group.count("|") for group in re.split(r"[()]", plain) if "|" in group]
  return float(NAME_CHARACTERS) ** repeated * 2.0**optional * math.prod(map(float, branches))
