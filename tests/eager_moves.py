"""Arrays that are made, cut and put together op by op: NumPy moves the bytes, and nothing is compiled for it.

Outside of `jit` JAX compiles one program per operation and shape. The suite makes its inputs and takes results apart in
thousands of shapes, each used once, so compiling took most of its time. Only operations that move bytes are replaced,
with the same results to the bit; whatever computes a value is JAX's own, as is all that is inside of `jit`.
"""

import jax
import numpy as np
from jax._src import core
from jax._src.lax import lax, slicing

PLAIN = frozenset(
  np.dtype(name) for name in ("bool", "int8", "int16", "int32", "uint8", "uint16", "uint32", "float16", "float32")
) | {np.dtype(jax.numpy.bfloat16)}


def _put(array):
  # A copy of its own: the transfer may go on when the caller already changes what it gave.
  return jax.device_put(array.copy() if isinstance(array, np.ndarray) else array, may_alias=False)


def _stage(value):
  return value if isinstance(value, jax.Array) else _put(value)


def _broadcast_in_dim(operand, *dynamic_shape, shape, broadcast_dimensions, sharding):
  aligned = [1] * len(shape)
  for axis, length in zip(broadcast_dimensions, operand.shape, strict=True):
    aligned[axis] = length
  return np.broadcast_to(operand.reshape(aligned), shape)


def _squeeze(operand, *, dimensions):
  return operand.squeeze(dimensions)


def _transpose(operand, *, permutation):
  return operand.transpose(permutation)


def _reshape(operand, *dynamic_shape, new_sizes, dimensions, sharding):
  return operand.reshape(new_sizes)


def _slice(operand, *, start_indices, limit_indices, strides):
  strides = strides or (1,) * operand.ndim
  return operand[tuple(map(slice, start_indices, limit_indices, strides))]


def _concatenate(*operands, dimension):
  return np.concatenate(operands, dimension)


MOVES = {
  lax.broadcast_in_dim_p: _broadcast_in_dim,
  lax.squeeze_p: _squeeze,
  lax.transpose_p: _transpose,
  lax.reshape_p: _reshape,
  slicing.slice_p: _slice,
  lax.concatenate_p: _concatenate,
}
"""What NumPy does with the operands as arrays of its own, and with the parameters of the primitive."""


def is_plain(operand):
  """Whether it is an array on the one device, of which bytes are all there is to know."""
  if not isinstance(operand, jax.Array) or isinstance(operand, core.Tracer):
    return False
  return operand.dtype in PLAIN and not operand.aval.weak_type and not operand.committed


def _by_numpy(move, otherwise):
  def impl(*operands, **params):
    if params.get("sharding") is None and jax.device_count() == 1 and all(map(is_plain, operands)):
      return _put(move(*map(np.asarray, operands), **params))
    return otherwise(*operands, **params)

  return impl


def install():
  """For the rest of the process."""
  lax.stage_p.def_impl(_stage)
  for primitive, move in MOVES.items():
    primitive.def_impl(_by_numpy(move, primitive.impl))
