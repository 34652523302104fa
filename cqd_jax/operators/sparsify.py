"""Sparsifying a task vector: most of what fine-tuning changed can be left out, by size or at random."""

import math
from typing import Any, Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp
import numpy as np

from cqd_jax.checks import check_float_leaves, check_key
from cqd_jax.operators.frames import needs_frame
from cqd_jax.trees import Path, as_arrays, is_stacked, leaf_keys, map_with_path, widen
from cqd_jax.types import Params, PRNGKey

TrimGranularity: TypeAlias = Literal["kernel", "model"]

MOST_ENTRIES = 2**32 - 1
"""How many entries can be counted in 32 bits."""


@needs_frame("elementwise")
def trim(task_vector: Params, *, density: float, granularity: TrimGranularity = "kernel") -> Params:
  """Keeps the entries of largest magnitude and zeroes the rest.

  Of n entries that are ranked together `max(1, floor(density n))` are kept, and with the smallest of them every other
  one of the same magnitude: a common thing in bfloat16.

  Args:
    task_vector: float leaves `[...]` of one individual; no population axis.
    density: the share of entries to keep, in (0, 1]; static.
    granularity: what is ranked together. "kernel": each leaf, and each layer of each stacked leaf. "model": all that
      the individual has, as TIES has it in the paper.

  Returns:
    Structure, shapes and dtypes of `task_vector`; what is kept is unchanged. A NaN ranks above all numbers.

  Raises:
    ValueError: if `task_vector` holds anything but floats, a setting is out of range, or more than `MOST_ENTRIES` are
      ranked together.
  """
  check_float_leaves(task_vector, "task_vector")
  check_density(density)
  if granularity not in get_args(TrimGranularity):
    raise ValueError(f"granularity: expected one of {', '.join(get_args(TrimGranularity))}, got {granularity!r}")
  task_vector = as_arrays(task_vector)
  if density == 1.0:
    return task_vector
  if granularity == "model":
    wide = jnp.result_type(*jax.tree.leaves(task_vector))
    ranks = jax.tree.map(lambda leaf: _magnitude_ranks(leaf.astype(wide)), task_vector)
    cut = _cut(jax.tree.leaves(ranks), _num_kept(jax.tree.leaves(ranks), density))
    return jax.tree.map(lambda leaf, rank: jnp.where(rank >= cut, leaf, 0), task_vector, ranks)

  def trim_one(leaf: jax.Array) -> jax.Array:
    kept: jax.Array = _keep_largest(leaf, _num_kept([leaf], density))
    return kept

  def trim_leaf(path: Path, leaf: jax.Array) -> jax.Array:
    return (jax.vmap(trim_one) if is_stacked(path) and leaf.ndim else trim_one)(leaf)

  return map_with_path(trim_leaf, task_vector)


@needs_frame("elementwise")
def dare(key: PRNGKey, task_vector: Params, *, drop_rate: float) -> Params:
  """Zeroes random entries and rescales the rest by 1 / (1 - drop_rate), which preserves the expectation.

  Args:
    key: typed PRNG key; consumed.
    task_vector: float leaves `[...]` of one individual; no population axis.
    drop_rate: the probability of zeroing an entry, independent of all others, in [0, 1); static.

  Returns:
    Structure, shapes and dtypes of `task_vector`; rescaled in float32. What is zeroed leaves no trace, NaN neither.

  Raises:
    ValueError: if `task_vector` holds anything but floats, or `drop_rate` is out of range.

  Reference: Yu et al. 2024, arXiv:2311.03099. mergekit rescales by what keeps the sum of magnitudes.
  """
  check_key(key)
  check_float_leaves(task_vector, "task_vector")
  check_drop_rate(drop_rate)
  task_vector = as_arrays(task_vector)
  kept_share = 1.0 - drop_rate

  def drop(leaf: jax.Array, subkey: PRNGKey) -> jax.Array:
    kept = jax.random.bernoulli(subkey, kept_share, leaf.shape)
    return jnp.where(kept, widen(leaf) / kept_share, 0.0).astype(leaf.dtype)

  return jax.tree.map(drop, task_vector, leaf_keys(key, task_vector))


def check_density(density: float) -> None:
  """Raises unless a share of entries to keep is in (0, 1]."""
  if not 0.0 < density <= 1.0:
    raise ValueError(f"density: expected a share in (0, 1], got {density}")


def check_drop_rate(drop_rate: float) -> None:
  """Raises unless a probability of zeroing is in [0, 1)."""
  if not 0.0 <= drop_rate < 1.0:
    raise ValueError(f"drop_rate: expected a probability in [0, 1), got {drop_rate}")


def _magnitude_ranks(leaf: jax.Array) -> jax.Array:
  """Unsigned integers in the order of the magnitudes of floats, equal where these are: their bits but for the sign."""
  unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint64}[leaf.dtype.itemsize]
  bits = jax.lax.bitcast_convert_type(leaf, unsigned)
  return bits & jnp.array(jnp.iinfo(unsigned).max >> 1, unsigned)


def _num_kept(parts: list[jax.Array], density: float) -> np.uint32:
  """How many entries are kept of all in the list together."""
  size = sum(math.prod(part.shape) for part in parts)
  if size > MOST_ENTRIES:
    raise ValueError(f"task_vector: expected at most {MOST_ENTRIES} entries to be ranked together, got {size}")
  return np.uint32(max(1, math.floor(density * size)))


@jax.jit
def _keep_largest(leaf: jax.Array, keep: Any) -> jax.Array:
  ranks = _magnitude_ranks(leaf)
  return jnp.where(ranks >= _cut([ranks], keep), leaf, 0)


@jax.jit
def _cut(ranks: list[jax.Array], keep: Any) -> jax.Array:
  """The smallest rank that is kept where `keep` entries are, of all in the list together.

  It is built bit by bit from the highest: a bit is set if enough ranks remain at or above. So the entries are counted
  once a bit, and never sorted.
  """
  dtype = ranks[0].dtype
  num_bits = 8 * dtype.itemsize - 1  # without that of the sign

  def set_bit(index: jax.Array, cut: jax.Array) -> jax.Array:
    higher = cut | (jnp.ones((), dtype) << (num_bits - 1 - index).astype(dtype))
    count = sum(jnp.sum(part >= higher, dtype=jnp.uint32) for part in ranks)
    return jnp.where(count >= keep, higher, cut)

  return jax.lax.fori_loop(0, num_bits, set_bit, jnp.zeros((), dtype))
