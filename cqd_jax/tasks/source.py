"""Digests of code, so that a score is not taken for one that another grader gave."""

import ast
import contextlib
import dataclasses
import functools
import hashlib
import inspect
import itertools
import sys
import textwrap
import types
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np

DEPTH = 4
"""How deep in an object its functions and values are looked for."""

MOST = 50
"""So many entries of a container are looked at."""


def source_digest(thing: Any) -> str:
  """Names the code of a function or an object, and what is set in it.

  The code is that of the modules of its class, of the functions that it is made of, and of the user's own functions
  that these use. Of a script or a notebook only what is used counts, so that the rest may change. The standard library
  and installed packages do not count, nor do comments, docstrings and layout.

  What is set are numbers, texts and arrays: bound to a `functools.partial`, in a closure or a default, or in an
  attribute that is not private. One with a leading underscore is state, and does not count.
  """
  search = _Search()
  search.look(thing, DEPTH)
  digest = hashlib.sha256()
  for text in [*map(_text_of_module, sorted(search.modules)), *search.code, *search.values]:
    digest.update(text.encode() + b"\0")
  return digest.hexdigest()[:16]


class _Search:
  """What a thing is made of, in the order in which it is found.

  Attributes:
    modules: names of those that count as a whole.
    code: of scripts and notebooks.
    values: that are set.
  """

  def __init__(self) -> None:
    self.modules: set[str] = set()
    self.code: list[str] = []
    self.values: list[str] = []
    self._seen: set[int] = set()

  def look(self, thing: Any, depth: int) -> None:
    """Adds a thing and what it holds."""
    if isinstance(thing, str | bytes | int | float | complex | types.NoneType):
      self.values.append(repr(thing))
    elif hasattr(thing, "dtype") and hasattr(thing, "shape"):
      self.values.append(_name_of_array(thing))
    elif isinstance(thing, types.FunctionType | type):
      self._look_at_code(thing, depth)
    elif isinstance(thing, types.MethodType):
      self._look_at_all((thing.__func__, thing.__self__), depth)
    elif isinstance(thing, functools.partial):
      self._look_at_all((thing.func, thing.args, thing.keywords), depth)
    elif isinstance(thing, dict):
      self._look_at_all(thing.items(), depth)
    elif isinstance(thing, list | tuple):
      self._look_at_all(thing, depth)
    elif isinstance(thing, types.ModuleType):
      if _is_users(thing.__name__):
        self.modules.add(thing.__name__)
    else:
      self._look_at_object(thing, depth)

  def _look_at_all(self, things: Iterable[Any], depth: int) -> None:
    for thing in itertools.islice(things, MOST) if depth else ():
      self.look(thing, depth - 1)

  def _look_at_object(self, thing: Any, depth: int) -> None:
    self.look(type(thing), depth)
    for name, part in _attributes(thing) if depth else ():
      before = len(self.values)
      self.values.append(name)
      self.look(part, depth - 1)
      if name.startswith("_"):
        del self.values[before:]

  def _look_at_code(self, code: Any, depth: int) -> None:
    if id(code) in self._seen:
      return
    self._seen.add(id(code))
    functions = [code] if isinstance(code, types.FunctionType) else _methods_of(code)
    if _is_script(code.__module__ or ""):
      self.code.append(_text_of(code))
      self._look_at_all([value for function in functions for value in _globals_of(function)], DEPTH)
    elif _is_own(code.__module__ or ""):
      self.modules.add(code.__module__)
      for value in (value for function in functions for value in _globals_of(function)):
        if isinstance(value, types.ModuleType | types.FunctionType | type) and _is_users(_home(value)):
          self.look(value, depth)
    if isinstance(code, types.FunctionType):
      self._look_at_all([*_closure(code), code.__defaults__, code.__kwdefaults__], depth)


def _attributes(thing: Any) -> Iterable[tuple[str, Any]]:
  if dataclasses.is_dataclass(thing):
    return [(field.name, getattr(thing, field.name, None)) for field in dataclasses.fields(thing)]
  return list(getattr(thing, "__dict__", {}).items())[:MOST]


def _methods_of(code: type) -> list[types.FunctionType]:
  return [member for member in vars(code).values() if isinstance(member, types.FunctionType)]


def _globals_of(function: types.FunctionType) -> Iterator[Any]:
  """What a function uses of its module, in the order in which it does."""
  waiting = [function.__code__]
  while waiting:
    code = waiting.pop(0)
    yield from (function.__globals__[name] for name in code.co_names if name in function.__globals__)
    waiting += [each for each in code.co_consts if isinstance(each, types.CodeType)]


def _closure(function: types.FunctionType) -> Iterator[Any]:
  for cell in function.__closure__ or ():
    with contextlib.suppress(ValueError):  # one that is not filled yet
      yield cell.cell_contents


def _home(value: Any) -> str:
  return str(value.__name__ if isinstance(value, types.ModuleType) else value.__module__)


def _name_of_array(array: Any) -> str:
  if jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key):
    array = jax.random.key_data(array)
  content = np.asarray(array)
  return f"{content.dtype}{content.shape}{hashlib.sha256(content.tobytes()).hexdigest()}"


def _is_script(name: str) -> bool:
  return name == "__main__"


def _is_users(name: str) -> bool:
  """Whether a module is the user's: neither installed nor this package's."""
  return _is_script(name) or (_is_own(name) and name.partition(".")[0] != "cqd_jax")


def _is_own(name: str) -> bool:
  """Whether a module is neither built in nor installed: the user's, or this package's."""
  file = getattr(sys.modules.get(name), "__file__", None)
  if file is None or not file.endswith(".py"):
    return False
  installed = "site-packages" in file or "dist-packages" in file or file.startswith(sys.base_prefix + "/lib")
  return name.startswith("cqd_jax.") or not installed


def _text_of_module(name: str) -> str:
  with open(str(sys.modules[name].__file__), encoding="utf-8") as file:
    return f"{name} {_normal_form(file.read())}"


def _text_of(code: Any) -> str:
  """A function or a class by itself, as it is written, or as it is compiled where that cannot be had."""
  try:
    return _normal_form(textwrap.dedent(inspect.getsource(code)))
  except (OSError, TypeError, SyntaxError):
    functions = [code] if isinstance(code, types.FunctionType) else _methods_of(code)
    return repr([_compiled(function.__code__) for function in functions])


@functools.lru_cache(maxsize=256)
def _normal_form(source: str) -> str:
  tree = ast.parse(source)
  for node in ast.walk(tree):
    documented = ast.Module | ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    if isinstance(node, documented) and ast.get_docstring(node, clean=False) is not None:
      node.body = node.body[1:] or [ast.Pass()]
  return ast.unparse(tree)


def _compiled(code: types.CodeType) -> Any:
  constants = [_compiled(each) if isinstance(each, types.CodeType) else each for each in code.co_consts]
  return code.co_code, constants, code.co_names
