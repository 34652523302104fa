"""Values in recipes: checked as they are parsed, and settled for a tensor: by filters, gradients and precedence."""

import dataclasses
import difflib
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from cqd_jax.hub.merge_methods import Method, Parameter
from cqd_jax.store.yaml_text import shortened


class RecipeError(ValueError):
  """A recipe that cannot be followed; the message is one line that names the place in it."""


@dataclasses.dataclass(frozen=True)
class ModelReference:
  """A model: a folder, and a LoRA adapter's on top of it.

  Attributes:
    path: of the folder, or the name of another document of the recipe.
    lora: the adapter's folder; empty: none.
  """

  path: str
  lora: str = ""

  def __str__(self) -> str:
    return f"{self.path}+{self.lora}" if self.lora else self.path


@dataclasses.dataclass(frozen=True)
class Choice:
  """A value for the tensors whose names hold a text.

  Attributes:
    filter: the text; empty: all tensors.
    value: a number or a bool, or several: a gradient over the layers.
  """

  filter: str
  value: float | bool | tuple[float, ...] | tuple[bool, ...]


Settings: TypeAlias = Mapping[str, tuple[Choice, ...]]
"""Values by the name of a setting; of the choices the first that fits a tensor counts."""


def show(value: Any) -> str:
  """A value as it is quoted in a message."""
  return shortened(" ".join(repr(value).split()), 80)


def expect_mapping(content: Any, place: str, known: Sequence[str] | None) -> Mapping[str, Any]:
  """The content; raises unless it has names, all of them text and known (None: any)."""
  at = f"{place}: " if place else ""
  if not isinstance(content, Mapping):
    raise RecipeError(f"{at}expected settings by name, got {show(content)}")
  for key in content:
    if not isinstance(key, str):
      raise RecipeError(f"{at}expected names, got {show(key)}")
    if known is not None and key not in known:
      raise RecipeError(f"{at}unknown key {show(key)}{suggestion(key, known)}")
  return content


def expect_list(content: Any, place: str) -> list[Any]:
  """The content; raises unless it is a list with something in it."""
  if not isinstance(content, list) or not content:
    raise RecipeError(f"{place}: expected a list of at least one, got {show(content)}")
  return content


def expect_text(content: Any, place: str) -> str:
  """The content; raises unless it is text that is not empty."""
  if not isinstance(content, str) or not content.strip():
    raise RecipeError(f"{place}: expected text, got {show(content)}")
  return content


def suggestion(key: str, known: Sequence[str]) -> str:
  """What may have been meant by an unknown key."""
  near = difflib.get_close_matches(key, known, n=1)
  return f"; did you mean {near[0]}?" if near else f"; known: {', '.join(known)}"


def parse_model(content: Any, place: str) -> ModelReference:
  """A model as a recipe names it: `folder`, `folder+adapter`, or the same as a mapping."""
  if isinstance(content, str):
    path, *loras = content.split("+")
    if len(loras) > 1:
      raise RecipeError(f"{place}: expected at most one + before an adapter, got {show(content)}")
    return ModelReference(_folder(path, place), _folder(loras[0], place) if loras else "")
  content = expect_mapping(content, place, ("model", "lora", "override_architecture"))
  if content.get("override_architecture") is not None:
    raise RecipeError(f"{place}.override_architecture: is not supported; tensors are merged by their names")
  if content.get("model") is None:
    raise RecipeError(f"{place}: misses model")
  lora = content.get("lora")
  path = _path(content["model"], f"{place}.model")
  return ModelReference(path, "" if lora is None else _path(lora, f"{place}.lora"))


def _path(content: Any, place: str) -> str:
  if isinstance(content, str):
    return _folder(content, place)
  content = expect_mapping(content, place, ("path", "revision"))
  if content.get("revision") is not None:
    raise RecipeError(f"{place}.revision: is not supported, since nothing is downloaded; expected a folder")
  if "path" not in content:
    raise RecipeError(f"{place}: misses path")
  return _folder(content["path"], f"{place}.path")


def _folder(text: Any, place: str) -> str:
  text = expect_text(text, place)
  if "@" in text:
    raise RecipeError(
      f"{place}: a revision ({show(text)}) is not supported, since nothing is downloaded; expected a folder"
    )
  return text.strip()


