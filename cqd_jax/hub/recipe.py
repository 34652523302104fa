"""Recipes of merges in mergekit's YAML: text becomes settings, and every mistake is named with its place.

Nothing is read but the text. What mergekit would pass over in silence is refused here: unknown keys and settings, a
setting where it has no say. What is known and has no effect is said in the recipe's remarks.
"""

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from cqd_jax.hub.merge_methods import METHODS, REQUIRED, Method
from cqd_jax.hub.recipe_values import (
  ModelReference,
  RecipeError,
  Settings,
  expect_list,
  expect_mapping,
  expect_text,
  parse_model,
  parse_settings,
  show,
)
from cqd_jax.store.yaml_text import YAMLTextError, read_yaml_documents

KEYS = (
  "models",
  "slices",
  "modules",
  "merge_method",
  "base_model",
  "parameters",
  "dtype",
  "out_dtype",
  "tokenizer_source",
  "tokenizer",
  "chat_template",
  "name",
)
DTYPES = ("float32", "float16", "bfloat16")
TEMPLATES = ("alpaca", "chatml", "exaone", "llama3", "mistral")
"""mergekit's own chat templates, which are not here."""

Layers: TypeAlias = tuple[int, int]
"""The first layer, and the one after the last."""


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
  """A model that takes part.

  Attributes:
    place: in the recipe, as `models[0]`.
    model: which one.
    layers: of it; None: all.
    settings: its own.
  """

  place: str
  model: ModelReference
  layers: Layers | None
  settings: Settings


@dataclasses.dataclass(frozen=True)
class Slice:
  """Layers of the result, and of what they are made: all layers, or those of a slice of the recipe.

  Attributes:
    place: in the recipe.
    sources: the models, the base among them where the method has one.
    base: the base model of these layers.
    settings: for these layers.
  """

  place: str
  sources: tuple[Source, ...]
  base: ModelReference | None
  settings: Settings


@dataclasses.dataclass(frozen=True)
class Module:
  """A part of the result with slices of its own.

  Attributes:
    place: in the recipe; empty for `default`, where the recipe has no modules.
    name: what the names of its tensors begin with; "default": all that is in no other module.
    stacked: whether its slices choose layers.
    slices: one after the other.
    settings: for the module.
  """

  place: str
  name: str
  stacked: bool
  slices: tuple[Slice, ...]
  settings: Settings


@dataclasses.dataclass(frozen=True)
class Recipe:
  """One document of a recipe.

  Attributes:
    name: by which others refer to the result; empty: none.
    method: a name of `METHODS`.
    base: the base model.
    modules: the parts of the result.
    settings: for all of it.
    dtype: in which the merge is; empty: that of the inputs.
    out_dtype: that of the result; empty: `dtype`.
    tokenizer: the model whose tokenizer is taken, "union", or None: that of the base, or of the first model, and rows
      of embeddings are merged as they stand.
    chat_template: Jinja, "auto", or empty: as the tokenizer has it.
    remarks: what the recipe says without effect.
  """

  name: str
  method: str
  base: ModelReference | None
  modules: tuple[Module, ...]
  settings: Settings
  dtype: str
  out_dtype: str
  tokenizer: ModelReference | str | None
  chat_template: str
  remarks: tuple[str, ...]

  @property
  def merged(self) -> tuple[ModelReference, ...]:
    """The models whose weights are merged, the base first."""
    named = [source.model for module in self.modules for part in module.slices for source in part.sources]
    return tuple(dict.fromkeys([*(model for model in named if model == self.base), *named]))

  @property
  def models(self) -> tuple[ModelReference, ...]:
    """All that it needs: the base first, the others in their order."""
    named = [source.model for module in self.modules for part in module.slices for source in part.sources]
    bases = [part.base for module in self.modules for part in module.slices if part.base]
    other = [self.tokenizer] if isinstance(self.tokenizer, ModelReference) else []
    return tuple(dict.fromkeys([*([self.base] if self.base else []), *named, *bases, *other]))


def parse_recipe(text: str) -> tuple[Recipe, ...]:
  """The documents of a recipe in the order in which they are run: the last is the result.

  Raises:
    RecipeError: in one line, with the place in the recipe.
  """
  try:
    documents = read_yaml_documents(text)
  except YAMLTextError as error:
    raise RecipeError(str(error)) from error
  documents = [document for document in documents if document is not None]
  if not documents:
    raise RecipeError("expected a recipe, got nothing")
  if len(documents) == 1:
    return (_parse_document(documents[0], ""),)
  recipes = [_parse_document(content, f"document {number + 1}: ") for number, content in enumerate(documents)]
  return _in_order(recipes)


