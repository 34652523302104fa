"""Models in Hugging Face folders: read into params tensor by tensor, and written as transformers and vLLM load them.

transformers is used only for tokenizers, and imported when one is asked for; PyTorch is never needed.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, Sharding

from cqd_jax.genotypes.placement import param_shardings
from cqd_jax.hub.load_adapter import ADAPTER_CONFIG
from cqd_jax.hub.save import save_pretrained
from cqd_jax.hub.tensor_files import (
  DamagedWeights,
  Reader,
  Tensor,
  aligned_empty,
  check_dtype,
  find_tensors,
  same_values,
)
from cqd_jax.models.config import DecoderConfig
from cqd_jax.models.hf_config import decoder_config
from cqd_jax.models.hf_layout import Placement, param_shapes, placements
from cqd_jax.store.run_dir import read_json
from cqd_jax.trees import Path as TreePath
from cqd_jax.types import Params

__all__ = ["ModelFolder", "Pretrained", "load_pretrained", "open_pretrained", "save_pretrained"]

CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
EMBEDDING_NAME, HEAD_NAME = "model.embed_tokens.weight", "lm_head.weight"

NOT_WEIGHTS = (".rotary_emb.inv_freq", ".masked_bias", ".attn.bias")
"""Endings of tensors that older versions wrote beside the weights; they follow from the config."""


@dataclasses.dataclass(frozen=True)
class ModelFolder:
  """A Hugging Face model folder that was checked, and none of whose weights was read.

  Attributes:
    folder: where it is.
    config: the decoder.
    content: of `config.json`.
    generation: of `generation_config.json`; empty where there is none.
    tensors: by name, all that the params are made of.
  """

  folder: Path
  config: DecoderConfig
  content: Mapping[str, Any]
  generation: Mapping[str, Any]
  tensors: Mapping[str, Tensor]

  @functools.cached_property
  def tokenizer(self) -> Any:
    """The tokenizer, by transformers; None if the folder has none."""
    return load_tokenizer(self.folder)

  @functools.cached_property
  def dtype(self) -> np.dtype[Any]:
    """The dtype in which most of the weights are."""
    sizes: dict[np.dtype[Any], int] = {}
    for tensor in self.tensors.values():
      sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.num_bytes
    return max(sizes, key=lambda dtype: sizes[dtype])

  @property
  def num_bytes(self) -> int:
    """Of the weights on disk."""
    return sum(tensor.num_bytes for tensor in self.tensors.values())

  @functools.cached_property
  def end_ids(self) -> tuple[int, ...]:
    """The tokens that end an answer: of the generation config, of the config, or of the tokenizer; () if none says.

    Raises:
      ValueError: naming the file in which they are no token ids.
    """
    for file, content in ((GENERATION_CONFIG, self.generation), (CONFIG, self.content)):
      if (given := content.get("eos_token_id")) is None:
        continue
      ids = tuple(given) if isinstance(given, list) else (given,)
      if not all(type(each) is int and 0 <= each < self.config.vocab_size for each in ids):
        expected = f"ids in [0, {self.config.vocab_size})"
        raise ValueError(f"{self.folder / file}: eos_token_id: expected {expected}, got {given!r}")
      return ids
    own = getattr(self.tokenizer, "eos_token_id", None)
    return () if own is None else (own,)

  @functools.cached_property
  def placements(self) -> dict[TreePath, Placement]:
    """What each leaf of the params is made of, by its path."""
    return {placement.path: placement for placement in placements(self.config)}

  def shapes(self, dtype: jax.typing.DTypeLike | None = None) -> Params:
    """The params with `jax.ShapeDtypeStruct` in the place of arrays."""
    return param_shapes(self.config, self.dtype if dtype is None else dtype)

  def read_part(self, reader: Reader, path: TreePath, part: tuple[slice, ...], dtype: Any = None) -> np.ndarray:
    """A part of a leaf of the params, on the host; only its bytes are read.

    Args:
      reader: reads.
      path: of the leaf.
      part: a slice of step 1 for each of its axes.
      dtype: of the result; None: that of `self`.

    Raises:
      DamagedWeights: naming file and tensor.
    """
    placement = self.placements[path]
    bounds = [range(*own.indices(size)) for own, size in zip(part, placement.shape, strict=True)]
    out = aligned_empty(tuple(map(len, bounds)), np.dtype(dtype or self.dtype))
    layers = bounds.pop(0) if placement.stacked else range(1)
    own = tuple(slice(each.start, each.stop) for each in (bounds[::-1] if placement.transposed else bounds))
    for index, layer in enumerate(layers):
      place = out[index] if placement.stacked else out
      reader.read(self.tensors[placement.names[layer]], place, transposed=placement.transposed, part=own)
    return out

  def read(self, reader: Reader, path: TreePath, dtype: Any = None, sharding: Sharding | None = None) -> jax.Array:
    """A leaf of the params as an array: on the default device, or on the devices of a sharding, each its part."""
    shape = self.placements[path].shape
    if sharding is None:
      return jax.device_put(self.read_part(reader, path, (slice(None),) * len(shape), dtype))
    by_part: dict[str, list[tuple[jax.Device, tuple[slice, ...]]]] = {}
    for device, part in sharding.addressable_devices_indices_map(shape).items():
      assert part is not None
      by_part.setdefault(str(part), []).append((device, part))
    arrays = []
    for owners in by_part.values():
      piece = self.read_part(reader, path, owners[0][1], dtype)
      arrays += [jax.device_put(piece, device) for device, _ in owners]
    return jax.make_array_from_single_device_arrays(shape, sharding, arrays)

  def read_leaves(
    self, reader: Reader, dtype: Any = None, mesh: Mesh | None = None
  ) -> Iterator[tuple[TreePath, jax.Array]]:
    """All leaves, one by one, in the order of the tree."""
    shardings: list[NamedSharding | None] = [None] * len(self.placements)
    if mesh is not None:
      shardings = jax.tree.leaves(param_shardings(self.shapes(dtype), mesh))
    for path, sharding in zip(self.placements, shardings, strict=True):
      yield path, self.read(reader, path, dtype, sharding)


@dataclasses.dataclass(frozen=True)
class Pretrained:
  """A model that was read.

  Attributes:
    params: as `cqd_jax.models.decoder` lays them out.
    config: the decoder.
    source: the folder.
  """

  params: Params
  config: DecoderConfig
  source: ModelFolder

  @property
  def tokenizer(self) -> Any:
    """The folder's tokenizer, by transformers; None if it has none."""
    return self.source.tokenizer


