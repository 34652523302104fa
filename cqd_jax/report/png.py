"""Arrays as pictures."""

import struct
import zlib

import numpy as np

SIGNATURE = b"\x89PNG\r\n\x1a\n"
GRAY, COLOR = 0, 2
"""Kinds of pixels, as PNG numbers them."""


def png_bytes(array: np.ndarray) -> bytes:
  """A picture as a PNG file.

  Args:
    array: uint8 `[H, W]` from black to white, or `[H, W, 3]` of red, green and blue; the first row is the top.

  Raises:
    ValueError: if it is of another dtype or shape, or empty.

  Reference: PNG (Portable Network Graphics), W3C Recommendation, third edition; every row unfiltered.
  """
  colored = array.ndim == 3
  if array.dtype != np.uint8 or not array.size or not (array.ndim == 2 or (colored and array.shape[2] == 3)):
    raise ValueError(f"array: expected uint8 [H, W] or [H, W, 3], got {array.dtype} {array.shape}")
  height, width = array.shape[:2]
  rows = np.zeros((height, 1 + array[0].size), np.uint8)  # before each row which filter it has: 0, none
  rows[:, 1:] = array.reshape(height, -1)
  header = struct.pack("!IIBBBBB", width, height, 8, COLOR if colored else GRAY, 0, 0, 0)
  chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows.tobytes(), 9)), (b"IEND", b""))
  return SIGNATURE + b"".join(_chunk(kind, content) for kind, content in chunks)


def _chunk(kind: bytes, content: bytes) -> bytes:
  return struct.pack("!I", len(content)) + kind + content + struct.pack("!I", zlib.crc32(kind + content))
