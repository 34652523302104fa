"""Executes an answer and evaluates calls of it. Sent to the sandbox as text: only the standard library.

Nothing here decides anything. What was expected stays outside, so that whatever an answer does to this process, it can
only claim values that it would have had to know.
"""

import sys
import types
import warnings
from typing import Any

MOST_DEEP = 90
"""Levels of a value; the sandbox takes 100 of JSON."""

SMALL = 1 << 53
VIEWS: tuple[type, ...] = (type({}.keys()), type({}.items()))

Check = tuple[str, list[str]]


def run(payload: dict[str, Any]) -> list[list[Any]]:
  """Executes the answer between what has to come before and after it; then, for each check, its statements.

  Args:
    payload: "before", "code" and "after", Python source; "checks", pairs of statements and expressions.

  Returns:
    For each check the values of its expressions, encoded.
  """
  module = types.ModuleType("answer")  # no `__main__`: what an answer does as a program is not asked for
  sys.modules["answer"] = module  # where dataclasses look
  scope = module.__dict__
  warnings.simplefilter("ignore")
  for part in ("before", "code", "after"):
    exec(compile(payload[part], f"<{part}>", "exec"), scope)
  return [_values(scope, *check) for check in payload["checks"]]


def _values(scope: dict[str, Any], statements: str, expressions: list[str]) -> list[Any]:
  exec(compile(statements, "<test>", "exec"), scope)
  return [encode(eval(compile(each, "<test>", "eval"), scope)) for each in expressions]


def encode(value: Any, depth: int = 0) -> Any:
  """A value in JSON's types, exactly; a subclass counts as what it is a class of.

  None, bool, str and small int stand for themselves. A list stands for all else, its first entry for the type: "int"
  and "float" (hexadecimal), "ratio" (of two such ints), "complex", "bytes", "list", "tuple", "set", "dict" (keys and
  values in turn), or "other" with the name of a type that no check knows.
  """
  if depth > MOST_DEEP:
    raise ValueError(f"a value of more than {MOST_DEEP} levels")
  kind = type(value)
  if value is None or kind is bool:
    return value
  if issubclass(kind, str):
    return str.__str__(value)
  if issubclass(kind, int):
    number = int.__index__(value)
    return number if -SMALL < number < SMALL else ["int", hex(number)]
  if issubclass(kind, float):
    return ["float", float.hex(value)]
  return _encode_container(value, kind, depth + 1) or _encode_rare(value, kind)


def _encode_container(value: Any, kind: type, depth: int) -> Any:
  if issubclass(kind, list):
    return ["list", *(encode(each, depth) for each in list.__iter__(value))]
  if issubclass(kind, tuple):
    return ["tuple", *(encode(each, depth) for each in tuple.__iter__(value))]
  if issubclass(kind, dict):
    return ["dict", *(encode(each, depth) for pair in dict.items(value) for each in pair)]
  for base in (set, frozenset):
    if issubclass(kind, base):
      return ["set", *(encode(each, depth) for each in base.__iter__(value))]
  return ["set", *(encode(each, depth) for each in value)] if kind in VIEWS else None


def _encode_rare(value: Any, kind: type) -> Any:
  if issubclass(kind, complex):
    return ["complex", float.hex(value.real), float.hex(value.imag)]
  if issubclass(kind, bytes | bytearray):
    return ["bytes", bytes(value).hex()]
  for name in ("decimal.Decimal", "fractions.Fraction"):  # imported by the answer, or there is no such value
    place, _, own = name.partition(".")
    if kind is getattr(sys.modules.get(place), own, None):
      return _encode_ratio(value)
  return ["other", kind.__name__]


def _encode_ratio(value: Any) -> Any:
  try:
    top, bottom = value.as_integer_ratio()
  except (ValueError, OverflowError):  # not a number, or infinite
    return ["float", float.hex(float(value))]
  return ["ratio", hex(top), hex(bottom)]
