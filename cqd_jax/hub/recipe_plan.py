"""What a recipe means for the tensors of its models: each output tensor, its inputs and their settings.

Tensors go by their names: no architecture is known. What follows a component as `layers` and a number is of that layer.
"""

import dataclasses
import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax.numpy as jnp
import numpy as np

from cqd_jax.hub.merge_methods import METHODS, REQUIRED
from cqd_jax.hub.recipe import Module, Recipe, Slice, Source
from cqd_jax.hub.recipe_values import ModelReference, RecipeError, Settings, settled

LAYER = re.compile(r"((?:.*?\.)?(?:layers|layer|blocks|block|resblocks|h)\.)(\d+)(\..+)")
"""The name of a layer's tensor: the stack, the number, and what it is in the layer."""

FIRST = re.compile(r"embed|(^|\.)w[tp]e(\.|$)")
"""Found in names of tensors in front of the layers; others outside of them come behind."""

HEAD = "lm_head.weight"
EMBEDDING = "embed_tokens.weight"
OF_TOKENS = (EMBEDDING, HEAD, "wte.weight", "word_embeddings.weight")
"""How names of matrices with a row for each token end."""


class KeyTable(NamedTuple):
  """What is known of a model without reading its weights.

  Attributes:
    shapes: shape and dtype by the tensor's name, in the order of the files.
    tied: whether its head is its embedding.
  """

  shapes: Mapping[str, tuple[tuple[int, ...], np.dtype[Any]]]
  tied: bool


Tables: TypeAlias = Mapping[ModelReference, KeyTable]


class Input(NamedTuple):
  """A tensor of a model: which, and by what name it is there."""

  model: ModelReference
  name: str


@dataclasses.dataclass(frozen=True)
class Output:
  """A tensor of the result.

  Attributes:
    name: there.
    shape: of it, and of all its inputs.
    dtype: of it.
    compute: the dtype to which inputs and merge are rounded; None: they are not.
    base: the base's tensor; None where the method has none.
    inputs: the others.
    settings: of the method by name; a tuple where each input has its own. None: the first input is copied.
    varied: names of settings of each model that differ from layer to layer.
    rows: the tensors of all models, where their rows are put in the order of the result's tokens first; else empty.
  """

  name: str
  shape: tuple[int, ...]
  dtype: np.dtype[Any]
  compute: np.dtype[Any] | None
  base: Input | None
  inputs: tuple[Input, ...]
  settings: Mapping[str, Any] | None
  varied: tuple[str, ...] = ()
  rows: tuple[Input, ...] = ()

  @property
  def num_bytes(self) -> int:
    """Of the result."""
    return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class MergePlan:
  """All of a merge.

  Attributes:
    outputs: the tensors in the order in which they are made.
    kept: names of those that not all models have, and that are taken from one as they are.
    layers: for each stack whose layers are chosen by slices, the model and the layer that stand for each of its layers.
  """

  outputs: tuple[Output, ...]
  kept: tuple[str, ...]
  layers: Mapping[str, tuple[tuple[ModelReference, int], ...]]


def plan_merge(recipe: Recipe, tables: Tables, *, keep: bool = False, num_tokens: int = 0) -> MergePlan:
  """Plans a recipe.

  Args:
    recipe: one document.
    tables: of all its models.
    keep: whether tensors that not all models have are taken as they are from the first that has them, the base before
      others; else they are refused.
    num_tokens: of the result, where models number their tokens in other ways; 0: rows are merged as they stand.

  Raises:
    RecipeError: naming the tensor that a model misses, that has another shape or no value for a setting; the layers
      that a model has not; the module without tensors.
  """
  outputs: dict[str, Output] = {}
  planner = _Planner(recipe, tables, keep, num_tokens)
  for module in recipe.modules:
    for output in planner.module(module):
      if output.name in outputs:
        raise RecipeError(f"{module.place or 'slices'}: two tensors would be called {output.name!r}")
      outputs[output.name] = output
  sources = [source.model for module in recipe.modules for part in module.slices for source in part.sources]
  names = dict.fromkeys(name for model in sources for name in tables[model].shapes)
  if left := [name for name in names if not any(planner.belongs(name, module) for module in recipe.modules)]:
    raise RecipeError(f"modules: none has the tensor {left[0]!r} ({len(left)} such); `default` would have all the rest")
  return MergePlan(tuple(outputs.values()), tuple(planner.kept), planner.layers)


