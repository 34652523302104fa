"""Arrays as PNG, read back by matplotlib."""

import io

import matplotlib.image
import numpy as np
import pytest

from cqd_jax.report.png import png_bytes


@pytest.mark.parametrize("shape", [(1, 1), (7, 3), (64, 64), (1, 1, 3), (5, 9, 3), (300, 200, 3), (1, 70000)])
def test_it_reads_back_as_it_was(shape):
  array = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
  read = matplotlib.image.imread(io.BytesIO(png_bytes(array)), format="png")  # floats in [0, 1]
  np.testing.assert_array_equal(np.round(read * 255).astype(np.uint8), array)


@pytest.mark.parametrize("view", [lambda a: a[::-1], lambda a: a[:, ::2], lambda a: a.T, np.asfortranarray])
def test_views_read_back_as_well(view):
  array = view(np.arange(96, dtype=np.uint8).reshape(8, 12))
  read = matplotlib.image.imread(io.BytesIO(png_bytes(array)), format="png")
  np.testing.assert_array_equal(np.round(read * 255).astype(np.uint8), array)


def test_equal_arrays_give_equal_bytes_and_plain_ones_few():
  array = np.zeros((256, 256, 3), np.uint8)
  assert png_bytes(array) == png_bytes(array.copy())
  assert len(png_bytes(array)) < 1000


@pytest.mark.parametrize(
  ("array", "got"),
  [
    (np.zeros((2, 2)), r"got float64 \(2, 2\)"),
    (np.zeros((2, 2), np.int8), "got int8"),
    (np.zeros(4, np.uint8), r"got uint8 \(4,\)"),
    (np.zeros((2, 2, 4), np.uint8), r"got uint8 \(2, 2, 4\)"),
    (np.zeros((2, 2, 1), np.uint8), r"got uint8 \(2, 2, 1\)"),
    (np.zeros((1, 2, 2, 3), np.uint8), r"got uint8 \(1, 2, 2, 3\)"),
    (np.zeros((0, 2), np.uint8), r"got uint8 \(0, 2\)"),
    (np.zeros((2, 0, 3), np.uint8), r"got uint8 \(2, 0, 3\)"),
  ],
)
def test_what_is_no_picture_is_refused(array, got):
  with pytest.raises(ValueError, match=rf"array: expected uint8 \[H, W\] or \[H, W, 3\], {got}"):
    png_bytes(array)
