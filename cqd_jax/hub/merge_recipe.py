"""Runs recipes: tensor by tensor into shards, beside the folder that appears at the end; what was killed goes on."""

import dataclasses
import hashlib
import json
import shutil
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

import cqd_jax
from cqd_jax.hub.merge_methods import METHODS, merge_tensors
from cqd_jax.hub.merged_folder import chat_template, merged_config, tokenizer_folder, write_small_files
from cqd_jax.hub.model_card import parent_of, recipe_card
from cqd_jax.hub.recipe import Recipe, parse_recipe
from cqd_jax.hub.recipe_models import OpenModel, as_dtype, open_model, read_tensor
from cqd_jax.hub.recipe_plan import Input, MergePlan, Output, plan_merge
from cqd_jax.hub.recipe_values import ModelReference, RecipeError
from cqd_jax.hub.recipe_vocabulary import Vocabulary, vocabulary_of
from cqd_jax.hub.save import SHARD_BYTES
from cqd_jax.hub.shard_writer import Entry, ShardWriter
from cqd_jax.hub.tensor_files import Reader
from cqd_jax.store.run_dir import RunDirError, locked, read_json, write_json, write_text
from cqd_jax.terminal.progress import MEGABYTE, Advance, progress

STATE = "merge.json"


@dataclasses.dataclass(frozen=True)
class MergeOptions:
  """What a merge has beside its recipe.

  Attributes:
    seed: of methods that draw.
    keep: whether tensors that not all models have are taken from one as they are; else they are refused.
    max_shard_bytes: a file of weights holds no more, but for a tensor that alone is larger.
    dry_run: whether it ends before anything is written.
  """

  seed: int = 0
  keep: bool = False
  max_shard_bytes: int = SHARD_BYTES
  dry_run: bool = False


def merge_recipe(recipe: Path, out: Path, console: Console, options: MergeOptions) -> None:
  """Merges models by a recipe into a folder, which appears whole or not at all.

  Weights are written beside it, in `.OUT.merging`, shard by shard. A merge that was killed goes on with the first shard
  that is missing; of another recipe, or models that changed since, nothing is used.

  Args:
    recipe: a file in mergekit's YAML. Folders in it are relative to the current one.
    out: the folder to write; must not exist.
    console: for progress.
    options: the rest.

  Raises:
    ValueError: in one line, naming the place in the recipe, or the tensor, file or folder.
    OSError: if something could not be read or written.
  """
  if options.max_shard_bytes < 1:
    raise ValueError(f"max_shard_bytes: expected at least 1, got {options.max_shard_bytes}")
  if not 0 <= options.seed < 2**32:
    raise ValueError(f"seed: expected an integer in [0, 2^32), got {options.seed}")
  if out.exists():
    raise ValueError(f"{out}: already exists; nothing was overwritten")
  text = _read_text(recipe)
  try:
    documents = parse_recipe(text)
    names = {document.name for document in documents if document.name}
    given = {model: model for document in documents for model in document.models if model.path not in names}
    models = {model: open_model(model, Path(model.path)) for model in given}
    first = _prepare(documents[0], models, options)
    for remark in dict.fromkeys(remark for document in documents for remark in document.remarks):
      console.print(f"note: {remark}", highlight=False, markup=False)
    if options.dry_run:
      _describe(documents, first, options, console)
      return
    _run(text, documents, models, out, console, options)
  except RecipeError as error:
    raise RecipeError(f"{recipe}: {error}") from error


@dataclasses.dataclass(frozen=True)
class Prepared:
  """A document with all that was found out before weights are read.

  Attributes:
    recipe: the document.
    models: its models.
    plan: its tensors.
    vocabulary: of the result, if models number their tokens in other ways.
    config: content of `config.json`; empty: there is none.
    tokenizer: the folder whose tokenizer is taken.
    template: the chat template; empty: the tokenizer's.
  """

  recipe: Recipe
  models: Mapping[ModelReference, OpenModel]
  plan: MergePlan
  vocabulary: Vocabulary | None
  config: Mapping[str, Any]
  tokenizer: Path | None
  template: str

  @property
  def num_bytes(self) -> int:
    """Of the result's weights."""
    return sum(output.num_bytes for output in self.plan.outputs)


def _prepare(recipe: Recipe, models: Mapping[ModelReference, OpenModel], options: MergeOptions) -> Prepared:
  own = {reference: models[reference] for reference in recipe.models}
  tokenizer, vocabulary = tokenizer_folder(recipe, own), None
  if recipe.tokenizer is not None:
    folders = {reference: model.folder for reference, model in own.items()}
    vocabulary = vocabulary_of(recipe.tokenizer, folders, recipe.merged)
  num_tokens = vocabulary.size if vocabulary else 0
  tables = {reference: model.table for reference, model in own.items()}
  plan = plan_merge(recipe, tables, keep=options.keep, num_tokens=num_tokens)
  config = merged_config(recipe, plan, own, num_tokens)
  return Prepared(recipe, own, plan, vocabulary, config, tokenizer, chat_template(recipe, own))


