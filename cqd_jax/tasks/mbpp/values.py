"""Values as the sandbox sends them: data of an untrusted program, read back as plain Python."""

from collections.abc import Callable
from fractions import Fraction
from typing import Any

from cqd_jax.tasks.execution import JSON

MOST_HASHED = 4096
"""Entries of a set or dict; more could be made to collide until they take minutes."""


class NoValue(ValueError):
  """What came is no value that a check could be passed with."""


def decode(sent: JSON) -> Any:
  """The value that `harness_mbpp.encode` wrote, of Python's own types; a frozenset comes back as a set, its equal.

  Raises:
    NoValue: whatever JSON it is.
  """
  if sent is None or type(sent) in (bool, int, str):
    return sent
  if type(sent) is not list or not sent or type(sent[0]) is not str or sent[0] not in _DECODERS:
    raise NoValue("expected a value")
  try:
    return _DECODERS[sent[0]](sent[1:])
  except (ValueError, TypeError, OverflowError, ZeroDivisionError, RecursionError) as error:
    raise NoValue(f"{sent[0]}: {error}") from error


def _integer(text: Any) -> int:
  if type(text) is not str:
    raise NoValue("expected digits")
  return int(text, 16)


def _real(text: Any) -> float:
  if type(text) is not str:
    raise NoValue("expected digits")
  return float.fromhex(text)


def _one(parts: list[Any]) -> Any:
  (part,) = parts
  return part


def _two(parts: list[Any]) -> tuple[Any, Any]:
  first, second = parts
  return first, second


def _set(parts: list[Any]) -> set[Any]:
  _bounded(len(parts))
  return {_hashable(decode(part)) for part in parts}


def _dict(parts: list[Any]) -> dict[Any, Any]:
  _bounded(len(parts) // 2)
  keys, values = parts[::2], parts[1::2]
  return {_hashable(decode(key)): decode(value) for key, value in zip(keys, values, strict=True)}


def _bounded(size: int) -> None:
  if size > MOST_HASHED:
    raise NoValue(f"{size} entries; {MOST_HASHED} are looked at")


def _hashable(value: Any) -> Any:
  return frozenset(value) if isinstance(value, set) else value


_DECODERS: dict[str, Callable[[list[Any]], Any]] = {
  "int": lambda parts: _integer(_one(parts)),
  "float": lambda parts: _real(_one(parts)),
  "ratio": lambda parts: Fraction(*map(_integer, _two(parts))),
  "complex": lambda parts: complex(*map(_real, _two(parts))),
  "bytes": lambda parts: bytes.fromhex(_one(parts)),
  "list": lambda parts: [decode(part) for part in parts],
  "tuple": lambda parts: tuple(decode(part) for part in parts),
  "set": _set,
  "dict": _dict,
}