def _in_order(recipes: Sequence[Recipe]) -> tuple[Recipe, ...]:
  """Each document after those that it needs."""
  names = [recipe.name for recipe in recipes if recipe.name]
  if twice := [name for name in names if names.count(name) > 1]:
    raise RecipeError(f"name: two documents are called {twice[0]!r}")
  needs = {id(recipe): {model.path for model in recipe.models} & set(names) for recipe in recipes}
  used = {name for wanted in needs.values() for name in wanted}
  results = [recipe for recipe in recipes if recipe.name not in used]
  if len(results) > 1:
    shown = ", ".join(repr(recipe.name) if recipe.name else "one without a name" for recipe in results)
    raise RecipeError(f"expected one document that no other one uses, the result; got {shown}")
  ordered: list[Recipe] = []
  left = list(recipes)
  while left:
    done = {recipe.name for recipe in ordered}
    ready = [recipe for recipe in left if needs[id(recipe)] <= done]
    if not ready:
      raise RecipeError(f"name: the documents {', '.join(repr(recipe.name) for recipe in left)} need each other")
    ordered += ready
    left = [recipe for recipe in left if not any(recipe is one for one in ready)]
  return tuple(ordered)


def _parse_document(content: Any, where: str) -> Recipe:
  try:
    return _Document(expect_mapping(content, "", KEYS)).recipe()
  except RecipeError as error:
    raise RecipeError(f"{where}{error}") from error


class _Document:
  """One document while it is parsed."""

  def __init__(self, content: Mapping[str, Any]):
    self.content = content
    self.remarks: list[str] = []
    self.method_name = _method_name(content)
    self.method: Method = METHODS[self.method_name]
    self.base = parse_model(content["base_model"], "base_model") if content.get("base_model") is not None else None

  def recipe(self) -> Recipe:
    settings = self.settings(self.content.get("parameters"), "parameters", per_source=False)
    modules = self.modules()
    for module in modules:
      for part in module.slices:
        self.check_slice(part, (part.settings, module.settings, settings))
    name = self.content.get("name")
    return Recipe(
      "" if name is None else expect_text(name, "name"),
      self.method_name,
      self.base,
      modules,
      settings,
      _dtype(self.content, "dtype"),
      _dtype(self.content, "out_dtype"),
      _tokenizer(self.content, self.base),
      _chat_template(self.content),
      tuple(dict.fromkeys(self.remarks)),
    )

  def settings(self, content: Any, place: str, *, per_source: bool) -> Settings:
    return parse_settings(content, place, self.method_name, self.method, self.remarks, per_source=per_source)

  def modules(self) -> tuple[Module, ...]:
    given = [key for key in ("models", "slices", "modules") if self.content.get(key) is not None]
    if len(given) != 1:
      got = " and ".join(given) if given else "none"
      raise RecipeError(f"expected exactly one of models, slices and modules, got {got}")
    if given != ["modules"]:
      return (self.module(self.content, "", "default", {}),)
    entries = expect_mapping(self.content["modules"], "modules", None)
    if not entries:
      raise RecipeError("modules: expected at least one")
    return tuple(self.named_module(name, content) for name, content in entries.items())

  def named_module(self, name: Any, content: Any) -> Module:
    place = f"modules.{name}"
    content = expect_mapping(content, place, ("models", "slices", "parameters"))
    given = [key for key in ("models", "slices") if content.get(key) is not None]
    if len(given) != 1:
      got = " and ".join(given) if given else "none"
      raise RecipeError(f"{place}: expected exactly one of models and slices, got {got}")
    settings = self.settings(content.get("parameters"), f"{place}.parameters", per_source=False)
    return self.module(content, place, str(name), settings)

  def module(self, content: Mapping[str, Any], place: str, name: str, settings: Settings) -> Module:
    dot = f"{place}." if place else ""
    if content.get("models") is not None:
      sources = self.sources(content["models"], f"{dot}models", layered=False)
      named = [source.model for source in sources]
      if twice := [model for model in named if named.count(model) > 1]:
        raise RecipeError(f"{dot}models: {twice[0]} is given twice")
      if self.base is not None and self.base not in named:
        sources = (*sources, Source("base_model", self.base, None, {}))
      return Module(place, name, False, (Slice(f"{dot}models", sources, self.base, {}),), settings)
    entries = expect_list(content["slices"], f"{dot}slices")
    slices = tuple(self.slice(entry, f"{dot}slices[{number}]") for number, entry in enumerate(entries))
    return Module(place, name, True, slices, settings)

  def slice(self, content: Any, place: str) -> Slice:
    content = expect_mapping(content, place, ("sources", "base_model", "parameters", "residual_weight"))
    if content.get("residual_weight") is not None:
      self.remarks.append(f"{place}.residual_weight: has no effect (in mergekit neither)")
    if "sources" not in content:
      raise RecipeError(f"{place}: misses sources")
    sources = self.sources(content["sources"], f"{place}.sources", layered=True)
    lengths = [source.layers[1] - source.layers[0] for source in sources if source.layers]
    if len(set(lengths)) > 1:
      raise RecipeError(f"{place}.sources: expected as many layers of each, got {', '.join(map(str, lengths))}")
    own = content.get("base_model")
    base = self.base if own is None else parse_model(own, f"{place}.base_model")
    return Slice(
      place, sources, base, self.settings(content.get("parameters"), f"{place}.parameters", per_source=False)
    )

  def sources(self, content: Any, place: str, *, layered: bool) -> tuple[Source, ...]:
    entries = expect_list(content, place)
    return tuple(self.source(entry, f"{place}[{number}]", layered) for number, entry in enumerate(entries))

  def source(self, content: Any, place: str, layered: bool) -> Source:
    content = expect_mapping(content, place, ("model", "parameters", *(["layer_range"] if layered else [])))
    if content.get("model") is None:
      raise RecipeError(f"{place}: misses model")
    layers = _layers(content.get("layer_range"), f"{place}.layer_range") if layered else None
    settings = self.settings(content.get("parameters"), f"{place}.parameters", per_source=True)
    return Source(place, parse_model(content["model"], f"{place}.model"), layers, settings)

  def check_slice(self, part: Slice, levels: tuple[Settings, ...]) -> None:
    """Raises unless the method takes these models, and each has what it must have."""
    name, method = self.method_name, self.method
    if method.base == "needed" and part.base is None:
      raise RecipeError(f"base_model: missing; {name} needs it")
    apart = method.base != "input" and part.base is not None
    bases = [source for source in part.sources if apart and source.model == part.base]
    others = [source for source in part.sources if source not in bases]
    if apart and len(bases) != 1:
      got = f"has {len(bases)} times" if bases else "has not"
      raise RecipeError(f"{part.place}: expected the base model {part.base} once among the models, which it {got}")
    for source in bases:
      if source.settings:
        self.remarks.append(f"{source.place}.parameters: have no effect, since it is the base of {name}")
    if not method.least <= len(others) <= (len(others) if method.most is None else method.most):
      few = method.least if method.most == method.least else f"at least {method.least}"
      beside = " beside the base model" if apart else ""
      hint = ""
      if any(source.place == "base_model" for source in others):
        hint = " (base_model is one of them)"
      raise RecipeError(f"{part.place}: {name} takes {few} model{'s' * (few != 1)}{beside}, got {len(others)}{hint}")
    for key, parameter in method.parameters.items():
      if parameter.default is not REQUIRED or any(key in level for level in levels):
        continue
      if not parameter.per_model and others:
        raise RecipeError(f"parameters.{key}: missing; {name} needs it")
      for source in others:
        if parameter.per_model and key not in source.settings:
          place = f"{source.place}.parameters.{key}" if source.place != "base_model" else f"base_model: {key}"
          hint = " of each model; list the base among the models, or leave it out" * (source.place == "base_model")
          raise RecipeError(f"{place}: missing; {name} needs it{hint}")