def _run(
  text: str,
  documents: Sequence[Recipe],
  models: Mapping[ModelReference, OpenModel],
  out: Path,
  console: Console,
  options: MergeOptions,
) -> None:
  """Runs the documents in a work folder; the last one's result becomes `out`."""
  work = out.absolute().with_name(f".{out.name}.merging")
  work.mkdir(parents=True, exist_ok=True)
  with locked(work):
    _go_on_or_begin(work, _fingerprint(text, models, options))
    try:
      prepared, target = _run_documents(work, documents, models, console, options)
    except ValueError:  # with these models it never ends; a full disk or a kill can be gone on from
      shutil.rmtree(work)
      raise
    remarks = [remark for document in documents for remark in document.remarks]
    parents = [parent_of(path) for path in _folders(models)]
    card = recipe_card(out.name, text, parents, kept=prepared.plan.kept, remarks=remarks)
    write_text(target / "README.md", card)
    target.rename(out)
    shutil.rmtree(work)
  for name in prepared.plan.kept[:5]:
    console.print(f"note: {name} is not in all models, and was kept as it is", highlight=False, markup=False)
  size = f"{len(prepared.plan.outputs)} tensors, {prepared.num_bytes / MEGABYTE:,.1f} MB"
  console.print(f"{out}: {size}", highlight=False, markup=False)


def _run_documents(
  work: Path,
  documents: Sequence[Recipe],
  models: Mapping[ModelReference, OpenModel],
  console: Console,
  options: MergeOptions,
) -> tuple[Prepared, Path]:
  """Each document's result as a folder in the work folder; returns the last one's."""
  known = dict(models)
  steps = {document.name: work / f"step-{number}" for number, document in enumerate(documents)}
  for document in documents:
    for model in document.models:
      if model not in known:
        known[model] = open_model(model, steps[model.path])
    prepared = _prepare(document, known, options)
    steps[document.name].mkdir(exist_ok=True)
    _write_weights(steps[document.name], prepared, console, options)
    other = prepared.models[document.models[0]].folder
    write_small_files(steps[document.name], prepared.config, prepared.tokenizer, prepared.template, other)
    if prepared.vocabulary is not None:
      prepared.vocabulary.write(steps[document.name])
  return prepared, steps[documents[-1].name]


def _folders(models: Mapping[ModelReference, OpenModel]) -> list[Path]:
  """The folders of models and adapters."""
  adapters = [Path(reference.lora) for reference in models if reference.lora]
  return list(dict.fromkeys([*(model.folder for model in models.values()), *adapters]))


