"""Tests that are written as `assert`, divided into what has to run beside the answer and what must not.

An answer shares a process with what calls it, so nothing that comes out of that process can be believed: it may have
replaced exceptions, `==`, or the harness itself. So of `assert f(2) == [1, 2]` only `f(2)` is evaluated there. Its
value comes back as plain data, and is compared here with an expected value that the answer's process never had.
"""

import ast
import builtins
import dataclasses
import functools
import math
import operator
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from cqd_jax.tasks.execution import JSON
from cqd_jax.tasks.mbpp.bindings import names_bound
from cqd_jax.tasks.mbpp.expected import NeedsAnswer, arithmetic, can_compute, value_of
from cqd_jax.tasks.mbpp.values import decode

Verdict: TypeAlias = Callable[[Sequence[Any]], Any]
"""From the values of a check's expressions to whether they are right."""

PREDICATES: Mapping[str, Callable[..., Any]] = {"math.isclose": math.isclose, "isclose": math.isclose}
"""Functions whose verdict on an answer's values is formed here."""

_NUMERIC: Mapping[str, Callable[..., Any]] = {"abs": abs, "round": round}

CONVERSIONS = ("list", "tuple", "set", "frozenset", "dict", "sorted", "sum", "len", "max", "min", "str", "int", "float")
"""Functions that are called beside the answer: what they give is no easier to guess than what they are given."""

_COMPARE: Mapping[type[ast.cmpop], Callable[[Any, Any], Any]] = {
  ast.Eq: operator.eq,
  ast.NotEq: operator.ne,
  ast.Lt: operator.lt,
  ast.LtE: operator.le,
  ast.Gt: operator.gt,
  ast.GtE: operator.ge,
  ast.Is: operator.is_,
  ast.IsNot: operator.is_not,
  ast.In: lambda item, whole: item in whole,
  ast.NotIn: lambda item, whole: item not in whole,
}


@dataclasses.dataclass(frozen=True)
class Check:
  """An `assert`, and the statements before it.

  Attributes:
    statements: to execute beside the answer, "" for none.
    expressions: to evaluate beside it then.
    claimed: whether the verdict itself is formed beside the answer, so that one that means to cheat can pass.
    verdict: whether the values of the expressions are right.
  """

  statements: str
  expressions: tuple[str, ...]
  claimed: bool
  verdict: Verdict

  def passed(self, sent: JSON) -> bool:
    """Whether what the sandbox sent for the expressions is right. Never raises, whatever JSON it is."""
    if type(sent) is not list or len(sent) != len(self.expressions):
      return False
    try:
      return bool(self.verdict([decode(each) for each in sent]))
    except (NeedsAnswer, ValueError, TypeError, ArithmeticError, LookupError, RecursionError, MemoryError):
      return False


@functools.lru_cache(maxsize=4096)
def checks_of(test: str, functions: tuple[str, ...]) -> tuple[Check, ...]:
  """The checks that a test consists of; what follows the last `assert` has to run to its end.

  Args:
    test: statements of Python.
    functions: that are the answer's.

  Raises:
    SyntaxError, ValueError, RecursionError: if it is no Python that can be read.
  """
  checks: list[Check] = []
  before: list[ast.stmt] = []
  for statement in _parsed(test).body:
    if isinstance(statement, ast.Assert):
      checks.append(_Division(functions).check(before, statement.test))
      before = []
    else:
      before.append(statement)
  if before or not checks:
    checks.append(Check(_source(before), (), True, lambda values: True))
  return tuple(checks)


