"""Rules by which a text is right: they compare it with what was expected, and execute nothing."""

import decimal
import importlib
import math
import re
import warnings
from collections.abc import Callable, Mapping
from decimal import Decimal
from typing import Any, TypeAlias

import regex

from cqd_jax.tasks.execution import JSON

Rule: TypeAlias = Callable[[str, Any], Any]
"""From a model's text and the expected answer to whether it is right, or a score."""

LONGEST = 1 << 17
"""Characters of a text in which a pattern is looked for."""

LONGEST_END = 1 << 14
"""Characters at the end of a text in which a number is looked for."""

PATTERN_SECONDS = 1.0
"""A pattern that takes longer on a text, since it tries ever more ways to match, counts as not found."""

RELATIVE_TOLERANCE = Decimal("1e-6")

_NUMBER = re.compile(
  r"((?<![\w)\]])[-+])?"  # a sign, and no minus between two numbers
  r"(?:(\d[\d,]*)(\.\d+)?|(?<![\w.])(\.\d+))"
  r"([eE][-+]?\d{1,6})?"
)
_IN_THOUSANDS = re.compile(r"\d{1,3}(?:,\d{3})+")


def exact(text: str, expected: JSON) -> bool:
  """Equal, but for blanks around."""
  return text.strip() == str(expected).strip()


def contains(text: str, expected: JSON) -> bool:
  """The expected answer stands somewhere in the text, in the same case."""
  return str(expected) in text


def numeric(text: str, expected: JSON) -> bool:
  """The last number of the text is the (last) number of the expected answer.

  Whole numbers are compared exactly, others to a millionth of their size. 1,234 is 1234; what stands around a number,
  as a currency, a unit or a full stop, does not count.
  """
  said, wanted = last_number(text), last_number(str(expected))
  if said is None or wanted is None:
    return False
  try:
    if said == said.to_integral_value() and wanted == wanted.to_integral_value():
      return said == wanted
    return abs(said - wanted) <= RELATIVE_TOLERANCE * max(abs(said), abs(wanted))
  except decimal.DecimalException:
    return False


def last_number(text: str) -> Decimal | None:
  """The last number in a text, as people write them; None if there is none."""
  last = None
  for last in _NUMBER.finditer(text[-LONGEST_END:].replace("\N{MINUS SIGN}", "-")):  # noqa: B007 (that is it)
    pass
  if last is None:
    return None
  sign, whole, part, fraction, exponent = (each or "" for each in last.groups())
  whole = whole.rstrip(",")
  if "," in whole and not _IN_THOUSANDS.fullmatch(whole):  # a list, as 1,2,3
    sign, whole = "", whole.rpartition(",")[2]
  return Decimal(f"{sign}{whole.replace(',', '')}{part}{fraction}{exponent}")


def pattern(text: str, expected: JSON) -> bool:
  """The expected answer is a regular expression that is found in the text, within a second."""
  try:
    return regex.search(str(expected), text[:LONGEST], timeout=PATTERN_SECONDS) is not None
  except TimeoutError:
    warnings.warn(
      f"the pattern {str(expected)[:60]!r} took more than {PATTERN_SECONDS:g} s on an answer, which counts as wrong",
      stacklevel=2,
    )
    return False


RULES: Mapping[str, Rule] = {"exact": exact, "contains": contains, "numeric": numeric, "regex": pattern}


def rule_named(name: str) -> Rule:
  """A rule of `RULES`, or anybody's function by `package.module:function`.

  Raises:
    ValueError: if there is none of this name.
  """
  if name in RULES:
    return RULES[name]
  module, colon, function = name.partition(":")
  if not colon:
    raise ValueError(f"rule: expected one of {', '.join(RULES)}, or package.module:function, got {name!r}")
  try:
    found = getattr(importlib.import_module(module), function)
  except (ImportError, AttributeError, ValueError) as error:
    raise ValueError(f"rule: {name!r} cannot be imported ({error})") from error
  if not callable(found):
    raise ValueError(f"rule: {name!r} is no function, but {type(found).__name__}")
  own: Rule = found
  return own


def check_expected(name: str, expected: JSON, where: str) -> None:
  """Checks that an expected answer is one that the rule can compare with.

  Raises:
    ValueError: naming the line.
  """
  if name not in RULES:
    return
  if type(expected) not in (str, int, float) or (type(expected) is float and not math.isfinite(expected)):
    raise ValueError(f"{where}: answer: expected text or a number for the rule {name}, got {expected!r:.60}")
  if name == "contains" and not str(expected):
    raise ValueError(f"{where}: answer: expected some text for the rule contains, got none, which is in every answer")
  if name == "numeric" and last_number(str(expected)) is None:
    raise ValueError(f"{where}: answer: expected a number for the rule numeric, got {expected!r:.60}")
  if name == "regex":
    try:
      regex.compile(str(expected))
    except (regex.error, OverflowError, RecursionError) as error:
      raise ValueError(f"{where}: answer: expected a regular expression, got {expected!r:.60} ({error})") from error


def score_by(rule: Rule, text: str, expected: JSON) -> float:
  """What a rule says of a text, as a score.

  Raises:
    ValueError: if it says neither whether nor how much.
  """
  verdict = rule(text, expected)
  if not isinstance(verdict, bool | int | float) or not math.isfinite(verdict):
    name = getattr(rule, "__name__", "the function")
    raise ValueError(f"rule: expected True, False or a number of {name}, got {verdict!r:.60}")
  return float(verdict)
