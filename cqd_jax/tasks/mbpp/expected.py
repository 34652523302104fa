"""Expected values of tests: expressions that can be evaluated without the answer, by an interpreter of few words."""

import ast
import math
import operator
import sys
from collections.abc import Callable, Mapping
from fractions import Fraction
from numbers import Complex
from typing import Any

MOST_BITS = 1 << 16
"""Of an integer, or entries of a sequence, that arithmetic may make."""

_OPERATORS: Mapping[type[ast.AST], Callable[..., Any]] = {
  ast.Add: operator.add,
  ast.Sub: operator.sub,
  ast.Mult: operator.mul,
  ast.Div: operator.truediv,
  ast.FloorDiv: operator.floordiv,
  ast.Mod: operator.mod,
  ast.Pow: operator.pow,
  ast.USub: operator.neg,
  ast.UAdd: operator.pos,
  ast.Invert: operator.invert,
  ast.Not: operator.not_,
}
_BUILTINS: tuple[Callable[..., Any], ...] = (
  *(set, frozenset, list, tuple, dict, str, int, float, complex, bool, bytes),
  *(sorted, range, len, sum, min, max, abs, round),
)
_KNOWN: Mapping[str, Any] = {
  **{each.__name__: each for each in _BUILTINS},
  "math.pi": math.pi,
  "math.e": math.e,
  "math.inf": math.inf,
  "math.nan": math.nan,
  "math.sqrt": math.sqrt,
  "sys.getsizeof": sys.getsizeof,
}


class NeedsAnswer(Exception):
  """An expression that cannot be evaluated here."""


def value_of(node: ast.expr) -> Any:
  """The value of literals, arithmetic of them, and calls of some of Python's own functions with them.

  Raises:
    NeedsAnswer: if it is another expression, or fails; then it is the answer's process that has to evaluate it.
  """
  try:
    return _value(node)
  except (ArithmeticError, TypeError, ValueError, LookupError, RecursionError) as error:
    raise NeedsAnswer(str(error)) from error


def _value(node: ast.expr) -> Any:
  match node:
    case ast.Constant(value=value):
      return value
    case ast.List(elts=entries):
      return [_value(entry) for entry in entries]
    case ast.Tuple(elts=entries):
      return tuple(_value(entry) for entry in entries)
    case ast.Set(elts=entries):
      return {_value(entry) for entry in entries}
    case ast.Dict(keys=keys, values=values) if None not in keys:
      return {_value(key): _value(value) for key, value in zip(keys, values, strict=True) if key}
    case ast.UnaryOp(op=sign, operand=operand):
      return _OPERATORS[type(sign)](_value(operand))
    case ast.BinOp(left=left, op=sign, right=right):
      return arithmetic(sign, _value(left), _value(right))
    case ast.Call(func=function, args=arguments, keywords=keywords) if all(keyword.arg for keyword in keywords):
      given = {str(keyword.arg): _value(keyword.value) for keyword in keywords}
      return _known(function, ast.Call)(*map(_value, arguments), **given)
    case ast.Attribute():
      return _known(node, ast.Attribute)
  raise NeedsAnswer(ast.unparse(node))


def _known(node: ast.expr, use: type[ast.expr]) -> Any:
  name = ast.unparse(node)
  if name not in _KNOWN or callable(_KNOWN[name]) is not (use is ast.Call):
    raise NeedsAnswer(name)
  return _KNOWN[name]


def can_compute(sign: ast.operator) -> bool:
  """Whether `arithmetic` has this operation."""
  return type(sign) in _OPERATORS


def arithmetic(sign: ast.operator, left: Any, right: Any) -> Any:
  """A sum, product and so on, as far as it stays small.

  Raises:
    NeedsAnswer: if it would not, or `can_compute` says no.
    TypeError, ArithmeticError, ValueError: as the operation does.
  """
  if not can_compute(sign):
    raise NeedsAnswer("another operator")
  if not _is_small(sign, left, right):
    raise NeedsAnswer("large values")
  return _OPERATORS[type(sign)](left, right)


def _is_small(sign: ast.operator, left: Any, right: Any) -> bool:
  numbers = [each for each in (left, right) if isinstance(each, Complex)]
  if len(numbers) == 2:
    return _bits(left) * (abs(right) if isinstance(sign, ast.Pow) else 1) + _bits(right) <= MOST_BITS
  if isinstance(sign, ast.Mult) and len(numbers) == 1:
    (number,) = numbers
    return float(abs(number)) * len(left if number is right else right) <= MOST_BITS
  return isinstance(sign, ast.Add | ast.Sub)  # a text % values may be as long as it likes


def _bits(number: Any) -> int:
  if isinstance(number, Fraction):
    return number.numerator.bit_length() + number.denominator.bit_length()
  return number.bit_length() if isinstance(number, int) else 64
