"""The models of a recipe: folders opened by the names of their tensors, which are read one by one."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from cqd_jax.hub.load_adapter import AdapterFolder, is_adapter, open_adapter_of
from cqd_jax.hub.recipe_plan import KeyTable
from cqd_jax.hub.recipe_values import ModelReference, RecipeError
from cqd_jax.hub.tensor_files import DTYPES, NUMBERS, DamagedWeights, Reader, Tensor, find_tensors
from cqd_jax.store.run_dir import read_json


@dataclasses.dataclass(frozen=True)
class OpenModel:
  """A model folder none of whose weights was read.

  Attributes:
    folder: where it is.
    config: content of `config.json`.
    tensors: by name.
    adapter: on top of it.
  """

  folder: Path
  config: Mapping[str, Any]
  tensors: Mapping[str, Tensor]
  adapter: AdapterFolder | None

  @property
  def table(self) -> KeyTable:
    """What a plan needs to know."""
    return KeyTable({name: (one.shape, one.dtype) for name, one in self.tensors.items()}, is_tied(self.config))

  @property
  def files(self) -> list[Path]:
    """All files of weights."""
    adapter = self.adapter
    factors = [part for one in adapter.modules.values() for part in (one.a, one.b)] if adapter else []
    replaced = list(adapter.replaced.values()) if adapter else []
    return sorted({tensor.file for tensor in (*self.tensors.values(), *factors, *replaced)})

  def read(self, reader: Reader, name: str, compute: np.dtype[Any] | None) -> np.ndarray:
    """A tensor with what the adapter changes, as float32, rounded to `compute` first (None: not)."""
    tensor = self.tensors[name]
    if self.adapter is not None:
      tensor = self.adapter.replaced.get(name, tensor)
    whole = read_tensor(reader, tensor, np.dtype(np.float32))
    module = self.adapter.modules.get(name.removesuffix(".weight")) if self.adapter is not None else None
    if module is not None:
      a = read_tensor(reader, module.a, np.dtype(np.float32))
      b = read_tensor(reader, module.b, np.dtype(np.float32))
      # PEFT keeps the factors of an embedding transposed: B A is [d, V] where the weight is [V, d].
      change = np.float32(module.scale) * (b @ a)
      whole = whole + (change if "embedding" not in module.a.name else change.T)
    if compute is None or compute == np.float32:
      return whole
    with np.errstate(over="ignore"):
      rounded = whole.astype(compute).astype(np.float32)
    if not np.isfinite(rounded).all():
      raise DamagedWeights(f"{tensor.file}: the tensor {name!r} holds values that do not fit in {compute.name}")
    return rounded

  def changes(self, name: str) -> bool:
    """Whether the adapter changes a tensor."""
    adapter = self.adapter
    return adapter is not None and (name in adapter.replaced or name.removesuffix(".weight") in adapter.modules)


def open_model(reference: ModelReference, folder: Path) -> OpenModel:
  """Opens a model.

  Args:
    reference: as a recipe names it.
    folder: where it is.

  Raises:
    RecipeError: if there is no such folder.
    ValueError: naming what is wrong with the folder or the adapter.
  """
  for path in (folder, *([Path(reference.lora)] if reference.lora else [])):
    if not path.is_dir():
      raise RecipeError(f"{path}: no such folder; expected one that holds a model (nothing is downloaded)")
  if is_adapter(folder):
    raise RecipeError(f"{folder}: is a LoRA adapter; expected BASE+{folder}, with the model that it belongs on top of")
  content = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
  if not isinstance(content, dict):
    raise RecipeError(f"{folder / 'config.json'}: expected settings by name, got {type(content).__name__}")
  tensors = find_tensors(folder, dtypes={**DTYPES, **NUMBERS})
  adapter = None
  if reference.lora:
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    adapter = open_adapter_of(Path(reference.lora), shapes, tied=is_tied(content) and "lm_head.weight" not in shapes)
  return OpenModel(folder, content, tensors, adapter)


def is_tied(config: Mapping[str, Any]) -> bool:
  """Whether a config says that the head is the embedding."""
  text = config.get("text_config")
  own = config.get("tie_word_embeddings", text.get("tie_word_embeddings") if isinstance(text, dict) else None)
  return bool(own)


def read_tensor(reader: Reader, tensor: Tensor, dtype: np.dtype[Any]) -> np.ndarray:
  """A tensor of any number of axes; what is no float of `DTYPES` is read as it is."""
  out = np.empty(tensor.shape, dtype if tensor.dtype in DTYPES.values() else tensor.dtype)
  if not out.size:
    return out
  if tensor.dtype not in DTYPES.values():
    return np.fromfile(tensor.file, tensor.dtype, out.size, offset=tensor.offset).reshape(tensor.shape)
  columns = tensor.shape[-1] if tensor.shape else 1
  flat = tensor._replace(shape=(out.size // columns, columns))
  reader.read(flat, out.reshape(flat.shape))
  return out


def as_dtype(array: Any, dtype: np.dtype[Any], compute: np.dtype[Any] | None, name: str) -> np.ndarray:
  """A merged tensor in the dtype of the result.

  Raises:
    DamagedWeights: naming the tensor, if a value is not finite there.
  """
  with np.errstate(over="ignore"):
    merged = np.asarray(array)
    rounded = (merged if compute is None else merged.astype(compute)).astype(dtype)
  if not bool(jnp.isfinite(rounded).all()):
    raise DamagedWeights(f"{name}: the merge has NaN or infinite values, or such as do not fit in {dtype.name}")
  return rounded
