"""Blocks of tensors, read and transposed: against NumPy, for every shape, part and dtype."""

import json
import os
import struct

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from cqd_jax.hub import tensor_files
from cqd_jax.hub.tensor_files import DTYPES, DamagedWeights, Reader, aligned_empty, find_tensors, read_header, transpose

BLOCK = tensor_files.BLOCK_ROWS
FLOATS = tuple(DTYPES.values())


def random_bits(source, shape, dtype):
  """Finite values of every magnitude that a dtype has, subnormal ones and both zeros among them."""
  bits = source.integers(0, 1 << (8 * dtype.itemsize), shape, np.uint32 if dtype.itemsize == 4 else np.uint16)
  values = bits.view(dtype)
  return np.where(np.isfinite(values.astype(np.float32)), values, np.zeros((), dtype))


def modest(source, shape, dtype):
  """Values that each of the dtypes holds, rounded."""
  return (source.standard_normal(shape) * 10.0 ** source.integers(-6, 4, shape)).astype(dtype)


def write(tmp_path, **tensors):
  file = tmp_path / "model.safetensors"
  save_file(tensors, file)
  return find_tensors(tmp_path)


def shapes_around_blocks(source):
  edges = [1, 2, 7, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 2 * BLOCK + 3]
  yield from [(1, 1), (1, 300), (300, 1), (BLOCK, BLOCK), (5,), (1,), (2 * BLOCK + 3,)]
  for _ in range(25):
    yield int(source.choice(edges)), int(source.choice(edges))


def random_part(source, shape):
  starts = [int(source.integers(0, size)) for size in shape]
  return tuple(
    slice(start, int(source.integers(start + 1, size + 1))) for start, size in zip(starts, shape, strict=True)
  )


def read(tensor, dtype, *, transposed=False, part=None, on_read=None):
  shape = [len(range(*own.indices(size))) for own, size in zip(part or (), tensor.shape, strict=False)] or tensor.shape
  out = np.full(shape[::-1] if transposed else shape, 7, dtype)
  with Reader(on_read) as reader:
    reader.read(tensor, out, transposed=transposed, part=part)
  return out


def assert_same_bits(found, expected):
  assert found.dtype == expected.dtype
  unsigned = f"u{found.dtype.itemsize}"
  np.testing.assert_array_equal(found.view(unsigned), np.ascontiguousarray(expected).view(unsigned))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_whole_tensors_and_their_parts(tmp_path, dtype):
  source = np.random.default_rng(0)
  values = {f"t{i}": random_bits(source, shape, dtype) for i, shape in enumerate(shapes_around_blocks(source))}
  tensors = write(tmp_path, **values)
  for name, expected in values.items():
    counts = []
    for part in (None, random_part(source, expected.shape), random_part(source, expected.shape)):
      wanted = expected if part is None else expected[part]
      assert_same_bits(read(tensors[name], dtype, part=part, on_read=counts.append), wanted)
      assert sum(counts) == wanted.nbytes  # only the bytes of the part were read
      counts.clear()
      if expected.ndim == 2:
        assert_same_bits(read(tensors[name], dtype, transposed=True, part=part, on_read=counts.append), wanted.T)
        assert sum(counts) == wanted.nbytes
        counts.clear()


@pytest.mark.parametrize("kept", FLOATS, ids=str)
@pytest.mark.parametrize("wanted", FLOATS, ids=str)
def test_other_dtypes_are_rounded_as_numpy_rounds(tmp_path, kept, wanted):
  source = np.random.default_rng(1)
  values = {f"t{i}": modest(source, shape, kept) for i, shape in enumerate([(BLOCK + 5, 9), (3, 700), (40,), (1, 1)])}
  tensors = write(tmp_path, **values)
  for name, expected in values.items():
    assert_same_bits(read(tensors[name], wanted), expected.astype(wanted))
    part = random_part(source, expected.shape)
    assert_same_bits(read(tensors[name], wanted, part=part), expected[part].astype(wanted))
    if expected.ndim == 2:
      assert_same_bits(read(tensors[name], wanted, transposed=True), expected.T.astype(wanted))


