"""Sparsifying a task vector: most of what fine-tuning changed can be left out, by size or at random."""

from collections.abc import Callable
from typing import Any, TypeAlias, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from cqd_jax.checks import check_float_leaves, check_key
from cqd_jax.operators.arithmetic import Convention, Granularity, check_choice, map_tensors
from cqd_jax.operators.frames import needs_frame
from cqd_jax.operators.order_statistics import count_of, cut_of, kth_largest, magnitude_ranks
from cqd_jax.trees import Path, as_arrays, is_stacked, leaf_keys, map_with_path, widen
from cqd_jax.types import Params, PRNGKey

TrimGranularity: TypeAlias = Granularity

NO_MAGNITUDE = 1e-7
"""A sum of magnitudes below this is not restored in mergekit."""


@needs_frame("elementwise")
def trim(task_vector: Params, *, density: ArrayLike, granularity: TrimGranularity = "kernel") -> Params:
  """Keeps the entries of largest magnitude and zeroes the rest.

  Of n entries that are ranked together `max(1, floor(density n))` are kept, and with the smallest of them every other
  one of the same magnitude: a common thing in bfloat16.

  Args:
    task_vector: float leaves `[...]` of one individual; no population axis.
    density: the share of entries to keep, in (0, 1]; may be traced (then in float32).
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
  check_choice("granularity", granularity, get_args(TrimGranularity))
  task_vector = as_arrays(task_vector)
  if keeps_all(density):
    return task_vector
  if granularity == "kernel":
    return map_tensors(lambda tensor: trim_tensor(tensor, density), task_vector, lead=(0,))
  wide = jnp.result_type(*jax.tree.leaves(task_vector))
  leaves = [leaf.astype(wide) for leaf in jax.tree.leaves(task_vector)]
  cut = cut_of(leaves, jnp.maximum(count_of(density, sum(leaf.size for leaf in leaves)), 1))
  return jax.tree.map(lambda leaf: jnp.where(magnitude_ranks(leaf.astype(wide)) >= cut, leaf, 0), task_vector)


@needs_frame("elementwise")
def trim_tails(
  task_vector: Params, *, density: ArrayLike, gamma: ArrayLike = 0.01, convention: Convention = "paper"
) -> Params:
  """Zeroes the largest entries of each tensor as outliers and the smallest as noise, and keeps those between.

  Of n entries the `floor(gamma n)` largest go, and of the rest the `floor(density n)` largest stay: the mask of Model
  Breadcrumbs. Entries of the magnitude of the largest or smallest that stays stay too.

  Args:
    task_vector: float leaves `[...]` of one individual; no population axis.
    density: the share of entries to keep, in (0, 1]; may be traced.
    gamma: the share of outliers, in [0, 1); may be traced. The paper has 0.01 or less.
    convention: "mergekit": where density + gamma is more than 1, fewer outliers go, and none at density 1.

  Returns:
    Structure, shapes and dtypes of `task_vector`; what is kept is unchanged. NaNs are the largest. Nothing is kept
    where `floor(density n)` is 0.

  Raises:
    ValueError: if `task_vector` holds anything but floats, or a setting is out of range.

  Reference: Davari and Belilovsky 2023, arXiv:2312.06795, whose beta is 1 - density - gamma.
  """
  check_float_leaves(task_vector, "task_vector")
  check_density(density)
  check_share("gamma", gamma)
  check_choice("convention", convention, get_args(Convention))
  trimmed = tails_of(density, gamma, convention)
  return map_tensors(trimmed, as_arrays(task_vector), lead=(0,))


@needs_frame("elementwise")
def dare(key: PRNGKey, task_vector: Params, *, drop_rate: ArrayLike) -> Params:
  """Zeroes random entries and rescales the rest by 1 / (1 - drop_rate), which preserves the expectation.

  Args:
    key: typed PRNG key; consumed.
    task_vector: float leaves `[...]` of one individual; no population axis.
    drop_rate: the probability of zeroing an entry, independent of all others, in [0, 1); may be traced.

  Returns:
    Structure, shapes and dtypes of `task_vector`; rescaled in float32. What is zeroed leaves no trace, NaN neither.

  Raises:
    ValueError: if `task_vector` holds anything but floats, or `drop_rate` is out of range.

  Reference: Yu et al. 2024, arXiv:2311.03099. mergekit rescales by what keeps the sum of magnitudes (`dare_linear`).
  """
  check_key(key)
  check_float_leaves(task_vector, "task_vector")
  check_drop_rate(drop_rate)
  task_vector = as_arrays(task_vector)

  def drop(leaf: jax.Array, subkey: PRNGKey) -> jax.Array:
    return drop_tensor(subkey, leaf, 1.0 - drop_rate).astype(leaf.dtype)

  return jax.tree.map(drop, task_vector, leaf_keys(key, task_vector))


@needs_frame("elementwise")
def magprune(
  key: PRNGKey,
  task_vector: Params,
  *,
  density: ArrayLike,
  epsilon: ArrayLike = 0.15,
  axis: int = -1,
  convention: Convention = "paper",
) -> Params:
  """Zeroes random entries, small ones rather than large ones, and rescales each of the rest by its own probability.

  Within each row of a tensor the entries are ranked by magnitude, and kept with a probability that
  rises from the smallest to the largest. What is kept is divided by it, which preserves the expectation.

  Args:
    key: typed PRNG key; consumed.
    task_vector: float leaves `[...]` of one individual; no population axis.
    density: the probability in the middle; may be traced.
    epsilon: how much the probabilities differ; may be traced. All of them are in (0, 1]: where the window does not fit,
      it is refused.
    axis: along which a row of a tensor lies; static. The paper has the weights of one output: the last axis of matrices
      [out, in], and -2 of the kernels of Flax. A tensor of fewer axes is one row.
    convention: "paper": r entries of n being smaller, it is density + epsilon (r + 1 - n / 2) / n: epsilon is the
      window's whole width. "mergekit": density + epsilon (2 r / (n - 1) - 1), epsilon half of it; what is kept is
      rescaled to the tensor's sum of magnitudes; density 1 keeps all; and a tensor of more than two axes has its rows
      along axis 1.

  Returns:
    Structure, shapes and dtypes of `task_vector`; rescaled in float32. A NaN is the largest. A row of one
    entry is kept with probability `density`.

  Raises:
    ValueError: if `task_vector` holds anything but floats, or a setting is out of range.

  Reference: Deep et al. 2024, arXiv:2406.11617 (MagPrune of DELLA).
  """
  check_key(key)
  check_float_leaves(task_vector, "task_vector")
  check_choice("convention", convention, get_args(Convention))
  check_window(density, epsilon, convention)
  prune = pruned_by(density, epsilon, axis, convention)
  rescale = convention == "mergekit"

  def prune_tensor(tensor: jax.Array, subkey: PRNGKey) -> jax.Array:
    pruned = prune(subkey, tensor)
    return (restored(pruned, tensor) if rescale else pruned).astype(tensor.dtype)

  task_vector = as_arrays(task_vector)
  return map_tensors(prune_tensor, task_vector, tensor_keys(key, task_vector), lead=(0,))


def trim_tensor(tensor: jax.Array, density: ArrayLike) -> jax.Array:
  """`trim` of one tensor."""
  kept: jax.Array = _keep_largest(tensor, jnp.maximum(count_of(density, tensor.size), 1))
  return kept


def tails_of(density: ArrayLike, gamma: ArrayLike, convention: Convention) -> Callable[[jax.Array], jax.Array]:
  """`trim_tails` of one tensor."""

  def trimmed(tensor: jax.Array) -> jax.Array:
    size = tensor.size
    top, kept = (jnp.asarray(count_of(share, size)) for share in (gamma, density))
    if convention == "mergekit":
      top = jnp.minimum(top, size - kept)
    between: jax.Array = _keep_between(tensor, top, jnp.minimum(kept, size - top))
    return between

  return trimmed


def drop_tensor(key: PRNGKey, tensor: jax.Array, kept_share: ArrayLike, *, rescale: bool = True) -> jax.Array:
  """A tensor in float32 whose entries are kept with a probability, and then divided by it unless told not to."""
  kept = draws(key, tensor.shape) < kept_share
  return jnp.where(kept, widen(tensor) / kept_share if rescale else widen(tensor), 0.0)


def pruned_by(
  density: ArrayLike, epsilon: ArrayLike, axis: int, convention: Convention, *, rescale: bool = True
) -> Callable[[PRNGKey, jax.Array], jax.Array]:
  """`magprune` of one tensor in float32; with "mergekit" not rescaled."""

  def prune(key: PRNGKey, tensor: jax.Array) -> jax.Array:
    wide = widen(tensor)
    rows = jnp.atleast_1d(tensor)
    along = 1 if convention == "mergekit" and rows.ndim > 2 else axis if -rows.ndim <= axis < rows.ndim else -1
    length = rows.shape[along]
    ranks = _rank_in_row(rows, along).reshape(tensor.shape)
    if convention == "mergekit":
      keep = density + epsilon * (2.0 * ranks / (length - 1) - 1.0) if length > 1 else density
      keep = 1.0 if keeps_all(density) else keep
    else:
      keep = density + epsilon * ((ranks + 1.0) / length - 0.5) if length > 1 else density
    keep = jnp.broadcast_to(jnp.asarray(keep, jnp.float32), tensor.shape)
    kept = draws(key, tensor.shape) < keep
    by_probability = rescale and convention == "paper"
    return jnp.where(kept, wide / keep if by_probability else wide, 0.0)

  return prune


def draws(key: PRNGKey, shape: tuple[int, ...]) -> jax.Array:
  """Independent uniform numbers in [0, 1), multiples of 2^-24; of tensors of more than 2^32 entries they repeat.

  An entry's number is a hash of its position and of two words that the key draws. It fuses with what it decides, so
  that no number is ever written out; JAX's own generator takes twenty times as long on a CPU.
  """
  first, second = jax.random.bits(key, (2,), jnp.uint32)
  position = jnp.zeros(shape, jnp.uint32)
  for axis, length in enumerate(shape):
    position = position * jnp.uint32(length % 2**32) + jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
  mixed = _mix(_mix(position ^ first) + second)
  return (mixed >> 8).astype(jnp.float32) * jnp.float32(2**-24)


def _mix(words: jax.Array) -> jax.Array:
  """A permutation of 32-bit words in which each bit of the result depends on all: MurmurHash3's (Appleby)."""
  words = (words ^ (words >> 16)) * jnp.uint32(0x85EBCA6B)
  words = (words ^ (words >> 13)) * jnp.uint32(0xC2B2AE35)
  return words ^ (words >> 16)


