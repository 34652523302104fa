"""Writes a model as a Hugging Face folder: config, tokenizer, weights in shards, and a card."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from cqd_jax.hub.tensor_files import transpose
from cqd_jax.models.config import DecoderConfig
from cqd_jax.models.hf_config import hf_config
from cqd_jax.models.hf_layout import Placement, placements
from cqd_jax.store.run_dir import write_json, write_text
from cqd_jax.trees import Path as TreePath
from cqd_jax.trees import leaf_path
from cqd_jax.types import Params

TOKENIZER_FILES = (
  "tokenizer*",
  "special_tokens_map.json",
  "added_tokens.json",
  "vocab*",
  "merges*",
  "*.model",
  "*.tiktoken",
  "tekken.json",
  "normalizer.json",
  "chat_template*",
  "additional_chat_templates/*.jinja",
)
"""Patterns of the files that a tokenizer of transformers may consist of."""

ABOUT = "model.json"

SHARD_BYTES = 2_000_000_000


def save_pretrained(
  folder: str | os.PathLike[str],
  params: Params | Iterable[tuple[TreePath, Any]],
  config: DecoderConfig,
  tokenizer: Any = None,
  *,
  settings: Mapping[str, Any] | None = None,
  generation: Mapping[str, Any] | None = None,
  card: str = "",
  about: Mapping[str, Any] | None = None,
  max_shard_bytes: int = SHARD_BYTES,
) -> None:
  """Writes a model folder that transformers and vLLM load; it appears whole or not at all.

  Args:
    folder: must not exist.
    params: as `cqd_jax.models.decoder` lays them out, in bfloat16, float16 or float32; or their leaves one by one with
      their paths, as `CoreBasis.materialize_leaves` yields them, for a model that is never whole in memory.
    config: the decoder.
    tokenizer: a tokenizer of transformers, a folder whose tokenizer files are copied, or the contents of such files by
      their names; None: there is none.
    settings: further entries of `config.json`, as `ModelFolder.content` of the base has them.
    generation: content of `generation_config.json`; None or empty: not written.
    card: content of `README.md`; empty: not written.
    about: content of `model.json`: what the model is and where it comes from; None: not written.
    max_shard_bytes: a file of weights holds no more, but for a tensor that alone is larger.

  Raises:
    ValueError: if the folder exists; naming the leaf that is missing, too many, of another shape or dtype, or not
      finite; the tokenizer that is none; or if no architecture is such a decoder.
    OSError: naming the file that could not be written.
  """
  if max_shard_bytes < 1:
    raise ValueError(f"max_shard_bytes: expected at least 1, got {max_shard_bytes}")
  content = hf_config(config, settings)
  leaves = _leaves_of(params)
  with whole_folder(Path(folder)) as unfinished:
    content["torch_dtype"] = _write_weights(unfinished, leaves, placements(config), max_shard_bytes)
    write_json(unfinished / "config.json", content)
    if generation:
      write_json(unfinished / "generation_config.json", generation)
    write_tokenizer(unfinished, tokenizer)
    if about is not None:
      write_json(unfinished / ABOUT, about)
    if card:
      write_text(unfinished / "README.md", card)


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
  """Yields a folder to write into, which becomes `folder` at the end of the block; after an error there is nothing.

  Raises:
    ValueError: if there is such a folder.
  """
  if folder.exists():
    raise ValueError(f"{folder}: already exists; nothing was overwritten")
  unfinished = folder.with_name(f".{folder.name}.{os.getpid()}")
  shutil.rmtree(unfinished, ignore_errors=True)
  unfinished.mkdir(parents=True)
  try:
    yield unfinished
    unfinished.rename(folder)
  finally:
    shutil.rmtree(unfinished, ignore_errors=True)


def tokenizer_paths(folder: Path) -> list[Path]:
  """The files of a folder's tokenizer, relative to it, sorted."""
  found = {path.relative_to(folder) for pattern in TOKENIZER_FILES for path in folder.glob(pattern) if path.is_file()}
  return sorted(found)


