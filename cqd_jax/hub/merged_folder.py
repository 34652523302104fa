"""What a merged model folder holds beside its weights: config, tokenizer, chat template, and other small files."""

import collections
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cqd_jax.hub.recipe import Recipe
from cqd_jax.hub.recipe_models import OpenModel
from cqd_jax.hub.recipe_plan import HEAD, MergePlan
from cqd_jax.hub.recipe_values import ModelReference, RecipeError
from cqd_jax.hub.save import tokenizer_paths, write_tokenizer
from cqd_jax.store.run_dir import read_json, write_json, write_text

LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
"""Names in configs of how many layers there are."""

COPIED = (
  "generation_config.json",
  "preprocessor_config.json",
  "processor_config.json",
  "video_preprocessor_config.json",
)
"""Files beside the tokenizer's that are taken as they are."""

TEMPLATE = "chat_template.jinja"


def merged_config(
  recipe: Recipe, plan: MergePlan, models: Mapping[ModelReference, OpenModel], num_tokens: int = 0
) -> dict[str, Any]:
  """The config of the result: that of the base, or the first model, with its new number of layers, dtype and head.

  Args:
    recipe: what is merged.
    plan: and how.
    models: all of it.
    num_tokens: of a new vocabulary; 0: it is as it was.

  Raises:
    RecipeError: if slices change the number of layers, and no config says what it was.
  """
  content: dict[str, Any] = json.loads(json.dumps(models[recipe.models[0]].config))
  if not content:
    return {}
  for stack, stands in plan.layers.items():
    before = {
      model: 1 + max(int(name[len(stack) :].split(".")[0]) for name in models[model].tensors if name.startswith(stack))
      for model in dict.fromkeys([recipe.models[0], *(model for model, _ in stands)])
    }
    if [layer for _, layer in stands] != list(range(before[recipe.models[0]])):
      _set_layers(content, stands, models, before[recipe.models[0]], stack)
  sizes: collections.Counter[str] = collections.Counter()
  for output in plan.outputs:
    if output.dtype.name.startswith(("float", "bfloat")):
      sizes[output.dtype.name] += output.num_bytes
  if sizes:
    name = "dtype" if "dtype" in content else "torch_dtype"
    for part in (content, *_parts(content)):
      if part is content or name in part:
        part[name] = sizes.most_common(1)[0][0]
  for part in (content, *_parts(content)):
    if num_tokens and "vocab_size" in part:
      part["vocab_size"] = num_tokens
  if any(output.name.endswith(HEAD) for output in plan.outputs):
    for part in (content, *_parts(content)):
      if part.get("tie_word_embeddings"):
        part["tie_word_embeddings"] = False
  return content


def _parts(content: Mapping[str, Any]) -> list[dict[str, Any]]:
  return [part for part in content.values() if isinstance(part, dict)]


def _set_layers(
  content: dict[str, Any],
  stands: tuple[tuple[ModelReference, int], ...],
  models: Mapping[ModelReference, OpenModel],
  before: int,
  stack: str,
) -> None:
  """Sets the number of layers, and what a config has by layer, as the kind of attention of each."""
  counts = [(part, key) for part in (content, *_parts(content)) for key in LAYER_COUNTS if part.get(key) == before]
  if len(counts) != 1:
    raise RecipeError(
      f"slices: {len(counts)} entries of config.json ({', '.join(LAYER_COUNTS)}) say that there are {before} layers "
      f"{stack}N; expected one, to set it to {len(stands)}"
    )
  part, key = counts[0]
  place = next((name for name, value in content.items() if value is part), "")
  for name, value in part.items():
    if isinstance(value, list) and len(value) == before and name.startswith("layer"):
      part[name] = [_of_layer(models[model].config, place, name, layer, value) for model, layer in stands]
  part[key] = len(stands)


def _of_layer(config: Mapping[str, Any], place: str, name: str, layer: int, default: list[Any]) -> Any:
  own = (config.get(place, {}) if place else config).get(name, default)
  if layer >= len(own):
    raise RecipeError(f"slices: {name} in config.json has no entry of layer {layer}")
  return own[layer]


def tokenizer_folder(recipe: Recipe, models: Mapping[ModelReference, OpenModel]) -> Path | None:
  """The folder whose tokenizer is taken; None if nothing was asked for and there is none.

  Raises:
    RecipeError: if the one that was asked for is not there.
  """
  source = recipe.tokenizer if isinstance(recipe.tokenizer, ModelReference) else recipe.models[0]
  folder = models[source].folder
  if tokenizer_paths(folder):
    return folder
  if recipe.tokenizer is not None:
    raise RecipeError(f"tokenizer_source: {folder} holds no tokenizer files")
  return None


def chat_template(recipe: Recipe, models: Mapping[ModelReference, OpenModel]) -> str:
  """The template that the recipe asks for: its own, or the most common one of the models; empty: as the tokenizer's.

  Raises:
    RecipeError: if it is to be the models', and none has one.
  """
  if recipe.chat_template != "auto":
    return recipe.chat_template
  found = collections.Counter(text for model in models.values() if (text := template_of(model.folder)))
  if not found:
    raise RecipeError("chat_template: auto, and none of the models has one")
  return found.most_common(1)[0][0]


def template_of(folder: Path) -> str:
  """A folder's chat template; empty: it has none, or several by name."""
  if (folder / TEMPLATE).is_file():
    return (folder / TEMPLATE).read_text(encoding="utf-8")
  file = folder / "tokenizer_config.json"
  content = read_json(file) if file.is_file() else {}
  template = content.get("chat_template") if isinstance(content, dict) else None
  return template if isinstance(template, str) else ""


def write_small_files(
  folder: Path, config: Mapping[str, Any], tokenizer: Path | None, template: str, other: Path
) -> None:
  """Writes what a folder holds beside the weights.

  Args:
    folder: to write into.
    config: content of `config.json`; empty: not written.
    tokenizer: whose files are copied.
    template: takes the place of the tokenizer's chat template; empty: not.
    other: the model whose other small files are copied.
  """
  if config:
    write_json(folder / "config.json", config)
  write_tokenizer(folder, tokenizer)
  for name in COPIED:
    if (other / name).is_file():
      shutil.copyfile(other / name, folder / name)
  if template:
    write_text(folder / TEMPLATE, template)
    (folder / "chat_template.json").unlink(missing_ok=True)
    about = folder / "tokenizer_config.json"
    content = read_json(about) if about.is_file() else {}
    if content.pop("chat_template", None) is not None:
      write_json(about, content)
