"""The methods of a run: from plugs of a configuration, or from what a script gives."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from cqd_jax.config.plugs import Plug, PlugError, resolve
from cqd_jax.config.settings import ExperimentSettings
from cqd_jax.run.context import Method, check_names
from cqd_jax.search.algorithm import Algorithm, SearchContext

FEATURED = "CycleQD"
"""The row of the method that `evolution` describes."""


def methods_of(settings: ExperimentSettings) -> tuple[Method, ...]:
  """All methods of an experiment, evolution first.

  Raises:
    ValueError: naming the setting of the plug that cannot be used.
  """
  evolution = settings.evolution.as_method()
  first = Method(FEATURED, resolve("methods", evolution, "evolution"))
  others = [_method(plug, f"methods[{index}]") for index, plug in enumerate(settings.methods)]
  check_names([first, *others])
  return first, *others


def as_methods(methods: Sequence[Any]) -> tuple[Method, ...]:
  """The methods of a script: plugs (names, or mappings with `use` and settings), `Method`s, or algorithms.

  Raises:
    ValueError: naming the one that cannot be used.
  """
  if not methods:
    raise ValueError("methods: expected at least one")
  found = []
  for index, each in enumerate(methods):
    where = f"methods[{index}]"
    if isinstance(each, Method):
      found.append(each)
    elif isinstance(each, str | Mapping | Plug):
      try:
        found.append(_method(Plug.parse(each), where))
      except ValueError as error:
        raise error if isinstance(error, PlugError) else PlugError(f"{where}: {error}") from error
    elif isinstance(each, Algorithm):
      found.append(Method(type(each).__name__, functools.partial(_ready, each)))
    else:
      raise PlugError(f"{where}: expected a name, {{use: NAME, ...}}, a Method or an Algorithm, got {each!r}")
  check_names(found)
  return tuple(found)


def _ready(algorithm: Algorithm, context: SearchContext) -> Algorithm:
  """An algorithm that a script has made."""
  del context
  return algorithm


def _method(plug: Plug, where: str) -> Method:
  settings = dict(plug.settings)
  name = settings.pop("name", _usual_name(plug.use))
  if not isinstance(name, str) or not name.strip():
    raise PlugError(f"{where}.name: expected a name, got {name!r}")
  return Method(name, resolve("methods", Plug(plug.use, settings), where))


def _usual_name(use: str) -> str:
  names = {
    "cycleqd": FEATURED,
    "cma_es": "CMA-ES",
    "nsga2": "NSGA-II",
    "ties": "TIES, tuned",
    "dare": "DARE, tuned",
    "lorahub": "LoraHub",
    "model_swarms": "Model Swarms",
    "genome": "GENOME",
    "dns": "DNS",
  }
  return names.get(use, use.rpartition(":")[2].replace("_", " "))