class _Planner:
  def __init__(self, recipe: Recipe, tables: Tables, keep: bool, num_tokens: int):
    self.recipe, self.tables, self.keep, self.num_tokens = recipe, tables, keep, num_tokens
    self.method = METHODS[recipe.method]
    self.kept: list[str] = []
    self.layers: dict[str, tuple[tuple[ModelReference, int], ...]] = {}

  def belongs(self, name: str, module: Module) -> bool:
    """Whether a tensor is one of a module."""
    others = [one.name for one in self.recipe.modules if one.name != "default"]
    if module.name == "default":
      return not any(_begins(name, other) for other in others)
    return _begins(name, module.name)

  def module(self, module: Module) -> Iterator[Output]:
    models = dict.fromkeys(source.model for part in module.slices for source in part.sources)
    names = [
      name
      for name in dict.fromkeys(name for model in models for name in self.tables[model].shapes)
      if self.belongs(name, module)
    ]
    if not names:
      raise RecipeError(f"{module.place or 'models'}: no tensor's name begins with {module.name!r}")
    if module.stacked:
      yield from self.slices(module, names)
      return
    depths: dict[str, int] = {}
    for name in names:
      if found := LAYER.fullmatch(name):
        depths[found[1]] = max(depths.get(found[1], 0), int(found[2]))
    for name in names:
      found = LAYER.fullmatch(name)
      depth = _depth(int(found[2]), depths[found[1]] + 1) if found else 0.0
      part = module.slices[0]
      yield self.output(module, part, name, dict.fromkeys(part.sources, name), depth)

  def slices(self, module: Module, names: Sequence[str]) -> Iterator[Output]:
    """The tensors in front of the layers, the layers of all slices, numbered through, and the tensors behind."""
    stack = self.stack(module, names)
    outside = [name for name in names if not LAYER.fullmatch(name)]
    first, last = module.slices[0], module.slices[-1]
    for name in outside:
      if FIRST.search(name):
        yield self.output(module, first, name, dict.fromkeys(first.sources, name), 0.0)
    stands: list[tuple[ModelReference, int]] = []
    for part in module.slices:
      yield from self.slice(module, part, stack, names, stands)
    self.layers[stack] = tuple(stands)
    for name in outside:
      if not FIRST.search(name):
        yield self.output(module, last, name, dict.fromkeys(last.sources, name), 0.0)

  def stack(self, module: Module, names: Sequence[str]) -> str:
    stacks = list(dict.fromkeys(found[1] for name in names if (found := LAYER.fullmatch(name))))
    if len(stacks) != 1:
      got = ", ".join(stacks[:4]) if stacks else "none"
      raise RecipeError(
        f"{module.place or 'slices'}: slices need one stack of layers, got {got}; choose one by modules, as "
        "{modules: {PREFIX: {slices: ...}, default: {models: ...}}}"
      )
    return stacks[0]

  def slice(
    self, module: Module, part: Slice, stack: str, names: Sequence[str], stands: list[tuple[ModelReference, int]]
  ) -> Iterator[Output]:
    for source in part.sources:
      there = self.num_layers(source.model, stack)
      if source.layers and source.layers[1] > there:
        raise RecipeError(f"{source.place}.layer_range: {source.model} has {there} layers, got {list(source.layers)}")
    starts = {source: source.layers[0] for source in part.sources if source.layers}
    ends = [source.layers[1] - source.layers[0] for source in part.sources if source.layers]
    first = next((source for source in part.sources if source.model == part.base), part.sources[0])
    by_layer = _by_layer(tuple(names))
    for number in range(ends[0]):
      rests = dict.fromkeys(
        rest
        for source, start in starts.items()
        for rest in by_layer.get(start + number, ())
        if f"{stack}{start + number}{rest}" in self.tables[source.model].shapes
      )
      for rest in rests:
        inputs = {source: f"{stack}{start + number}{rest}" for source, start in starts.items()}
        yield self.output(module, part, f"{stack}{len(stands)}{rest}", inputs, _depth(number, ends[0]))
      stands.append((first.model, starts[first] + number))

  def num_layers(self, model: ModelReference, stack: str) -> int:
    found = (LAYER.fullmatch(name) for name in self.tables[model].shapes)
    return 1 + max((int(match[2]) for match in found if match and match[1] == stack), default=-1)

  def output(self, module: Module, part: Slice, name: str, named: Mapping[Source, str], depth: float) -> Output:
    """A tensor of the result, with the settings of each input."""
    inputs = {source: self.found(source.model, own) for source, own in named.items()}
    if missing := [source for source, own in inputs.items() if own is None]:
      return self.kept_output(name, part, inputs, missing)
    there = {source: own for source, own in inputs.items() if own is not None}
    self.check_shapes(name, there)
    base = None
    if self.method.base != "input" and part.base is not None:
      base = next(source for source in part.sources if source.model == part.base)
    others = [source for source in part.sources if source is not base]
    levels = (part.settings, module.settings, self.recipe.settings)
    stored = [self.tables[source.model].shapes[own][1] for source, own in there.items()]
    if not all(jnp.issubdtype(dtype, jnp.floating) for dtype in stored):
      return self.copied(name, [Input(source.model, own) for source, own in there.items()])
    settings = {
      key: tuple(self.value(key, (source.settings, *levels), there[source], depth, source.place) for source in others)
      if parameter.per_model
      else self.value(key, levels, name, depth, "")
      for key, parameter in self.method.parameters.items()
      if not parameter.note
    }
    try:
      self.method.check(settings)
    except ValueError as error:
      raise RecipeError(f"{part.place}: of {name}: {error}") from error
    return Output(
      name,
      self.shape(part.sources[0].model, there[part.sources[0]]),
      self.result_dtype(stored),
      _dtype(self.recipe.dtype),
      Input(base.model, there[base]) if base is not None else None,
      tuple(Input(source.model, there[source]) for source in others),
      settings,
      tuple(key for key in settings if self.method.parameters[key].per_model and _varies(key, part, levels)),
      self.rows([Input(source.model, own) for source, own in there.items()]),
    )

  def rows(self, inputs: Sequence[Input]) -> tuple[Input, ...]:
    """The inputs, if they have a row for each token, and these are numbered in other ways."""
    shape = self.tables[inputs[0].model].shapes[inputs[0].name][0]
    return tuple(inputs) if self.num_tokens and len(shape) == 2 and inputs[0].name.endswith(OF_TOKENS) else ()

  def shape(self, model: ModelReference, name: str) -> tuple[int, ...]:
    """Of a tensor, once its rows are those of the result."""
    shape = self.tables[model].shapes[name][0]
    return (self.num_tokens, *shape[1:]) if self.rows([Input(model, name)]) else shape

  def found(self, model: ModelReference, name: str) -> str | None:
    """By what name a model has a tensor: a tied head is the embedding; None if it has not."""
    table = self.tables[model]
    if name in table.shapes:
      return name
    if name.endswith(HEAD) and table.tied:
      return next((own for own in table.shapes if own.endswith(EMBEDDING)), None)
    return None

  def kept_output(
    self, name: str, part: Slice, inputs: Mapping[Source, str | None], missing: Sequence[Source]
  ) -> Output:
    there = sorted((source for source in inputs if inputs[source]), key=lambda source: source.model != part.base)
    owner = there[0]
    if not self.keep:
      raise RecipeError(
        f"{name}: {missing[0].model} misses it, {owner.model} has it; expected the same tensors in all models "
        "(--missing keep takes such from the base, or the first model that has them, as they are)"
      )
    self.kept.append(name)
    return self.copied(name, [Input(owner.model, str(inputs[owner]))])

  def copied(self, name: str, inputs: Sequence[Input]) -> Output:
    stored = self.tables[inputs[0].model].shapes[inputs[0].name][1]
    shape = self.shape(*inputs[0])
    floating = jnp.issubdtype(stored, jnp.floating)
    dtype = self.result_dtype([stored]) if floating else stored
    compute = _dtype(self.recipe.dtype) if floating else None
    return Output(name, shape, dtype, compute, None, tuple(inputs), None, rows=self.rows(inputs))

  def check_shapes(self, name: str, there: Mapping[Source, str]) -> None:
    shapes = [(source.model, self.shape(source.model, own)) for source, own in there.items()]
    first, expected = shapes[0]
    for model, shape in shapes:
      if shape != expected:
        hint = (
          "; of vocabularies that differ, tokenizer_source says which tokens stay"
          if FIRST.search(name) or name.endswith(HEAD)
          else ""
        )
        raise RecipeError(f"{name}: expected one shape, got {expected} in {first} and {shape} in {model}{hint}")

  def value(self, key: str, levels: tuple[Settings, ...], tensor: str, depth: float, place: str) -> Any:
    value = settled(key, levels, tensor, depth)
    if value is None:
      value = self.method.parameters[key].default
    if value is REQUIRED:
      at = f"{place}." if place and place != "base_model" else ""
      raise RecipeError(f"{at}parameters.{key}: has no value for {tensor!r}; add one without a filter")
    return value

  def result_dtype(self, stored: Sequence[np.dtype[Any]]) -> np.dtype[Any]:
    given = _dtype(self.recipe.out_dtype) or _dtype(self.recipe.dtype)
    return np.dtype(functools.reduce(jnp.promote_types, stored)) if given is None else given


@functools.lru_cache(1)
def _by_layer(names: tuple[str, ...]) -> Mapping[int, tuple[str, ...]]:
  """What there is in each layer, in the order of the names."""
  found: dict[int, list[str]] = {}
  for name in names:
    if match := LAYER.fullmatch(name):
      found.setdefault(int(match[2]), []).append(match[3])
  return {number: tuple(rests) for number, rests in found.items()}


def _varies(key: str, part: Slice, levels: Sequence[Settings]) -> bool:
  """Whether a setting has a gradient: then it is one of arrays, or each layer would be compiled on its own."""
  own = [source.settings for source in part.sources]
  return any(isinstance(choice.value, tuple) for level in (*own, *levels) for choice in level.get(key, ()))


def _begins(name: str, module: str) -> bool:
  return name.startswith((f"{module}.", f"model.{module}."))


def _depth(number: int, length: int) -> float:
  return 1.0 if length == 1 else number / (length - 1)


def _dtype(name: str) -> np.dtype[Any] | None:
  return np.dtype(jnp.dtype(name)) if name else None
