"""Plugs: functions that a configuration names, with settings that are checked against the function's own signature.

```yaml
crossover: linear                                       # a short name, all settings as they are
mutation: {use: expert_svd, rate: 0.3}                  # the other keys are settings
crossover: {use: my_package.operators:mine, size: 2}    # anybody's function
```

Settings are the keyword-only parameters of the function; what comes before them, and what `Kind.given` names, is given
by the program. A setting that bears the name of a kind is a plug itself. A new short name is a line in `KINDS`; nothing
else here knows any function.
"""

import dataclasses
import difflib
import functools
import importlib
import inspect
import math
import re
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from pydantic import TypeAdapter, ValidationError
from pydantic_core import core_schema

from cqd_jax.store.yaml_text import shortened


class PlugError(ValueError):
  """A plug that cannot be used; its text is for the user and names the setting."""


@dataclasses.dataclass(frozen=True)
class Plug:
  """A function by name, and its settings.

  Attributes:
    use: a short name, or `package.module:function`.
    settings: by name; the function's defaults stand for the others.
  """

  use: str
  settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  @classmethod
  def parse(cls, value: Any) -> "Plug":
    """A plug as YAML or Python writes it: a name, or a mapping with `use`. Raises ValueError."""
    if isinstance(value, Plug):
      return value
    if isinstance(value, str):
      return cls(value)
    if isinstance(value, Mapping) and isinstance(value.get("use"), str):
      if odd := [key for key in value if not isinstance(key, str)]:
        raise ValueError(f"expected names of settings, got {odd[0]!r}")
      return cls(value["use"], {key: entry for key, entry in value.items() if key != "use"})
    raise ValueError(f"expected a name, or {{use: NAME, ...}}, got {shortened(repr(value))}")

  def dump(self) -> Any:
    """As `parse` reads it."""
    return {"use": self.use, **_plain(self.settings)} if self.settings else self.use

  def with_settings(self, **changes: Any) -> "Plug":
    """The same function with further settings."""
    return Plug(self.use, {**self.settings, **changes})

  def __str__(self) -> str:
    settings = ", ".join(f"{name} {value}" for name, value in self.settings.items())
    return f"{self.use} ({settings})" if settings else self.use

  @classmethod
  def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:
    """How pydantic reads and writes it."""
    del source, handler
    serialize = core_schema.plain_serializer_function_ser_schema(lambda plug: plug.dump())
    return core_schema.no_info_plain_validator_function(cls.parse, serialization=serialize)


@dataclasses.dataclass(frozen=True)
class Kind:
  """A kind of plugs.

  Attributes:
    what: what such a function does, in a line.
    table: where the functions are, by short name.
    given: keyword parameters that the program gives.
  """

  what: str
  table: Mapping[str, str]
  given: frozenset[str] = frozenset()


