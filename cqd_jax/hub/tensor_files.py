"""Tensors in the safetensors files of a folder: found without reading them, then read block by block to their place.

A checkpoint keeps matrices as `[out, in]` where params have `[in, out]`, so nearly all of a model is transposed on its
way. That is done on blocks that stay in the cache, in the threads that read, while others wait for the disk.
"""

import json
import math
import os
import shlex
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from cqd_jax.store.run_dir import read_json

DTYPES = {"BF16": np.dtype(jnp.bfloat16), "F16": np.dtype(np.float16), "F32": np.dtype(np.float32)}
"""Dtypes of weights that are read, by their names in a file."""

NUMBERS = {
  name: np.dtype(kind)
  for name, kind in (
    ("I64", np.int64),
    ("I32", np.int32),
    ("I16", np.int16),
    ("I8", np.int8),
    ("U8", np.uint8),
    ("BOOL", np.bool_),
  )
}
"""Dtypes of what models hold beside weights, as positions and counts: it is copied, and never computed with."""

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")

THREADS = 4
BLOCK_ROWS = 256
"""Rows of a tensor that are read and transposed at once."""
COLUMNS = 64
"""Of them so many are transposed at once."""
PADDING = 64
"""Bytes between rows of a block; without it a column's entries would compete for the same lines of the cache."""
PIECE = 1 << 23
"""Bytes that are read at once where nothing is transposed."""


def check_dtype(dtype: Any) -> None:
  """Raises a `ValueError` unless a dtype is one of `DTYPES`."""
  if np.dtype(dtype) not in DTYPES.values():
    raise ValueError(f"dtype: expected one of {', '.join(map(str, DTYPES.values()))}, got {np.dtype(dtype)}")


class DamagedWeights(ValueError):
  """Weights that cannot be used: not whole, of another kind, not finite. The message names file and tensor."""


class Tensor(NamedTuple):
  """Where a tensor is.

  Attributes:
    name: its name.
    file: the file that holds it.
    offset: of its first byte in the file.
    shape: its shape.
    dtype: one of `DTYPES`, or of `NUMBERS` where these were asked for.
  """

  name: str
  file: Path
  offset: int
  shape: tuple[int, ...]
  dtype: np.dtype[Any]

  @property
  def num_bytes(self) -> int:
    """Its size in the file."""
    return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


def find_tensors(folder: Path, stem: str = "model", dtypes: Mapping[str, np.dtype[Any]] = DTYPES) -> dict[str, Tensor]:
  """All tensors of a folder by name, from the files' headers.

  Args:
    folder: holds `STEM.safetensors`, or several files and `STEM.safetensors.index.json`.
    stem: "model", or "adapter_model".
    dtypes: those that there may be, by their names in a file.

  Raises:
    DamagedWeights: naming the file that is missing, not whole, or of another dtype; saying that pickle files are
      never loaded, where there are no others.
  """
  single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
  if single.is_file():
    return read_header(single, dtypes)
  if not index.is_file():
    raise DamagedWeights(_nothing_to_read(folder, stem))
  content = read_json(index)
  entries = content.get("weight_map") if isinstance(content, dict) else None
  if not isinstance(entries, dict) or not entries or not all(isinstance(file, str) for file in entries.values()):
    raise DamagedWeights(f"{index}: damaged, it has no weight_map that names the file of each tensor")
  headers: dict[str, dict[str, Tensor]] = {}
  found: dict[str, Tensor] = {}
  for name, file in entries.items():
    if Path(file).name != file:
      raise DamagedWeights(f"{index}: expected names of files in the folder, got {file!r}")
    if file not in headers:
      if not (folder / file).is_file():
        raise DamagedWeights(f"{folder / file}: is missing, and {index.name} names it")
      headers[file] = read_header(folder / file, dtypes)
    if name not in headers[file]:
      raise DamagedWeights(f"{folder / file}: misses the tensor {name!r}, which {index.name} says is there")
    found[name] = headers[file][name]
  return found


def read_header(file: Path, dtypes: Mapping[str, np.dtype[Any]] = DTYPES) -> dict[str, Tensor]:
  """The tensors of one safetensors file.

  Raises:
    DamagedWeights: naming the file, if it is no whole safetensors file, or a tensor is of another dtype than `dtypes`.
  """
  try:
    with safe_open(file, framework="np"):
      pass  # checks the header, and that what it says fills the file
    with file.open("rb") as stream:
      length = int.from_bytes(stream.read(8), "little")
      header = json.loads(stream.read(length))
  except (SafetensorError, ValueError) as error:
    raise DamagedWeights(f"{file}: not a whole safetensors file ({error})") from error
  header.pop("__metadata__", None)
  tensors = {}
  for name, about in header.items():
    if about["dtype"] not in dtypes:
      raise DamagedWeights(
        f"{file}: {name!r} is of dtype {about['dtype']}; supported are {', '.join(dtypes)} (no quantized weights)"
      )
    start = 8 + length + about["data_offsets"][0]
    tensors[name] = Tensor(name, file, start, tuple(about["shape"]), dtypes[about["dtype"]])
  return tensors