def parse_settings(
  content: Any, place: str, name: str, method: Method, remarks: list[str], *, per_source: bool
) -> Settings:
  """The settings at one place of a recipe.

  Args:
    content: of `parameters` there; None: nothing.
    place: where.
    name: of the method.
    method: whose settings they are.
    remarks: gets a line for each that has no effect.
    per_source: whether it is the place of one model, where settings of all models have no say.

  Raises:
    RecipeError: naming the setting that is unknown, misplaced or has a bad value.
  """
  if content is None:
    return {}
  found = {}
  for key, value in expect_mapping(content, place, None).items():
    at = f"{place}.{key}"
    if key not in method.parameters:
      known = tuple(method.parameters)
      raise RecipeError(f"{place}: unknown setting {show(key)} of {name}{suggestion(key, known)}")
    parameter = method.parameters[key]
    if per_source and not parameter.per_model:
      raise RecipeError(f"{at}: is one for all models; it belongs to the parameters of the slice or of the whole")
    if parameter.note:
      remarks.append(f"{at}: has no effect, since {parameter.note}")
    found[key] = _choices(value, parameter, at)
  return found


def _choices(content: Any, parameter: Parameter, place: str) -> tuple[Choice, ...]:
  if isinstance(content, Mapping):
    return (_choice(content, parameter, place),)
  if isinstance(content, list) and any(isinstance(entry, Mapping) for entry in content):
    return tuple(_choice(entry, parameter, f"{place}[{number}]") for number, entry in enumerate(content))
  return (Choice("", _value(content, parameter, place)),)


def _choice(content: Any, parameter: Parameter, place: str) -> Choice:
  content = expect_mapping(content, place, ("filter", "value"))
  if content.get("value") is None:
    raise RecipeError(f"{place}: misses value")
  wanted = "*" if content.get("filter") is None else expect_text(content["filter"], f"{place}.filter")
  return Choice("" if wanted == "*" else wanted, _value(content["value"], parameter, f"{place}.value"))


def _value(content: Any, parameter: Parameter, place: str) -> Any:
  if isinstance(content, list):
    if not content:
      raise RecipeError(f"{place}: expected a gradient of at least one value, got none")
    return tuple(_scalar(entry, parameter, f"{place}[{number}]") for number, entry in enumerate(content))
  return _scalar(content, parameter, place)


def _scalar(content: Any, parameter: Parameter, place: str) -> float | bool:
  if parameter.kind == "bool":
    if content not in (True, False) or not isinstance(content, bool | int | float):
      raise RecipeError(f"{place}: expected true or false, got {show(content)}")
    return bool(content)
  if isinstance(content, bool) or not isinstance(content, int | float) or not math.isfinite(content):
    raise RecipeError(f"{place}: expected a number, got {show(content)}")
  if not parameter.low <= content <= parameter.high:
    raise RecipeError(f"{place}: expected a number in [{parameter.low:g}, {parameter.high:g}], got {show(content)}")
  if parameter.kind == "integer" and content != int(content):
    raise RecipeError(f"{place}: expected an integer, got {show(content)}")
  return float(content)


def settled(key: str, levels: Sequence[Settings], tensor: str, depth: float) -> float | bool | None:
  """The value of a setting for one tensor; None if no level has one for it.

  Args:
    key: the setting.
    levels: those that come first first: the model's, the slice's, the module's, the recipe's.
    tensor: its name.
    depth: of its layer among those of the slice, in [0, 1].
  """
  for level in levels:
    for choice in level.get(key, ()):
      if choice.filter in tensor:
        return _along(choice.value, depth) if isinstance(choice.value, tuple) else choice.value
  return None


def _along(points: Sequence[float | bool], depth: float) -> float | bool:
  """A gradient at a depth: linear between points of equal distance; of bools the one at or before it."""
  place = depth * (len(points) - 1)
  lower = min(int(place), len(points) - 1)
  if isinstance(points[0], bool) or lower == len(points) - 1:
    return points[lower]
  part = place - lower
  return (1.0 - part) * points[lower] + part * points[lower + 1]