KINDS: Mapping[str, Kind] = {
  "tasks": Kind(
    "a task that text models are scored on",
    {
      "coding": "cqd_jax.tasks.skills:coding",
      "database": "cqd_jax.tasks.skills:database",
      "os": "cqd_jax.tasks.skills:shell",
      "mbpp": "cqd_jax.tasks.mbpp:mbpp",
      "dbbench": "cqd_jax.sandbox.dbbench:dbbench",
      "os_interaction": "cqd_jax.sandbox.os_interaction:os_interaction",
      "lm_eval": "cqd_jax.tasks.evaluation_harness:lm_eval",
      "jsonl": "cqd_jax.tasks.jsonl:jsonl",
    },
    frozenset({"sizes", "seed"}),
  ),
  "engine": Kind("who produces text", {"local": "cqd_jax.engines.local:local"}, frozenset({"mesh"})),
  "methods": Kind(
    "how it is searched",
    {
      name: f"cqd_jax.search.methods:{name}"
      for name in (
        "cycleqd",
        "cma_es",
        "nsga2",
        "random_search",
        "task_arithmetic",
        "ties",
        "dare",
        "lorahub",
        "model_swarms",
        "genome",
        "dns",
        "emitter",
      )
    }
    | {
      "distill": "cqd_jax.search.distillation:distill",
      "gradient": "cqd_jax.search.gradient_emitter:gradient",
      "m2n2": "cqd_jax.search.natural_niches:m2n2",
    },
  ),
  "genotype": Kind(
    "what an individual is stored as",
    {name: f"cqd_jax.genotypes.space:{name}" for name in ("dense", "core", "coefficients")},
  ),
  "crossover": Kind(
    "how two parents become a child",
    {
      name: f"cqd_jax.operators.crossover:{name}_crossover"
      for name in ("linear", "slerp", "split_slerp", "ties", "dare", "line")
    }
    | {
      name: f"cqd_jax.operators.merge_crossovers:{name}_crossover"
      for name in (
        "nuslerp",
        "multislerp",
        "karcher",
        "model_stock",
        "nearswap",
        "breadcrumbs",
        "breadcrumbs_ties",
        "dare_ties",
        "della",
        "della_linear",
        "sce",
        "magmax",
        "ram",
        "ramplus_tl",
        "consensus_merge",
        "tsv",
        "iso_c",
        "iso_cts",
        "knots_ties",
        "knots_dare_ties",
        "wudi",
      )
    },
  ),
  "mutation": Kind(
    "what happens to a child then",
    {
      "none": "cqd_jax.operators.mutation:no_mutation",
      "gaussian": "cqd_jax.operators.mutation:gaussian_mutation",
      "svd": "cqd_jax.operators.mutation:svd_mutation",
      "expert_svd": "cqd_jax.operators.mutation:expert_svd_mutation",
    },
  ),
  "selection": Kind(
    "which elites become parents",
    {
      "elite": "cqd_jax.archive.selectors:elite_sampling",
      "reference_elite": "cqd_jax.archive.selectors:reference_elite_sampling",
      "uniform": "cqd_jax.archive.selectors:uniform_sampling",
    },
  ),
  "schedule": Kind(
    "from which archive parents come",
    {name: f"cqd_jax.search.schedules:{name}" for name in ("cycle", "round_robin", "fixed")},
  ),
  "cells": Kind(
    "how archives are cut into cells",
    {name: f"cqd_jax.archive.make_cells:{name}" for name in ("from_experts", "grid", "cvt")},
  ),
  "emitter": Kind("a QDax emitter of your own", {}),
}


@dataclasses.dataclass(frozen=True)
class Setting:
  """A setting of a plug.

  Attributes:
    name: of it.
    annotation: its type.
    default: `inspect.Parameter.empty` where one has to be given.
    text: what it is, from the function's docstring.
  """

  name: str
  annotation: Any
  default: Any
  text: str

  @property
  def required(self) -> bool:
    """Whether it has to be given."""
    return self.default is inspect.Parameter.empty


