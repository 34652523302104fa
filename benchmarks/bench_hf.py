"""Reading a Hugging Face folder against the file system's own rate, and against the plain way; writing adapters.

Cold: the kernel is asked to forget the files before each run, so the disk is read. Warm: they are in memory, and what
is measured is moving and transposing. The peer "file system" only reads the bytes, by the same number of threads.
"""

import atexit
import functools
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import safe_open

from benchmarks.harness import Case
from cqd_jax.genotypes import CoreBasis
from cqd_jax.hub.load import load_pretrained, open_pretrained, save_pretrained
from cqd_jax.hub.save_adapter import save_adapter
from cqd_jax.hub.tensor_files import THREADS
from cqd_jax.low_rank import LowRank
from cqd_jax.models import DecoderConfig, init_params
from cqd_jax.models.hf_layout import placements
from cqd_jax.trees import is_matrix, map_with_path
from cqd_jax.types import Params

LARGE = DecoderConfig(32_000, 2048, 8192, num_layers=12, num_heads=16, num_kv_heads=4, head_dim=128)
"""0.86 billion parameters."""
SMALL = DecoderConfig(256, 64, 128, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16)

PIECE = 1 << 23


def cases(quick: bool) -> list[Case]:
  """Reading cold and warm, in bfloat16 and float32, one file and several; one adapter."""
  config = SMALL if quick else LARGE
  read = [
    _read_case(config, dtype, cold=cold, peer=peer, peer_name=name)
    for dtype in ("bfloat16", "float32")
    for cold, peer, name in (
      (True, _read_bytes, "file system"),
      (False, _read_bytes, "file system"),
      (False, _load_plainly, "safetensors, transpose, stack"),
    )
  ]
  return [*read, _adapter_case(config)]


def _read_case(config: DecoderConfig, dtype: str, *, cold: bool, peer: Callable[[Path], Any], peer_name: str) -> Case:
  def prepared(action: Callable[[Path], Any], folder: Path) -> Any:
    if cold:
      _forget(folder)
    return action(folder)

  size = sum(int(np.prod(placement.shape)) for placement in placements(config)) * jnp.dtype(dtype).itemsize
  return Case(
    name="load_pretrained",
    labels={"dtype": dtype, "cache": "cold" if cold else "warm", "GB": size / 1e9},
    function=functools.partial(prepared, _load),
    arguments=lambda: (_written(config, dtype),),
    bytes_moved=size,
    host=True,
    peer=functools.partial(prepared, peer),
    peer_name=peer_name,
  )


def _load(folder: Path) -> Params:
  loaded: Params = jax.block_until_ready(load_pretrained(folder).params)
  return loaded


def _read_bytes(folder: Path) -> None:
  """All bytes of the weights, into a buffer a thread."""

  def read(piece: tuple[int, int]) -> None:
    os.preadv(piece[0], [bytearray(PIECE)], piece[1])

  with ThreadPoolExecutor(THREADS) as pool:
    for file in sorted(folder.glob("*.safetensors")):
      descriptor = os.open(file, os.O_RDONLY)
      list(pool.map(read, [(descriptor, start) for start in range(0, file.stat().st_size, PIECE)]))
      os.close(descriptor)


def _load_plainly(folder: Path) -> dict[str, Any]:
  """Tensor by tensor through safetensors, transposed by NumPy, stacked at the end."""
  config = open_pretrained(folder).config
  index = folder / "model.safetensors.index.json"
  shards = set(json.loads(index.read_text())["weight_map"].values()) if index.is_file() else {"model.safetensors"}
  tensors: dict[str, np.ndarray] = {}
  for shard in sorted(shards):
    with safe_open(folder / shard, framework="np") as file:
      tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
  leaves = {}
  for placement in placements(config):
    own = [tensors.pop(name) for name in placement.names]
    own = [np.ascontiguousarray(tensor.T) for tensor in own] if placement.transposed else own
    leaves["/".join(placement.path)] = jnp.asarray(np.stack(own) if placement.stacked else own[0])
  return jax.block_until_ready(leaves)


def _forget(folder: Path) -> None:
  """Asks the kernel to drop the files from its cache."""
  for file in folder.glob("*.safetensors"):
    descriptor = os.open(file, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


@functools.cache
def _temporary() -> Path:
  """A folder for the files of this process, removed at its end."""
  folder = Path(tempfile.mkdtemp(prefix="bench_hf"))
  atexit.register(shutil.rmtree, folder, ignore_errors=True)
  return folder


def _written(config: DecoderConfig, dtype: str) -> Path:
  """A folder with random weights, on disk for good."""
  folder = _temporary() / f"{dtype}-{config.hidden_size}"
  if not folder.exists():
    save_pretrained(folder, init_params(jax.random.key(0), config, jnp.dtype(dtype)), config)
    os.sync()
  return folder


def _adapter_case(config: DecoderConfig) -> Case:
  """One child of three experts of rank 16 as an adapter, by singular values of its cores."""

  def arguments() -> tuple[CoreBasis, Params]:
    source = np.random.default_rng(0)
    base = init_params(jax.random.key(0), config, jnp.bfloat16)

    def update(path: tuple[str, ...], leaf: jax.Array) -> LowRank | None:
      if path[0] != "layers" or not is_matrix(path, leaf):
        return None
      *stack, rows, columns = leaf.shape
      return LowRank(*(jnp.asarray(source.normal(size=(*stack, *own))) for own in ((rows, 16), (16, columns))))

    basis = CoreBasis.from_experts(base, [map_with_path(update, base) for _ in range(3)])
    return basis, jax.tree.map(lambda leaf: leaf.mean(axis=0), basis.experts)

  def write(basis: CoreBasis, genotype: Params) -> None:
    folder = _temporary() / "adapter"
    save_adapter(folder, basis, genotype, config, base_name="base", dtype=jnp.bfloat16)
    shutil.rmtree(folder)

  return Case(
    name="save_adapter",
    labels={"dtype": "bfloat16", "rank": 48},
    function=write,
    arguments=arguments,
    items=1,
    item="adapters",
    host=True,
  )