def restored(sparse: jax.Array, tensor: jax.Array) -> jax.Array:
  """A sparsified tensor, in float32, times what gives it the sum of magnitudes of the tensor that it comes from."""
  left, whole = (jnp.sum(jnp.abs(widen(each))) for each in (sparse, tensor))
  lost = (left < NO_MAGNITUDE) | (whole < NO_MAGNITUDE)
  return widen(sparse) * jnp.where(lost, 1.0, whole / jnp.where(lost, 1.0, left))


def tensor_keys(key: PRNGKey, task_vector: Params) -> Params:
  """A subkey for each leaf, `[L]` of them for a leaf that is a stack of L layers; `key` is consumed."""

  def of_leaf(path: Path, leaf: jax.Array, subkey: PRNGKey) -> jax.Array:
    return jax.random.split(subkey, leaf.shape[0]) if is_stacked(path) and leaf.ndim else subkey

  return map_with_path(of_leaf, task_vector, leaf_keys(key, task_vector))


def check_share(name: str, value: ArrayLike) -> None:
  """Raises unless a share is in [0, 1), as far as it is known."""
  if (known := _known(value)) is not None and not 0.0 <= known < 1.0:
    raise ValueError(f"{name}: expected a share in [0, 1), got {value}")


def check_density(density: ArrayLike) -> None:
  """Raises unless a share of entries to keep is in (0, 1], as far as it is known."""
  if (known := _known(density)) is not None and not 0.0 < known <= 1.0:
    raise ValueError(f"density: expected a share in (0, 1], got {density}")