def write_tokenizer(folder: Path, tokenizer: Any) -> None:
  """Writes a tokenizer of transformers into a folder, or copies the files of another folder or of a mapping."""
  if tokenizer is None:
    return
  if isinstance(tokenizer, Mapping):
    for name, text in tokenizer.items():
      write_text(folder / name, text)
    return
  if isinstance(tokenizer, str | os.PathLike):
    there = tokenizer_paths(Path(tokenizer))
    if not there:
      raise ValueError(f"tokenizer: {tokenizer} holds no tokenizer files")
    for path in there:
      (folder / path).parent.mkdir(exist_ok=True)
      shutil.copyfile(Path(tokenizer) / path, folder / path)
  elif hasattr(tokenizer, "save_pretrained"):
    tokenizer.save_pretrained(str(folder))
  else:
    raise ValueError(f"tokenizer: expected one of transformers, or a folder, got {type(tokenizer).__name__}")


def write_tensors(file: Path, tensors: Mapping[str, np.ndarray]) -> None:
  """Writes one safetensors file."""
  # safetensors writes the memory of an array as it lies, whatever its strides.
  whole = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
  try:
    save_file(whole, file, metadata={"format": "pt"})  # transformers asks for the format
  except SafetensorError as error:
    raise OSError(f"{file}: could not be written ({error})") from error
  mask = os.umask(0)  # which can only be read by setting it
  os.umask(mask)
  file.chmod(0o666 & ~mask)  # safetensors lets nobody else read


def _leaves_of(params: Any) -> Iterator[tuple[TreePath, Any]]:
  if isinstance(params, Mapping):
    for key_path, leaf in jax.tree.leaves_with_path(params):
      yield leaf_path(key_path), leaf
  else:
    yield from params


def _write_weights(
  folder: Path, leaves: Iterator[tuple[TreePath, Any]], wanted: tuple[Placement, ...], max_shard_bytes: int
) -> str:
  """Writes the weights as `model.safetensors`, or several files and their index; returns the name of their dtype."""
  missing = {placement.path: placement for placement in wanted}
  shards: list[list[str]] = []
  shard: dict[str, np.ndarray] = {}
  sizes: dict[str, int] = {}

  def close() -> None:
    write_tensors(folder / f"shard-{len(shards)}", shard)
    shards.append(list(shard))
    shard.clear()

  for path, leaf in leaves:
    if (placement := missing.pop(path, None)) is None:
      raise ValueError(f"params: has {'/'.join(path)}, which this decoder has not (or it came twice)")
    for name, tensor in _tensors_of(placement, leaf):
      if shard and sum(each.nbytes for each in shard.values()) + tensor.nbytes > max_shard_bytes:
        close()
      shard[name] = tensor
      sizes[tensor.dtype.name] = sizes.get(tensor.dtype.name, 0) + tensor.nbytes
  if missing:
    raise ValueError(f"params: misses {'/'.join(next(iter(missing)))}")
  close()
  _name_shards(folder, shards, sum(sizes.values()))
  return max(sizes, key=lambda name: sizes[name])


def _tensors_of(placement: Placement, leaf: Any) -> Iterator[tuple[str, np.ndarray]]:
  """The tensors of a leaf, checked."""
  name = "/".join(placement.path)
  if not hasattr(leaf, "dtype") or leaf.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
    raise ValueError(f"params at {name}: expected bfloat16, float16 or float32, got {getattr(leaf, 'dtype', leaf)}")
  if leaf.shape != placement.shape:
    raise ValueError(f"params at {name}: expected shape {placement.shape}, got {leaf.shape}")
  host = np.asarray(leaf)
  if not np.isfinite(host).all():
    raise ValueError(f"params at {name}: holds NaN or infinite values; nothing was written")
  for tensor_name, tensor in zip(placement.names, host if placement.stacked else host[None], strict=True):
    yield tensor_name, transpose(tensor) if placement.transposed else tensor


def _name_shards(folder: Path, shards: list[list[str]], num_bytes: int) -> None:
  """Gives the files the names by which they are found."""
  if len(shards) == 1:
    (folder / "shard-0").rename(folder / "model.safetensors")
    return
  weight_map: dict[str, str] = {}
  for number, names in enumerate(shards):
    file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
    (folder / f"shard-{number}").rename(folder / file)
    weight_map |= dict.fromkeys(names, file)
  index = {"metadata": {"total_size": num_bytes}, "weight_map": weight_map}
  write_text(folder / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")