def test_one_reader_reads_tensors_of_any_width_and_dtype_into_any_place(tmp_path):
  """The threads' blocks are reused, and what is read may be a slice of something larger."""
  source = np.random.default_rng(2)
  values = {
    f"t{i}": modest(source, (int(source.integers(1, 700)), int(source.integers(1, 90))), FLOATS[i % 3])
    for i in range(12)
  }
  tensors = write(tmp_path, **values)
  with Reader() as reader:
    for name, expected in values.items():
      rows, columns = expected.shape
      around = np.full((3, columns + 4, rows + 5), 7, expected.dtype)
      reader.read(tensors[name], around[1, 2:-2, 1:-4], transposed=True)
      assert_same_bits(around[1, 2:-2, 1:-4].copy(), expected.T)
      around[1, 2:-2, 1:-4] = 7
      assert (around == 7).all()  # nothing was written beside it
      strided = np.full((rows, 2 * columns), 7, expected.dtype)
      reader.read(tensors[name], strided[:, ::2])
      assert_same_bits(strided[:, ::2].copy(), expected)
      assert (strided[:, 1::2] == 7).all()


def test_a_disk_that_gives_less_than_asked_for(tmp_path, monkeypatch):
  source = np.random.default_rng(3)
  expected = random_bits(source, (2 * BLOCK + 9, 33), np.dtype(np.float32))
  tensor = write(tmp_path, t=expected)["t"]
  calls = []

  def stingy(descriptor, buffers, offset):
    """At most 1000 bytes, and not a whole number of entries."""
    calls.append(offset)
    data = os.pread(descriptor, min(sum(memoryview(buffer).nbytes for buffer in buffers), 997), offset)
    rest = memoryview(data)
    for buffer in buffers:
      view = memoryview(buffer)
      count = min(view.nbytes, len(rest))
      view[:count], rest = rest[:count], rest[count:]
    return len(data)

  monkeypatch.setattr(tensor_files.os, "preadv", stingy)
  assert_same_bits(read(tensor, np.float32), expected)
  assert_same_bits(read(tensor, np.float32, transposed=True), expected.T)
  part = (slice(3, BLOCK + 30), slice(2, 31))
  assert_same_bits(read(tensor, np.float32, transposed=True, part=part), expected[part].T)
  assert len(calls) > 200


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("part", [None, (slice(1, None), slice(2, 9))])
def test_a_file_that_ends_early_is_named(tmp_path, transposed, part):
  tensor = write(tmp_path, other=np.ones((4, 4)).astype(np.float32), t=np.ones((600, 10), np.float32))["t"]
  os.truncate(tensor.file, tensor.offset + 590 * 40)
  with pytest.raises(DamagedWeights, match=r"model\.safetensors: ends within the tensor 't'"):
    read(tensor, np.float32, transposed=transposed, part=part)


@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_what_is_not_finite_is_named_wherever_it_is(tmp_path, dtype, value):
  source = np.random.default_rng(4)
  sound = modest(source, (BLOCK + 2, 5), dtype)
  places = [(0, 0), (BLOCK + 1, 4), (BLOCK, 0), (BLOCK - 1, 4), (17, 3)]
  values = {f"t{i}": sound.copy() for i in range(len(places))}
  for damaged, place in zip(values.values(), places, strict=True):
    damaged[place] = value
  tensors = write(tmp_path, sound=sound, **values)
  read(tensors["sound"], dtype)
  for name, (row, column) in zip(values, places, strict=True):
    for transposed in (False, True):
      for wanted in FLOATS:
        with pytest.raises(DamagedWeights, match=rf"model\.safetensors: the tensor '{name}' holds NaN or infinite"):
          read(tensors[name], wanted, transposed=transposed)
    # beside the part that is read it does no harm
    read(tensors[name], dtype, part=(slice(0, row) if row else slice(1, None), slice(None)))
    read(tensors[name], dtype, part=(slice(None), slice(0, column) if column else slice(1, None)))


@pytest.mark.parametrize("bits", [0x7F800001, 0xFFFFFFFF, 0x7FC00000])
def test_every_nan_is_one(tmp_path, bits):
  tensor = write(tmp_path, t=np.array([1, bits, 2], np.uint32).view(np.float32))["t"]
  with pytest.raises(DamagedWeights, match="'t' holds NaN"):
    read(tensor, np.float32)


