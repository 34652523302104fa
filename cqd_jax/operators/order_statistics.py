"""The k-th largest of very many magnitudes, found by counting and never by sorting."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

MOST_ENTRIES = 2**32 - 1
"""How many entries can be counted in 32 bits."""


def magnitude_ranks(tensor: jax.Array) -> jax.Array:
  """Unsigned integers in the order of the magnitudes of floats, equal where these are: their bits but for the sign.

  A NaN ranks above all numbers.
  """
  unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint64}[tensor.dtype.itemsize]
  bits = jax.lax.bitcast_convert_type(tensor, unsigned)
  return bits & jnp.array(jnp.iinfo(unsigned).max >> 1, unsigned)


def magnitude_of(rank: jax.Array) -> jax.Array:
  """The magnitude of a rank of float32 (or of float64, by the width)."""
  return jax.lax.bitcast_convert_type(rank, {4: jnp.float32, 8: jnp.float64}[rank.dtype.itemsize])


def count_of(share: ArrayLike, size: int) -> Any:
  """`floor(share size)`, of a traced share in float32: how many entries a share of them is.

  Raises:
    ValueError: if `size` is more than `MOST_ENTRIES`.
  """
  if size > MOST_ENTRIES:
    raise ValueError(f"task_vector: expected at most {MOST_ENTRIES} entries to be ranked together, got {size}")
  if isinstance(share, jax.core.Tracer):
    return jnp.clip(jnp.floor(share * size), 0, size).astype(jnp.uint32)
  return np.uint32(max(0, min(size, math.floor(np.asarray(share).item() * size))))


@jax.jit
def kth_largest(ranks: Sequence[jax.Array], k: Any) -> jax.Array:
  """The largest rank that at least `k` ranks reach, of all in the list together; the largest of all where k is 0.

  It is built bit by bit from the highest: a bit is set if enough ranks remain at or above. So the entries are counted
  once a bit.
  """
  dtype = ranks[0].dtype
  num_bits = 8 * dtype.itemsize - 1  # without that of the sign

  def set_bit(index: jax.Array, cut: jax.Array) -> jax.Array:
    higher = cut | (jnp.ones((), dtype) << (num_bits - 1 - index).astype(dtype))
    count = sum(jnp.sum(part >= higher, dtype=jnp.uint32) for part in ranks)
    return jnp.where(count >= k, higher, cut)

  return jax.lax.fori_loop(0, num_bits, set_bit, jnp.zeros((), dtype))