def _fingerprint(text: str, models: Mapping[ModelReference, OpenModel], options: MergeOptions) -> str:
  """What shards depend on: recipe, options, and the files of the models as they are."""
  files = sorted({file for model in models.values() for file in model.files})
  stats = [(str(file.absolute()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
  about = [cqd_jax.__version__, text, dataclasses.asdict(options), stats]
  return hashlib.sha256(json.dumps(about).encode()).hexdigest()


def _go_on_or_begin(work: Path, fingerprint: str) -> None:
  """Empties a work folder unless it is of the same merge."""
  try:
    same = read_json(work / STATE) == {"fingerprint": fingerprint}
  except RunDirError:
    same = False
  if same:
    return
  for path in work.iterdir():
    if path.name != ".lock":
      shutil.rmtree(path) if path.is_dir() else path.unlink()
  write_json(work / STATE, {"fingerprint": fingerprint})


def shards_of(outputs: Iterable[Output], max_shard_bytes: int) -> dict[str, tuple[Output, ...]]:
  """The tensors of each file of weights."""
  shards: list[list[Output]] = [[]]
  size = 0
  for output in outputs:
    if shards[-1] and size + output.num_bytes > max_shard_bytes:
      shards.append([])
      size = 0
    shards[-1].append(output)
    size += output.num_bytes
  if len(shards) == 1:
    return {"model.safetensors": tuple(shards[0])}
  return {f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors": tuple(shard) for i, shard in enumerate(shards)}


def _write_weights(folder: Path, prepared: Prepared, console: Console, options: MergeOptions) -> None:
  """Writes the shards that are missing, and their index."""
  shards = shards_of(prepared.plan.outputs, options.max_shard_bytes)
  done = sum(one.num_bytes for file, shard in shards.items() if (folder / file).is_file() for one in shard)
  total = max(1, prepared.num_bytes // MEGABYTE)
  what = f"merging {prepared.recipe.name}, MB" if prepared.recipe.name else "merging, MB"
  key = jax.random.key(options.seed)
  with (
    progress(console, what, total, done=done // MEGABYTE) as advance,
    Reader() as reader,
  ):
    for file, shard in shards.items():
      if (folder / file).is_file():
        continue
      with ShardWriter(folder / file, [Entry(one.name, one.shape, one.dtype) for one in shard]) as writer:
        for output in shard:
          writer.write(make_tensor(output, prepared, reader, key))
          done = _advance(advance, done, output)
  if len(shards) > 1:
    weight_map = {output.name: file for file, shard in shards.items() for output in shard}
    index = {"metadata": {"total_size": prepared.num_bytes}, "weight_map": weight_map}
    write_text(folder / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")


def _advance(advance: Advance, done: int, output: Output) -> int:
  after = done + output.num_bytes
  if steps := after // MEGABYTE - done // MEGABYTE:
    advance(steps, note=output.name)
  return after


def make_tensor(output: Output, prepared: Prepared, reader: Reader, key: jax.Array) -> np.ndarray:
  """A tensor of the result.

  Args:
    output: which, and how it is made.
    prepared: the document.
    reader: of its models' files.
    key: of the whole merge; each tensor draws by its name.
  """
  models, method = prepared.models, prepared.recipe.method
  filled: Mapping[ModelReference, np.ndarray] = {}
  if output.rows and prepared.vocabulary is not None:
    matrices = {one.model: models[one.model].read(reader, one.name, output.compute) for one in output.rows}
    filled = prepared.vocabulary.filled(matrices, prepared.recipe.base)

  def read(one: Input) -> np.ndarray:
    return filled[one.model] if filled else models[one.model].read(reader, one.name, output.compute)

  if output.settings is None and not jnp.issubdtype(output.dtype, jnp.floating):
    return _same(output, models, reader)
  first = output.base if output.base is not None and not output.inputs else output.inputs[0]
  if output.settings is None or not output.inputs:
    return as_dtype(read(first), output.dtype, output.compute, output.name)
  tensors = np.empty((len(output.inputs), *output.shape), np.float32)
  for number, one in enumerate(output.inputs):
    tensors[number] = read(one)
  base = None if output.base is None else read(output.base)
  parameters = METHODS[method].parameters
  traced = {
    name: jnp.asarray(value, jnp.float32)
    for name, value in output.settings.items()
    if parameters[name].traced or name in output.varied
  }
  fixed = tuple((name, value) for name, value in output.settings.items() if name not in traced)
  own_key = jax.random.fold_in(key, zlib.crc32(output.name.encode()))
  merged = merge_tensors(own_key, base, tensors, traced, method=method, fixed=fixed)
  return as_dtype(merged, output.dtype, output.compute, output.name)


def _same(output: Output, models: Mapping[ModelReference, OpenModel], reader: Reader) -> np.ndarray:
  """A tensor of numbers that are no weights: all models must have the same."""
  first, *others = output.inputs
  tensor = models[first.model].tensors[first.name]
  own = read_tensor(reader, tensor, tensor.dtype)
  for other in others:
    theirs = models[other.model].tensors[other.name]
    if theirs.dtype != tensor.dtype or not np.array_equal(read_tensor(reader, theirs, theirs.dtype), own):
      raise RecipeError(
        f"{output.name}: its {tensor.dtype} differs between {first.model} and {other.model}; such is only copied"
      )
  return own


def _describe(documents: Sequence[Recipe], first: Prepared, options: MergeOptions, console: Console) -> None:
  """Says what would be done."""
  if len(documents) > 1:
    console.print(f"{len(documents)} merges one after the other; the first:")
  shards = shards_of(first.plan.outputs, options.max_shard_bytes)
  kept = f", {len(first.plan.kept)} of them as one model has them" if first.plan.kept else ""
  console.print(
    f"{first.recipe.method}: {len(first.plan.outputs)} tensors{kept}, {first.num_bytes / MEGABYTE:,.1f} MB in "
    f"{len(shards)} file{'s' * (len(shards) != 1)}; nothing was written",
    highlight=False,
  )


def _read_text(recipe: Path) -> str:
  try:
    return recipe.read_text(encoding="utf-8")
  except FileNotFoundError as error:
    raise ValueError(f"{recipe}: no such file; expected a recipe in mergekit's YAML") from error
  except UnicodeDecodeError as error:
    raise ValueError(f"{recipe}: not text in UTF-8 ({error.reason} at byte {error.start})") from error