def check_drop_rate(drop_rate: ArrayLike) -> None:
  """Raises unless a probability of zeroing is in [0, 1), as far as it is known."""
  if (known := _known(drop_rate)) is not None and not 0.0 <= known < 1.0:
    raise ValueError(f"drop_rate: expected a probability in [0, 1), got {drop_rate}")


def check_window(density: ArrayLike, epsilon: ArrayLike, convention: Convention) -> None:
  """Raises unless all probabilities of `magprune` are in (0, 1], as far as they are known."""
  check_density(density)
  middle, width = _known(density), _known(epsilon)
  if width is not None and not 0.0 <= width <= 1.0:
    raise ValueError(f"epsilon: expected a number in [0, 1], got {epsilon}")
  if middle is None or width is None or (convention == "mergekit" and middle == 1.0):
    return
  half = width if convention == "mergekit" else width / 2
  if middle - half <= 0.0 or middle + half > 1.0:
    raise ValueError(f"epsilon: expected all probabilities in (0, 1], got {middle - half:.4g} to {middle + half:.4g}")


def keeps_all(density: ArrayLike) -> bool:
  """Whether a density is known to be 1."""
  return _known(density) == 1.0


def _known(value: ArrayLike) -> float | None:
  return None if isinstance(value, jax.core.Tracer) else float(np.asarray(value).item())


def _rank_in_row(tensor: jax.Array, axis: int) -> jax.Array:
  """How many entries of its row are smaller in magnitude than each, int32."""
  ranks = jnp.moveaxis(magnitude_ranks(tensor), axis, -1)
  rows = ranks.reshape(-1, ranks.shape[-1])
  # On a CPU XLA sorts plain unsigned integers ten times as fast as what takes their places along.
  smaller = jax.vmap(jnp.searchsorted)(jnp.sort(rows, axis=-1), rows)
  return jnp.moveaxis(smaller.reshape(ranks.shape), -1, axis)


@jax.jit
def _keep_largest(tensor: jax.Array, keep: Any) -> jax.Array:
  return jnp.where(magnitude_ranks(tensor) >= cut_of([tensor], keep), tensor, 0)


@jax.jit
def _keep_between(tensor: jax.Array, top: Any, keep: Any) -> jax.Array:
  ranks = magnitude_ranks(tensor)
  highest = kth_largest([tensor], top + 1)
  lowest = cut_of([tensor], top + keep)
  return jnp.where((ranks <= highest) & (ranks >= lowest) & (keep > 0), tensor, 0)