def find(kind: str, name: str, where: str) -> Callable[..., Any]:
  """The function of a name.

  Raises:
    PlugError: naming `where`, with what there is.
  """
  table = KINDS[kind].table
  target = table.get(name, name)
  module, _, function = target.partition(":")
  if not (re.fullmatch(r"[A-Za-z_][\w.]*", module) and re.fullmatch(r"[A-Za-z_][\w.]*", function)):
    near = difflib.get_close_matches(name, table, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise PlugError(
      f"{where}: no {kind} {shortened(name)!r}; there are {', '.join(table) or 'none'}, "
      f"or package.module:function{hint}"
    )
  try:
    found = importlib.import_module(module)
  except ImportError as error:
    raise PlugError(f"{where}: {name!r} cannot be imported ({error})") from error
  except (Exception, SystemExit) as error:  # anybody's code
    raise PlugError(f"{where}: {name!r} cannot be imported ({type(error).__name__}: {error})") from error
  try:
    for part in function.split("."):
      found = getattr(found, part)
  except AttributeError as error:
    raise PlugError(f"{where}: {module} has no {function!r}") from error
  if not callable(found):
    raise PlugError(f"{where}: {name!r} is no function, but {type(found).__name__}")
  return typing.cast(Callable[..., Any], found)


def settings_of(kind: str, function: Callable[..., Any]) -> dict[str, Setting]:
  """The settings of a plug's function, by name, in its order."""
  parameters = inspect.signature(function).parameters.values()
  try:
    hints = typing.get_type_hints(inspect.unwrap(function))
  except Exception:  # annotations that only a type checker can resolve
    hints = {}
  texts = _argument_texts(inspect.getdoc(function) or "")
  return {
    each.name: Setting(each.name, hints.get(each.name, Any), each.default, texts.get(each.name, ""))
    for each in parameters
    if each.kind is inspect.Parameter.KEYWORD_ONLY and each.name not in KINDS[kind].given
  }


def resolve(kind: str, plug: Plug, where: str) -> Callable[..., Any]:
  """The function of a plug with its settings bound; plugs among them resolved likewise.

  Args:
    kind: of `KINDS`.
    plug: what to resolve.
    where: its name in the configuration, for messages.

  Raises:
    PlugError: naming the setting that is unknown (with what it may have meant), missing, or of the wrong type.
  """
  function = find(kind, plug.use, where)
  known = settings_of(kind, function)
  bound: dict[str, Any] = {}
  for name, value in plug.settings.items():
    if name not in known:
      near = difflib.get_close_matches(name, known, n=1)
      hint = f"; did you mean {near[0]!r}?" if near else f"; it has {', '.join(known) or 'none'}"
      raise PlugError(f"{where}: {plug.use} has no setting {shortened(name)!r}{hint}")
    bound[name] = _checked(known[name], value, f"{where}.{name}")
  if missing := [name for name, setting in known.items() if setting.required and name not in bound]:
    raise PlugError(f"{where}: {plug.use} needs the setting {missing[0]!r}")
  return functools.partial(function, **bound) if bound else function


def listing() -> Iterator[tuple[str, str, Callable[..., Any]]]:
  """All short names: kind, name, function."""
  for kind, own in KINDS.items():
    for name in own.table:
      yield kind, name, find(kind, name, kind)


def in_words(value: Any) -> str:
  """A setting's default for a person: a function by its short name, with what is bound to it."""
  function: Any = value
  bound: dict[str, Any] = {}
  while isinstance(function, functools.partial):
    function, bound = function.func, {**function.keywords, **bound}
  if not callable(function):
    return str(value)
  target = f"{function.__module__}:{getattr(function, '__name__', type(function).__name__)}"
  names = [name for kind in KINDS.values() for name, place in kind.table.items() if place == target]
  settings = ", ".join(f"{name} {in_words(entry)}" for name, entry in bound.items())
  return (names or [target])[0] + (f" ({settings})" if settings else "")


def _checked(setting: Setting, value: Any, where: str) -> Any:
  if setting.name in KINDS:
    try:
      plug = Plug.parse(value)
    except ValueError as error:
      raise PlugError(f"{where}: {error}") from error
    return resolve(setting.name, plug, where)
  annotation = setting.annotation
  if "ArrayLike" in str(annotation) or annotation is _array_like():
    annotation = float  # what may be traced elsewhere is a number in a configuration
  if isinstance(value, list) and "tuple" in str(annotation):
    value = tuple(tuple(entry) if isinstance(entry, list) else entry for entry in value)
  try:
    checked = TypeAdapter(annotation).validate_python(value, strict=True)
  except ValidationError as error:
    raise PlugError(f"{where}: {error.errors()[0]['msg']}, got {shortened(repr(value))}") from error
  except Exception:  # a type that pydantic does not know is the function's own affair
    checked = value
  for number in checked if isinstance(checked, tuple | list) else [checked]:
    if isinstance(number, float) and not math.isfinite(number):
      raise PlugError(f"{where}: expected finite numbers, got {value}")
  return checked


@functools.cache
def _array_like() -> Any:
  """JAX's type of what can become an array, imported when a plug is."""
  return importlib.import_module("jax.typing").ArrayLike


def _argument_texts(doc: str) -> dict[str, str]:
  """What a docstring in Google's style says of each argument."""
  found = re.search(r"^Args:\n((?:[ ]+.*\n?|\n)*)", doc, re.MULTILINE)
  texts: dict[str, str] = {}
  if not found:
    return texts
  lines = found[1].splitlines()
  indent = min((len(line) - len(line.lstrip()) for line in lines if line.strip()), default=0)
  name = ""
  for line in lines:
    started = re.match(rf" {{{indent}}}(\w+): (.*)", line)
    if started:
      name = started[1]
      texts[name] = started[2]
    elif name and line.strip():
      texts[name] += " " + line.strip()
  return texts


def _plain(value: Any) -> Any:
  """In JSON's types."""
  if isinstance(value, Plug):
    return value.dump()
  if isinstance(value, Mapping):
    return {name: _plain(entry) for name, entry in value.items()}
  return [_plain(entry) for entry in value] if isinstance(value, list | tuple) else value