def functions_of(tests: Sequence[str], solution: str) -> tuple[str, ...]:
  """The functions that tests are about: those that they call and a solution defines, in the order of the calls.

  Of a solution that defines none of them, or is no Python: the names that are not Python's own; and of tests that call
  nothing else, all names.

  Raises:
    SyntaxError, ValueError, RecursionError: if a test is no Python that can be read.
  """
  nodes = [node for test in tests for node in ast.walk(_parsed(test))]
  called = [node.func.id for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
  names = tuple(dict.fromkeys(called))
  defined = _defined(solution)
  foreign = tuple(name for name in names if name not in PREDICATES and not hasattr(builtins, name))
  return tuple(name for name in names if name in defined) or foreign or names


def _defined(solution: str) -> set[str]:
  try:
    body = _parsed(solution).body
  except (SyntaxError, ValueError, RecursionError):
    return set()
  return {name for statement in body for name in names_bound(statement)}


def _parsed(source: str) -> ast.Module:
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of odd escapes, which are the data's
    return ast.parse(source.strip())


class _Division:
  """How the expression of one `assert` is divided."""

  def __init__(self, functions: tuple[str, ...]) -> None:
    self._functions = functions
    self.expressions: list[str] = []
    self.claimed = False

  def check(self, before: Sequence[ast.stmt], test: ast.expr) -> Check:
    verdict = self._verdict(test)
    judged = any(isinstance(node, ast.Assert | ast.Raise) for each in before for node in ast.walk(each))
    return Check(_source(before), tuple(self.expressions), judged or self.claimed, verdict)

  def _verdict(self, node: ast.expr) -> Verdict:
    match node:
      case ast.UnaryOp(op=ast.Not(), operand=operand):
        inner = self._verdict(operand)
        return lambda values: not inner(values)
      case ast.BoolOp(op=sign, values=parts):
        every = [self._verdict(part) for part in parts]
        combine = all if isinstance(sign, ast.And) else any
        return lambda values: combine(each(values) for each in every)
      case ast.Compare(left=left, ops=signs, comparators=others):
        return self._comparison([left, *others], [_COMPARE[type(sign)] for sign in signs])
      case ast.Call(func=function, args=arguments, keywords=keywords) if ast.unparse(function) in PREDICATES:
        return self._predicate(PREDICATES[ast.unparse(function)], arguments, keywords)
    return self._truth(node)

  def _comparison(self, operands: Sequence[ast.expr], signs: Sequence[Callable[[Any, Any], Any]]) -> Verdict:
    before = len(self.expressions)
    sides = [self._operand(each) for each in operands]
    self.claimed |= len(self.expressions) - before == len(operands)  # nothing to compare with that is known here

    def verdict(values: Sequence[Any]) -> bool:
      known = [side(values) for side in sides]
      return all(sign(one, other) for sign, one, other in zip(signs, known, known[1:], strict=False))

    return verdict

  def _predicate(
    self, function: Callable[..., Any], arguments: Sequence[ast.expr], keywords: Sequence[ast.keyword]
  ) -> Verdict:
    before = len(self.expressions)
    given = [self._operand(each) for each in arguments]
    named = {str(each.arg): self._operand(each.value) for each in keywords}
    self.claimed |= len(self.expressions) - before > 1
    return lambda values: function(
      *(each(values) for each in given), **{name: each(values) for name, each in named.items()}
    )

  def _operand(self, node: ast.expr) -> Verdict:
    """A side of a comparison: known here, or made of values of the answer's."""
    try:
      if self._mentions_answer(node):
        raise NeedsAnswer
      value = value_of(node)
      return lambda values: value
    except NeedsAnswer:
      pass
    match node:  # what could be guessed without knowing the answer's value, as f(2) - 0.5, is computed here
      case ast.Compare() | ast.BoolOp() | ast.UnaryOp(op=ast.Not()):
        return self._verdict(node)
      case ast.BinOp(left=left, op=sign, right=right) if can_compute(sign) and self._mentions_answer(node):
        one, other = self._operand(left), self._operand(right)
        return lambda values: arithmetic(sign, one(values), other(values))
      case ast.Call(func=ast.Name(id="abs" | "round" as name), args=arguments, keywords=[]):
        given = [self._operand(each) for each in arguments]
        return lambda values: _NUMERIC[name](*(each(values) for each in given))
    self.claimed |= not self._is_own_value(node)
    return self._slot(ast.unparse(node))

  def _truth(self, node: ast.expr) -> Verdict:
    """What is a verdict by itself. A function's own verdict is its answer; one about its values is a claim."""
    self.claimed |= not self._is_call_of_answer(node)
    value = self._slot(f"bool({ast.unparse(node)})")
    return lambda values: value(values) is True

  def _slot(self, expression: str) -> Verdict:
    self.expressions.append(expression)
    place = len(self.expressions) - 1
    return lambda values: values[place]

  def _is_call_of_answer(self, node: ast.expr) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in self._functions

  def _mentions_answer(self, node: ast.expr) -> bool:
    return any(isinstance(each, ast.expr) and self._is_call_of_answer(each) for each in ast.walk(node))

  def _is_own_value(self, node: ast.expr) -> bool:
    """Whether an expression is a value of the answer's as it is, a part of it, or the same in another type."""
    if self._is_call_of_answer(node):
      return True
    match node:
      case ast.Call(func=ast.Name(id=name), args=[inner]) if name in CONVERSIONS:
        return self._is_own_value(inner)
      case ast.Call(func=ast.Attribute(value=inner)) | ast.Subscript(value=inner) | ast.Attribute(value=inner):
        return self._is_own_value(inner)
    return False


def _source(statements: Sequence[ast.stmt]) -> str:
  return "\n".join(ast.unparse(statement) for statement in statements)