class Reader:
  """Reads tensors in a few threads; a context manager that holds the files open.

  Args:
    on_read: called with the number of bytes that were read, in any thread.
  """

  def __init__(self, on_read: Callable[[int], None] | None = None):
    self._on_read = on_read or (lambda _: None)
    self._pool = ThreadPoolExecutor(THREADS)
    self._files: dict[Path, int] = {}
    self._local = threading.local()

  def __enter__(self) -> "Reader":
    return self

  def __exit__(
    self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
  ) -> None:
    self._pool.shutdown(cancel_futures=True)
    for descriptor in self._files.values():
      os.close(descriptor)

  def read(
    self,
    tensor: Tensor,
    out: np.ndarray,
    *,
    transposed: bool = False,
    part: tuple[slice, ...] | None = None,
  ) -> None:
    """Reads a tensor, or a part of it; only the bytes of that part are read.

    Args:
      tensor: what to read, of one or two dimensions.
      out: where to; any float dtype, to which values are rounded.
      transposed: whether `out` is to hold the transpose.
      part: the part of the TENSOR, a slice of step 1 for each dimension; None: all.

    Raises:
      DamagedWeights: naming file and tensor, if values are not finite, do not fit the dtype of `out`, or the file ends.
    """
    if tensor.file not in self._files:
      self._files[tensor.file] = os.open(tensor.file, os.O_RDONLY | os.O_CLOEXEC)
    bounds = [range(*own.indices(size)) for own, size in zip(part or _all(tensor), tensor.shape, strict=True)]
    if len(bounds) == 1:  # a row
      bounds, out = [range(1), bounds[0]], out[None, :]
      transposed = False
    rows, columns = bounds
    whole_rows = len(columns) == tensor.shape[-1]
    if not transposed and whole_rows and out.dtype == tensor.dtype and out.flags.c_contiguous:
      step = max(1, PIECE // max(1, len(columns) * tensor.dtype.itemsize))
      task = self._straight
    else:
      step, task = BLOCK_ROWS, self._by_blocks
    blocks = [range(start, min(start + step, rows.stop)) for start in range(rows.start, rows.stop, step)]

    def run(block: range) -> None:
      place = slice(block.start - rows.start, block.stop - rows.start)
      task(tensor, block, columns, out[:, place] if transposed else out[place], transposed)
      self._on_read(len(block) * len(columns) * tensor.dtype.itemsize)

    if len(blocks) == 1:
      run(blocks[0])
    else:
      list(self._pool.map(run, blocks))

  def _straight(self, tensor: Tensor, rows: range, columns: range, out: np.ndarray, transposed: bool) -> None:
    del transposed
    size = tensor.dtype.itemsize
    _read_exactly(self._files[tensor.file], [_bytes(out)], tensor.offset + rows.start * len(columns) * size, tensor)
    _check_finite(out, tensor)

  def _by_blocks(self, tensor: Tensor, rows: range, columns: range, out: np.ndarray, transposed: bool) -> None:
    block = self._block(len(columns), tensor.dtype)
    own, lines = block.rows[: len(rows)], block.lines[: len(rows)]
    width, size = tensor.shape[-1], tensor.dtype.itemsize
    descriptor = self._files[tensor.file]
    if len(columns) == width:
      _read_exactly(descriptor, lines, tensor.offset + rows.start * width * size, tensor)
    else:
      for row, line in zip(rows, lines, strict=True):
        _read_exactly(descriptor, [line], tensor.offset + (row * width + columns.start) * size, tensor)
    _check_finite(own, tensor)
    turned = own.T if transposed else own
    if out.dtype == tensor.dtype:  # as plain numbers: nothing is to be known about floats
      block.put(turned, out)
    else:
      with np.errstate(over="ignore"):
        out[...] = turned.astype(out.dtype)
      _check_finite(out, tensor, "values that do not fit in " + out.dtype.name)

  def _block(self, columns: int, dtype: np.dtype[Any]) -> "_Block":
    """The block of this thread for rows of so many columns."""
    blocks: dict[tuple[int, np.dtype[Any]], _Block] = self._local.__dict__.setdefault("blocks", {})
    if (columns, dtype) not in blocks:
      blocks[columns, dtype] = _Block(columns, dtype)
    return blocks[columns, dtype]


class _Block:
  """Memory for some rows of a tensor.

  Attributes:
    rows: `[BLOCK_ROWS, columns]`, `PADDING` bytes between them.
    lines: the memory of each row.
    near: memory for as many entries, without gaps.
  """

  def __init__(self, columns: int, dtype: np.dtype[Any]):
    whole = np.empty((BLOCK_ROWS, columns + PADDING // dtype.itemsize), dtype)
    self.rows = whole[:, :columns]
    self.lines = [_bytes(row) for row in self.rows]
    self.near = np.empty(BLOCK_ROWS * columns, dtype)

  def put(self, rows: np.ndarray, out: np.ndarray) -> None:
    """Copies some of the rows, or their transpose, bit by bit.

    First to `near`, which stays in the cache, since rows of `out` are far apart; and a few columns at a time: so many
    rows of what was transposed fit the first cache.
    """
    unsigned = f"u{rows.itemsize}"
    near, rows = self.near[: rows.size].view(unsigned).reshape(rows.shape), rows.view(unsigned)
    for start in range(0, rows.shape[1], COLUMNS):
      near[:, start : start + COLUMNS] = rows[:, start : start + COLUMNS]
    out.view(unsigned)[...] = near


def same_values(reader: Reader, tensor: Tensor, other: Tensor) -> bool:
  """Whether a tensor is another one, rounded to its dtype; block by block."""
  if tensor.shape != other.shape:
    return False
  rest = tensor.shape[1:]
  rows = max(1, PIECE // (4 * max(1, math.prod(rest))))
  for start in range(0, tensor.shape[0], rows):
    part = (slice(start, start + rows), *(slice(None) for _ in rest))
    one, two = (np.empty((min(rows, tensor.shape[0] - start), *rest), np.float32) for _ in range(2))
    reader.read(tensor, one, part=part)
    reader.read(other, two, part=part)
    with np.errstate(over="ignore"):
      if not np.array_equal(one, two.astype(tensor.dtype).astype(np.float32)):
        return False
  return True


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
  """An array whose memory a CPU device takes over as it is (JAX copies what is not aligned to 64 bytes)."""
  size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
  memory = np.empty(size + 64, np.uint8)
  start = -memory.ctypes.data % 64
  return memory[start : start + size].view(dtype).reshape(shape)


def transpose(matrix: np.ndarray) -> np.ndarray:
  """A matrix's transpose as an array of its own, several times faster than by `ascontiguousarray`."""
  rows, columns = matrix.shape
  out = np.empty((columns, rows), matrix.dtype)
  block = _Block(columns, matrix.dtype)
  for start in range(0, rows, BLOCK_ROWS):
    part = block.rows[: min(BLOCK_ROWS, rows - start)]
    part[...] = matrix[start : start + BLOCK_ROWS]
    block.put(part.T, out[:, start : start + BLOCK_ROWS])
  return out


def _all(tensor: Tensor) -> tuple[slice, ...]:
  return (slice(None),) * len(tensor.shape)


def _bytes(array: np.ndarray) -> memoryview:
  return array.view(np.uint8).data.cast("B")


def _read_exactly(descriptor: int, buffers: list[memoryview], offset: int, tensor: Tensor) -> None:
  """Fills the buffers with what follows `offset`."""
  wanted = sum(buffer.nbytes for buffer in buffers)
  got = os.preadv(descriptor, buffers, offset)
  if got == wanted:
    return
  joined = bytearray(wanted)  # a disk may give less than asked for
  view, done = memoryview(joined), 0
  while done < wanted:
    got = os.preadv(descriptor, [view[done:]], offset + done)
    if not got:
      raise DamagedWeights(f"{tensor.file}: ends within the tensor {tensor.name!r}; was it changed while it was read?")
    done += got
  for buffer in buffers:
    buffer[:] = view[: buffer.nbytes]
    view = view[buffer.nbytes :]


def _check_finite(block: np.ndarray, tensor: Tensor, what: str = "NaN or infinite values") -> None:
  """Raises unless all entries are finite: by their exponents, several times faster than `isfinite`."""
  if not block.size:
    return
  info = jnp.finfo(block.dtype)
  unsigned = f"u{block.dtype.itemsize}"
  infinity = np.array(np.inf, block.dtype).view(unsigned)
  magnitude = np.array((1 << (info.bits - 1)) - 1, unsigned)
  if np.bitwise_and(block.view(unsigned), magnitude).max() >= infinity:
    raise DamagedWeights(f"{tensor.file}: the tensor {tensor.name!r} holds {what}")


def _nothing_to_read(folder: Path, stem: str) -> str:
  pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
  if not pickles:
    return f"{folder}: has no {stem}.safetensors, and no {stem}.safetensors.index.json"
  if len(pickles) == 1:
    program = (
      "import torch; from safetensors.torch import save_file; "
      f"read = torch.load({str(folder / pickles[0])!r}, map_location='cpu', weights_only=True); "
      "save_file({name: tensor.clone().contiguous() for name, tensor in read.items()}, "
      f"{str(folder / stem) + '.safetensors'!r}, metadata={{'format': 'pt'}})"
    )
  else:
    into = f"save_pretrained({str(folder) + '-safetensors'!r})"
    program = (
      "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; "
      f"M.from_pretrained({str(folder)!r}, dtype='auto').{into}; T.from_pretrained({str(folder)!r}).{into}"
    )
  return (
    f"{folder}: its weights are pickle files ({', '.join(pickles[:3])}), which are never loaded, since loading one "
    "executes whatever code it holds. If you trust them, convert them once, where PyTorch is installed: python -c "
    f"{shlex.quote(program)}"
  )
