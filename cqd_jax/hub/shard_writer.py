"""Writes a safetensors file tensor by tensor, so that no more than one is in memory."""

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np

from cqd_jax.hub.tensor_files import DTYPES, NUMBERS

NAMES = {dtype: name for name, dtype in {**DTYPES, **NUMBERS}.items()}


class Entry(NamedTuple):
  """A tensor that is to be written."""

  name: str
  shape: tuple[int, ...]
  dtype: np.dtype[Any]


class ShardWriter:
  """A file that appears once all its tensors are there; a context manager.

  Args:
    file: which is replaced if it is there.
    entries: the tensors, in the order in which they will come.
  """

  def __init__(self, file: Path, entries: Sequence[Entry]):
    self._file, self._left = file, list(reversed(entries))
    self._unfinished = file.with_name(f".{file.name}.{os.getpid()}")
    self._stream = self._unfinished.open("wb")
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers asks for the format
    start = 0
    for entry in entries:
      end = start + math.prod(entry.shape) * entry.dtype.itemsize
      header[entry.name] = {"dtype": NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": [start, end]}
      start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the weights begin at a multiple of 8
    self._stream.write(len(text).to_bytes(8, "little") + text)

  def __enter__(self) -> "ShardWriter":
    return self

  def write(self, array: np.ndarray) -> None:
    """Writes the next tensor."""
    entry = self._left.pop()
    if array.shape != entry.shape or array.dtype != entry.dtype:
      raise ValueError(
        f"{entry.name}: expected {entry.dtype} of shape {entry.shape}, got {array.dtype} of shape {array.shape}"
      )
    if array.size:
      self._stream.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)

  def __exit__(
    self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
  ) -> None:
    try:
      if error is None:
        self._stream.flush()
        os.fsync(self._stream.fileno())
    finally:
      self._stream.close()
      if error is None and not self._left:
        os.replace(self._unfinished, self._file)
      else:
        self._unfinished.unlink(missing_ok=True)