@pytest.mark.parametrize(
  ("kept", "wanted", "largest", "first_too_large"),
  [
    # half of the last step above the largest value is rounded away from it
    ("float32", "float16", 65519.0, 65520.0),
    ("bfloat16", "float16", 65280.0, 65536.0),
    ("float32", "bfloat16", 3.3961e38, 3.3966e38),
  ],
)
def test_values_that_do_not_fit_are_refused(tmp_path, kept, wanted, largest, first_too_large):
  fits = np.array([[1.0, -largest], [largest, 0.0]]).astype(kept)
  tensors = write(tmp_path, fits=fits, large=np.array([[1.0, first_too_large]]).astype(kept))
  assert_same_bits(read(tensors["fits"], jnp.dtype(wanted)), fits.astype(wanted))
  for transposed in (False, True):
    with pytest.raises(DamagedWeights, match=f"the tensor 'large' holds values that do not fit in {wanted}"):
      read(tensors["large"], jnp.dtype(wanted), transposed=transposed)
  assert read(tensors["large"], np.float32).max() >= first_too_large * 0.99


@pytest.mark.parametrize("dtype", [*FLOATS, np.dtype(np.float64), np.dtype(ml_dtypes.float8_e4m3fn)], ids=str)
def test_transpose(dtype):
  source = np.random.default_rng(5)
  for shape in [*filter(lambda shape: len(shape) == 2, shapes_around_blocks(source)), (0, 4), (4, 0)]:
    matrix = source.integers(-9, 9, shape).astype(dtype)
    for each in (matrix, np.asfortranarray(matrix), matrix[::-1], matrix[:, ::2]):
      found = transpose(each)
      assert found.flags.c_contiguous
      assert found.dtype == dtype
      np.testing.assert_array_equal(found.astype(np.float32), each.T.astype(np.float32))


@pytest.mark.parametrize("shape", [(3,), (1, 1), (257, 33), (2, 3, 4)])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_empty_arrays_are_aligned(shape, dtype):
  for _ in range(5):
    array = aligned_empty(shape, dtype)
    assert array.shape == shape
    assert array.dtype == dtype
    assert array.ctypes.data % 64 == 0
    assert array.flags.c_contiguous


def test_a_header_says_where_tensors_are(tmp_path):
  values = {"a": np.ones((3, 5), np.float32), "b": np.arange(4, dtype=np.float16), "c": np.ones((2, 2), np.float32)}
  save_file(values, tmp_path / "model.safetensors", metadata={"format": "pt"})
  found = read_header(tmp_path / "model.safetensors")
  assert found.keys() == values.keys()
  content = (tmp_path / "model.safetensors").read_bytes()
  for name, value in values.items():
    tensor = found[name]
    assert (tensor.name, tensor.shape, tensor.dtype, tensor.num_bytes) == (name, value.shape, value.dtype, value.nbytes)
    assert content[tensor.offset : tensor.offset + tensor.num_bytes] == value.tobytes()


def test_other_names_than_model(tmp_path):
  save_file({"a": np.ones(3, np.float32)}, tmp_path / "adapter_model.safetensors")
  assert list(find_tensors(tmp_path, "adapter_model")) == ["a"]
  with pytest.raises(DamagedWeights, match=r"has no model\.safetensors, and no model\.safetensors\.index\.json"):
    find_tensors(tmp_path)


@pytest.mark.parametrize("dtype", ["I8", "U8", "F64", "I64", "BOOL", "F8_E4M3"])
def test_other_dtypes_are_refused_by_name(tmp_path, dtype):
  sizes = {"F64": 8, "I64": 8}
  header = json.dumps({"t": {"dtype": dtype, "shape": [2], "data_offsets": [0, 2 * sizes.get(dtype, 1)]}}).encode()
  file = tmp_path / "model.safetensors"
  file.write_bytes(struct.pack("<Q", len(header)) + header + bytes(2 * sizes.get(dtype, 1)))
  with pytest.raises(
    DamagedWeights, match=rf"model\.safetensors: 't' is of dtype {dtype}; supported are BF16, F16, F32"
  ):
    read_header(file)


@pytest.mark.parametrize("length", [0, 1, 2**40, 2**64 - 1])
def test_a_header_of_an_impossible_length_is_refused(tmp_path, length):
  file = tmp_path / "model.safetensors"
  file.write_bytes(struct.pack("<Q", length) + b"{}" + bytes(100))
  with pytest.raises(DamagedWeights, match=r"model\.safetensors: not a whole safetensors file"):
    read_header(file)