def load_pretrained(
  folder: str | os.PathLike[str],
  dtype: jax.typing.DTypeLike | None = None,
  *,
  mesh: Mesh | None = None,
  on_read: Callable[[int], None] | None = None,
) -> Pretrained:
  """Reads a model folder of Hugging Face: Llama, Mistral, Qwen2 or Qwen3, one safetensors file or several.

  Tensors are read block by block to their place: the host needs the memory of the params that its devices hold on the
  host, and of one leaf at a time of those that they hold elsewhere.

  Args:
    folder: of the model.
    dtype: of the params, to which weights are rounded; None: the one in which most of the weights are.
    mesh: where the params go, as `cqd_jax.genotypes.placement.param_shardings` parts them: each device reads its part
      alone. None: the default device.
    on_read: called now and then with the number of bytes that were read since.

  Returns:
    The model; `.params`, `.config`, `.tokenizer`.

  Raises:
    ValueError: naming folder, file, tensor or setting: see `open_pretrained`; weights that are not finite, or do not
      fit `dtype`; a `dtype` of another kind.
  """
  if dtype is not None:
    check_dtype(dtype)
  opened = open_pretrained(folder)
  with Reader(on_read) as reader:
    check_tied_head(opened, reader)
    leaves = [leaf for _, leaf in opened.read_leaves(reader, dtype, mesh)]
  structure: Any = jax.tree.structure(opened.shapes())
  return Pretrained(jax.tree.unflatten(structure, leaves), opened.config, opened)


def open_pretrained(folder: str | os.PathLike[str]) -> ModelFolder:
  """Opens a model folder: reads its config and the headers of its files, and checks that they agree.

  Raises:
    UnsupportedModel: naming the architecture or the feature.
    DamagedWeights: naming the file that is missing, damaged or a pickle; the tensor that is missing, has another shape,
      or is one too many.
    ValueError: naming the folder, if it is no model folder or an adapter lies beside the model, or the setting that
      cannot be.
  """
  path = Path(folder)
  content = read_config(path)
  config = decoder_config(content, str(path / CONFIG))
  refuse_adapter_beside_model(path)
  tensors = find_tensors(path)
  if config.tie_embeddings and EMBEDDING_NAME not in tensors and HEAD_NAME in tensors:
    tensors[EMBEDDING_NAME] = tensors.pop(HEAD_NAME)  # either name of a pair will do
  check_tensors(config, tensors, path)
  generation = read_json(path / GENERATION_CONFIG) if (path / GENERATION_CONFIG).is_file() else {}
  if not isinstance(generation, dict):
    raise ValueError(f"{path / GENERATION_CONFIG}: expected settings by name, got {type(generation).__name__}")
  return ModelFolder(path, config, content, generation, tensors)


