"""Executes a function body on fixed lists. Sent to the sandbox as text: only the standard library."""

import warnings
from typing import Any

REPR_CHARACTERS = 300

INPUTS: list[list[int]] = []


def prepare(setup: Any) -> None:
  """Keeps the lists that every answer is called with."""
  INPUTS[:] = setup


def run(answer: str) -> list[str]:
  """Calls `def f(xs): ANSWER` on each list; a result's `repr`, which tells types apart, or "raises NAME"."""
  scope: dict[str, Any] = {}
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    exec("def f(xs): " + answer, scope)
    return [_call(scope["f"], xs) for xs in INPUTS]


def _call(function: Any, xs: list[int]) -> str:
  try:
    return repr(function(list(xs)))[:REPR_CHARACTERS]
  except Exception as error:
    return "raises " + type(error).__name__