def _method_name(content: Mapping[str, Any]) -> str:
  if content.get("merge_method") is None:
    raise RecipeError("merge_method: missing")
  name = expect_text(content["merge_method"], "merge_method")
  if name in METHODS:
    return name
  near = difflib.get_close_matches(name, METHODS, n=1)
  hint = f"did you mean {near[0]}?" if near else f"all: {', '.join(METHODS)}"
  raise RecipeError(f"merge_method: unknown method {show(name)}; {hint}")


def _layers(content: Any, place: str) -> Layers:
  whole = isinstance(content, list) and len(content) == 2 and all(type(end) is int for end in content)
  if not whole or not 0 <= content[0] < content[1]:
    raise RecipeError(f"{place}: expected two layers [first, one after the last], got {show(content)}")
  return content[0], content[1]


def _dtype(content: Mapping[str, Any], key: str) -> str:
  if content.get(key) is None:
    return ""
  text = expect_text(content[key], key)
  if text.removeprefix("torch.") not in DTYPES:
    raise RecipeError(f"{key}: expected one of {', '.join(DTYPES)}, got {show(text)}")
  return text.removeprefix("torch.")


def _tokenizer(content: Mapping[str, Any], base: ModelReference | None) -> ModelReference | str | None:
  if content.get("tokenizer_source") is not None and content.get("tokenizer") is not None:
    raise RecipeError("expected at most one of tokenizer_source and tokenizer, got both")
  place, source = "tokenizer_source", content.get("tokenizer_source")
  if content.get("tokenizer") is not None:
    about = expect_mapping(content["tokenizer"], "tokenizer", ("source", "tokens", "pad_to_multiple_of"))
    for key in ("tokens", "pad_to_multiple_of"):
      if about.get(key) is not None:
        raise RecipeError(f"tokenizer.{key}: is not supported; expected a source alone")
    place, source = "tokenizer.source", about.get("source", "union")
  if source is None:
    return None
  if source == "union":
    return source
  if source == "base":
    if base is None:
      raise RecipeError(f"{place}: base needs a base_model")
    return base
  return parse_model(source, place)


def _chat_template(content: Mapping[str, Any]) -> str:
  if content.get("chat_template") is None:
    return ""
  text = expect_text(content["chat_template"], "chat_template")
  if text == "auto" or ("{" in text and len(text) >= 20):
    return text
  if text in TEMPLATES:
    raise RecipeError(f"chat_template: the built-in template {text} is not supported; expected auto, or Jinja")
  raise RecipeError(f"chat_template: expected auto, or Jinja of at least 20 characters, got {show(text)}")
