"""The k-th largest of very many magnitudes, found by counting and never by sorting."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

MOST_ENTRIES = 2**32 - 1
"""How many entries can be counted in 32 bits."""

SAMPLE = 2**16
"""How many of very many entries say where to look."""

PATIENCE = 9
"""After how many guesses the middle is tried too."""

PIECES = 16
"""Into how many pieces a tensor is cut to be counted."""


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


def kth_largest(tensors: Sequence[jax.Array], k: Any) -> jax.Array:
  """The largest rank that at least `k` entries reach, of all tensors together; above all where k is 0."""
  cut = cut_of(tensors, k)
  unreached = jnp.array(jnp.iinfo(cut.dtype).max, cut.dtype)
  ranks = [magnitude_ranks(tensor) for tensor in tensors]
  return functools.reduce(jnp.minimum, [jnp.min(jnp.where(part >= cut, part, unreached)) for part in ranks])


def cut_of(tensors: Sequence[jax.Array], k: Any) -> jax.Array:
  """A rank that the same entries reach as reach `kth_largest`: k of them, and more only where some are equal.

  It is found between two ranks, of which one is reached by at least k and the other by fewer. They are taken from a
  sample, and drawn together by counting all: where the k-th should be if ranks lay evenly between the two, and after
  the first times every other time in the middle. So of millions of entries some eight readings find it, and of any at
  most two a bit and those. Nothing of the size of a tensor is written.

  Args:
    tensors: floats of one dtype; of several tensors only shapes and values differ.
    k: how many entries, at most those that there are; an integer, may be traced.
  """
  return _search(tensors, k)[0]


@jax.jit
def _search(tensors: Sequence[jax.Array], k: Any) -> tuple[jax.Array, jax.Array]:
  """The cut, and how often all entries were counted."""
  k = jnp.asarray(k, jnp.uint32)
  size = sum(part.size for part in tensors)
  guesses = _bracket(tensors, k, size)
  dtype = jax.eval_shape(magnitude_ranks, tensors[0]).dtype
  above_all = jnp.array(jnp.iinfo(dtype).max // 2 + 1, dtype)

  def step(state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    low, high, above_low, above_high, turn = state
    guess = _between(low, high, above_low, above_high, k, turn)
    for number, given in enumerate(guesses):
      guess = jnp.where((turn == number) & (given > low) & (given < high), given, guess)
    above = _count(tensors, guess)
    reached = above >= k
    low, above_low = jnp.where(reached, guess, low), jnp.where(reached, above, above_low)
    high, above_high = jnp.where(reached, high, guess), jnp.where(reached, above_high, above)
    return low, high, above_low, above_high, turn + 1

  def go_on(state: tuple[jax.Array, ...]) -> jax.Array:
    low, high, above_low, _, _ = state
    return (high - low > 1) & (above_low != k)

  start: tuple[jax.Array, ...] = jnp.zeros((), dtype), above_all, jnp.uint32(size), jnp.uint32(0), jnp.int32(0)
  low, high, _, _, turns = jax.lax.while_loop(go_on, step, start)
  return jnp.where(k == 0, high, low), turns


def _between(
  low: jax.Array, high: jax.Array, above_low: jax.Array, above_high: jax.Array, k: jax.Array, turn: jax.Array
) -> jax.Array:
  """A rank above `low` and below `high`."""
  gap = (high - low).astype(jnp.float32)
  share = (above_low - k).astype(jnp.float32) + 0.5
  share = share / jnp.maximum((above_low - above_high).astype(jnp.float32), 1.0)
  share = jnp.where((turn > PATIENCE) & (turn % 2 == 0), 0.5, jnp.clip(share, 0.0, 1.0))
  step = jnp.clip(jnp.round(share * gap), 1.0, jnp.maximum(gap - 1.0, 1.0))
  return low + jnp.minimum(step.astype(low.dtype), jnp.maximum(high - low - 1, 1).astype(low.dtype))


def _bracket(tensors: Sequence[jax.Array], k: jax.Array, size: int) -> list[jax.Array]:
  """Two ranks between which the k-th largest is nearly always, from an even sample of many; none of few."""
  if size < 64 * SAMPLE:
    return []
  stride = size // SAMPLE
  sample = [magnitude_ranks(part.reshape(-1)[::stride]) for part in tensors]
  number = sum(part.size for part in sample)
  middle = k.astype(jnp.float32) * (number / size)
  # Six standard deviations of how many of a sample are above.
  spread = 6.0 * jnp.sqrt(jnp.maximum(middle * (1.0 - middle / number), 1.0))
  places = [jnp.clip(middle + sign * spread, 1.0, float(number)).astype(jnp.uint32) for sign in (1, -1)]
  return [_by_bits(sample, place) for place in places]


def _by_bits(ranks: Sequence[jax.Array], k: jax.Array) -> jax.Array:
  """The k-th largest of few, built bit by bit from the highest: a bit is set if enough ranks remain at or above."""
  dtype = ranks[0].dtype
  num_bits = 8 * dtype.itemsize - 1  # without that of the sign

  def set_bit(index: jax.Array, cut: jax.Array) -> jax.Array:
    higher = cut | (jnp.ones((), dtype) << (num_bits - 1 - index).astype(dtype))
    above = functools.reduce(jnp.add, [jnp.sum(part >= higher, dtype=jnp.uint32) for part in ranks])
    return jnp.where(above >= k, higher, cut)

  return jax.lax.fori_loop(0, num_bits, set_bit, jnp.zeros((), dtype))


def _count(tensors: Sequence[jax.Array], cut: jax.Array) -> jax.Array:
  """How many ranks are `cut` or above."""

  def of_part(part: jax.Array) -> jax.Array:
    # Pieces are added to one another before anything is summed up: that is one pass, in bytes, where XLA's reduction
    # on a CPU first writes out four bytes an entry.
    rest = part.size % PIECES if part.size >= 64 * PIECES else part.size
    flat = part.reshape(-1)
    number = jnp.sum(magnitude_ranks(flat[part.size - rest :]) >= cut, dtype=jnp.uint32)
    if rest < part.size:
      pieces = flat[: part.size - rest].reshape(PIECES, -1)
      added = [(magnitude_ranks(pieces[i]) >= cut).astype(jnp.uint8) for i in range(PIECES)]
      number = number + jnp.sum(functools.reduce(jnp.add, added), dtype=jnp.uint32)
    return number

  return functools.reduce(jnp.add, [of_part(part) for part in tensors])