def refuse_adapter_beside_model(folder: Path) -> None:
  """Raises ValueError where a folder holds both a whole model and an adapter: nobody knows which is meant."""
  weights = sorted(
    path.name for pattern in ("model*.safetensors", "pytorch_model*.bin") for path in folder.glob(pattern)
  )
  if weights and (folder / ADAPTER_CONFIG).is_file():
    adapter = [ADAPTER_CONFIG, *sorted(path.name for path in folder.glob("adapter_model*"))]
    raise ValueError(
      f"{folder}: holds a whole model ({weights[0]}) and an adapter ({', '.join(adapter)}); move the one that is not "
      "meant to another folder"
    )


def read_config(folder: Path) -> dict[str, Any]:
  """The `config.json` of a folder.

  Raises:
    ValueError: naming the folder, with what it is, if it is no model folder.
  """
  if not folder.is_dir():
    raise ValueError(f"{folder}: no such model folder")
  if not (folder / CONFIG).is_file():
    kinds = {
      "adapter_config.json": "it is a PEFT adapter, which belongs to a base model",
      "model.json": "it is a model folder of a run of the miniature, not of Hugging Face",
      "run.json": "it is a run directory; its models are in models/",
    }
    kind = next((text for name, text in kinds.items() if (folder / name).is_file()), f"it has no {CONFIG}")
    raise ValueError(f"{folder}: not a Hugging Face model folder ({kind})")
  content = read_json(folder / CONFIG)
  if not isinstance(content, dict):
    raise ValueError(f"{folder / CONFIG}: expected settings by name, got {type(content).__name__}")
  return content


def check_tensors(config: DecoderConfig, tensors: Mapping[str, Tensor], folder: Path) -> None:
  """Raises `DamagedWeights` unless there is every tensor of a decoder, in its shape, and no other."""
  if config.num_layers > len(tensors):  # before a list of so many names is made
    raise DamagedWeights(
      f"{folder}: misses tensors: there are {len(tensors)}, and by {CONFIG} there are {config.num_layers} layers"
    )
  wanted = {name: placement.tensor_shape for placement in placements(config) for name in placement.names}
  if missing := [name for name in wanted if name not in tensors]:
    more = f" and {len(missing) - 1} more" if missing[1:] else ""
    raise DamagedWeights(f"{folder}: misses the tensor {missing[0]!r}{more}")
  for name, shape in wanted.items():
    if tensors[name].shape != shape:
      raise DamagedWeights(
        f"{tensors[name].file}: {name!r} has shape {tensors[name].shape}, and by {CONFIG} it has {shape}"
      )
  known = {*wanted, HEAD_NAME} if config.tie_embeddings else wanted.keys()
  extra = [name for name in tensors if name not in known and not name.endswith(NOT_WEIGHTS)]
  if extra:
    more = f" and {len(extra) - 1} more" if extra[1:] else ""
    raise DamagedWeights(
      f"{tensors[extra[0]].file}: has the tensor {extra[0]!r}{more}, which a model of this {CONFIG} has not"
    )


def load_tokenizer(folder: Path) -> Any:
  """The tokenizer of a folder, by transformers; None if it has none.

  Raises:
    ValueError: naming the folder, if its tokenizer cannot be read.
  """
  if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
    return None
  os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # as that there is no PyTorch
  from transformers import AutoTokenizer

  try:
    return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
  except Exception as error:  # of many kinds, some of them of Rust
    raise ValueError(f"{folder}: its tokenizer cannot be read ({_first_line(error)})") from error


def check_tied_head(opened: ModelFolder, reader: Reader) -> None:
  """Raises `DamagedWeights` if a tied model comes with a head of its own that is not the embedding."""
  head = opened.tensors.get(HEAD_NAME)
  if head is None or not opened.config.tie_embeddings:
    return
  if not same_values(reader, head, opened.tensors[EMBEDDING_NAME]):
    raise DamagedWeights(
      f"{head.file}: {head.name!r} is not the embedding, though {CONFIG} has tie_word_embeddings=true; set it to false "
      "to keep both"
    )


def _first_line(error: BaseException) -> str:
  lines = str(error).strip().splitlines()
  return lines[0][:300] if lines else type(error).__name__
