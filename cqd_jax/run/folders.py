"""A base model and its experts from Hugging Face folders: opened and checked, then read into the space of a run."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from rich.console import Console

from cqd_jax.config.settings import ExperimentSettings
from cqd_jax.genotypes import CoreBasis
from cqd_jax.hub.experts import Expert, open_expert
from cqd_jax.hub.load import CONFIG, GENERATION_CONFIG, ModelFolder, load_pretrained, open_pretrained
from cqd_jax.hub.load_adapter import ADAPTER_CONFIG
from cqd_jax.hub.save import tokenizer_paths
from cqd_jax.hub.tensor_files import Reader
from cqd_jax.low_rank import LowRank
from cqd_jax.terminal.progress import megabytes
from cqd_jax.trees import Path as TreePath
from cqd_jax.trees import map_with_path
from cqd_jax.types import Genotype, Params

SAMPLES, SAMPLE_BYTES = 64, 1 << 16
"""How many pieces of each file of weights, and of what size, tell it from another."""


@dataclasses.dataclass(frozen=True)
class Folders:
  """The models of an experiment on folders; none of their weights was read.

  Attributes:
    base: the base model.
    experts: one per task, in the tasks' order.
  """

  base: ModelFolder
  experts: tuple[Expert, ...]

  def fingerprints(self) -> dict[str, str]:
    """What a run remembers of its models, by folder: to be the same when it is resumed."""
    return {
      str(folder.absolute()): _fingerprint(folder)
      for folder in (self.base.folder, *(one.folder for one in self.experts))
    }


def open_folders(settings: ExperimentSettings) -> Folders | None:
  """Opens and checks the folders that the settings name; None where models are trained.

  Raises:
    ValueError: naming the folder, and what is wrong with it or in what it differs from the base.
  """
  if settings.base is None:
    return None
  base = open_pretrained(settings.base)
  return Folders(base, tuple(open_expert(folder, base) for folder in settings.experts))


def load_base(folders: Folders, mesh: Mesh | None, console: Console) -> Params:
  """The params of the base, on the mesh where there is one."""
  with megabytes(console, "reading the base, MB", folders.base.num_bytes) as on_read:
    return load_pretrained(folders.base.folder, mesh=mesh, on_read=on_read).params


def dense_experts(folders: Folders, base: Params, console: Console) -> Genotype:
  """The experts' task vectors, leaves `[K, ...]` in the dtypes of the base."""
  with megabytes(console, "reading the experts, MB", _bytes_to_compare(folders)) as on_read, Reader(on_read) as reader:

    def stack(path: TreePath, leaf: jax.Array) -> jax.Array:
      changes = []
      for expert in folders.experts:
        update = expert.update(reader, path)
        if isinstance(update, LowRank):
          update = np.matmul(*update)
        change = np.zeros(leaf.shape, np.float32) if update is None else update
        changes.append(jnp.asarray(change).astype(leaf.dtype))
      return jnp.stack(changes)

    return map_with_path(stack, base)


def core_experts(folders: Folders, base: Params, rank: int | None, console: Console) -> CoreBasis:
  """The experts in core space: adapters exactly, whole models truncated to `rank`. One leaf at a time is dense."""
  with (
    megabytes(console, "experts to core space, MB", _bytes_to_compare(folders)) as on_read,
    Reader(on_read) as reader,
  ):

    def update(expert: Expert, path: TreePath, leaf: jax.Array) -> Any:
      if expert.adapter is not None:
        return expert.update(reader, path)
      return LazyUpdate(leaf.shape, functools.partial(expert.update, reader, path))

    trees = [map_with_path(functools.partial(update, expert), base) for expert in folders.experts]
    return CoreBasis.from_experts(base, trees, rank=rank)


@dataclasses.dataclass(frozen=True)
class LazyUpdate:
  """A dense change of a leaf that is read when it is made an array.

  Attributes:
    shape: of the leaf.
    read: reads it.
  """

  shape: tuple[int, ...]
  read: Callable[[], Any]

  def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
    del copy
    return np.asarray(self.read(), dtype)


def _bytes_to_compare(folders: Folders) -> int:
  """A whole model is read beside the base; an adapter by itself."""
  return sum(one.num_bytes + (0 if one.model is None else folders.base.num_bytes) for one in folders.experts)


def _fingerprint(folder: Path) -> str:
  """Of what a model is made of, and of samples of its weights: whole, many gigabytes would be read at each start."""
  digest = hashlib.sha256()
  texts = {CONFIG, GENERATION_CONFIG, ADAPTER_CONFIG}
  for path in tokenizer_paths(folder):
    digest.update(str(path).encode() + (folder / path).read_bytes())
  for file in sorted(folder.glob("*")):
    if file.name in texts or file.name.endswith(".safetensors.index.json"):
      digest.update(file.name.encode() + file.read_bytes())
    elif file.suffix == ".safetensors":
      size = file.stat().st_size
      digest.update(f"{file.name}{size}".encode())
      with file.open("rb") as stream:
        for start in np.linspace(0, max(0, size - SAMPLE_BYTES), SAMPLES, dtype=np.int64).tolist():
          stream.seek(start)
          digest.update(stream.read(SAMPLE_BYTES))
  return digest.hexdigest()
