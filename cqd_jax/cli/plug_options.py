"""Options that change one setting of a plug: `--evolution.mutation.max-scale 2`."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from cqd_jax.config.plugs import Plug
from cqd_jax.config.settings import ConfigError, ExperimentSettings
from cqd_jax.store.yaml_text import YAMLTextError, read_yaml, shortened

FIELDS = (
  "engine",
  *(f"evolution.{name}" for name in ("schedule", "genotype", "cells", "selection", "crossover", "mutation")),
)
"""Settings that are one plug."""

USUAL = {"evolution.crossover": Plug("linear", {"std": 0.03}), "evolution.mutation": Plug("expert_svd", {"rate": 0.3})}
"""What stands where a plug is not given, so that one setting of it can be changed."""


def split_plug_options(options: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
  """Options as they are, without those of a plug's own settings; and these by their dotted names.

  Raises:
    ConfigError: naming an option without a value.
  """
  rest: list[str] = []
  own: dict[str, Any] = {}
  waiting = iter(options)
  for option in waiting:
    name, _, value = option.partition("=")
    name = name.removeprefix("--").replace("-", "_")
    if not option.startswith("--") or not any(name.startswith(f"{field}.") for field in FIELDS):
      rest.append(option)
      continue
    text = value if "=" in option else next(waiting, None)
    if text is None:
      raise ConfigError(f"{option}: expected a value")
    try:
      own[name] = read_yaml(text)
    except YAMLTextError as error:
      raise ConfigError(f"{shortened(option)}: expected a value, got {shortened(text)!r} ({error})") from error
  return rest, own


def with_plug_options(settings: ExperimentSettings, own: dict[str, Any]) -> ExperimentSettings:
  """The settings with those of plugs changed."""
  for name, value in own.items():
    field = next(each for each in FIELDS if name.startswith(f"{each}."))
    key = name.removeprefix(f"{field}.")
    group, _, last = field.rpartition(".")
    owner: Any = getattr(settings, group) if group else settings
    plug = getattr(owner, last) or USUAL[field]
    changed = dataclasses.replace(owner, **{last: plug.with_settings(**{key: value})})
    whole: Any = {group: changed}
    settings = dataclasses.replace(settings, **whole) if group else changed
  return settings
