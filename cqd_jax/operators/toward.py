"""Steps from a base toward one expert: of limited size, or only where the expert differs in what it says."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from cqd_jax.checks import check_float_leaves, check_same_tree
from cqd_jax.operators.arithmetic import check_setting, map_tensors
from cqd_jax.operators.frames import needs_frame
from cqd_jax.operators.order_statistics import kth_largest, magnitude_of
from cqd_jax.trees import as_arrays, widen
from cqd_jax.types import Params

LEAST_DISTANCE = 1e-6
"""By how much two entries are taken to differ at least."""

SMALL = 0.1
"""Below this a series is more exact than the difference of an exponential."""


@needs_frame("elementwise")
def nearswap(task_vector: Params, *, t: ArrayLike) -> Params:
  """Limits each entry of a task vector to a magnitude of t: steps toward an expert, where it is near all the way.

  An entry is multiplied by `min(t / max(|entry|, 1e-6), 1)`.

  Args:
    task_vector: float leaves `[...]` of one individual.
    t: the largest step; may be traced. At 0 or below nothing is left.

  Returns:
    Structure, shapes and dtypes of `task_vector`; computed in float32. Zeros stay zeros, a NaN stays NaN.

  Raises:
    ValueError: if `task_vector` holds anything but floats, or `t` is no finite scalar.

  Reference: alchemonaut 2024, the model card of QuartetAnemoi-70B; as in mergekit.
  """
  check_float_leaves(task_vector, "task_vector")
  check_setting("t", t)

  def limit(leaf: jax.Array) -> jax.Array:
    wide = widen(leaf)
    return (wide * jnp.clip(t / jnp.maximum(jnp.abs(wide), LEAST_DISTANCE), 0.0, 1.0)).astype(leaf.dtype)

  return jax.tree.map(limit, as_arrays(task_vector))


@needs_frame("elementwise")
def arcee_fusion(task_vector: Params, base: Params) -> Params:
  """Keeps the entries of a task vector that matter most: large ones, in rows whose softmax they change.

  An entry's importance is its magnitude times the Kullback-Leibler divergence of the softmax of its row (the last axis)
  of the expert from that of the base. Entries are kept from `median + 1.5 (q3 - q1)` of a tensor's importances on. The
  quantiles are those of the entries with index `floor(q (n - 1))`, of all entries.

  Args:
    task_vector: float leaves `[...]` of one individual.
    base: the model that it is the difference to; same structure, shapes and dtypes.

  Returns:
    Structure, shapes and dtypes of `task_vector`; what is kept is unchanged. Zeros stay zeros. Where a NaN is in either
    it is kept, and with it nothing but NaNs.

  Raises:
    ValueError: if the trees differ or hold anything but floats.

  Reference: Arcee's fusion as in mergekit; no paper. mergekit takes the difference of two softmaxes, which for the
  small entries of fine-tuning is rounding noise, where here the divergence is exact to rounding; and for tensors of
  more than 10^6 entries it takes the quantiles of as many random ones.
  """
  check_float_leaves(base, "base")
  base, task_vector = as_arrays((base, task_vector))
  check_same_tree(base, task_vector, "base", "task_vector")

  def select(difference: jax.Array, origin: jax.Array) -> jax.Array:
    importance = jnp.abs(widen(difference)) * _divergence(widen(origin), widen(difference))
    size = importance.size
    # The (i + 1)-th smallest is the (n - i)-th largest.
    places = [size - ((size - 1) * quarter) // 4 for quarter in (1, 2, 3)]
    lower, middle, upper = (magnitude_of(kth_largest([importance], place)) for place in places)
    return jnp.where(importance < middle + 1.5 * (upper - lower), 0, difference)

  return map_tensors(select, task_vector, base, lead=(0,))


def _divergence(origin: jax.Array, difference: jax.Array) -> jax.Array:
  """KL(softmax(origin + difference) | softmax(origin)) along the last axis, which is kept; never below 0.

  Both logarithms are of second order in the difference, and are computed as that.
  """
  if origin.ndim == 0:
    return jnp.zeros_like(origin)
  before = jax.nn.softmax(origin, axis=-1)
  moved = difference - jnp.sum(before * difference, axis=-1, keepdims=True)
  small = jnp.abs(moved) < SMALL
  power = jnp.expm1(moved)
  near = jnp.where(small, moved, 0.0)
  series = near * near * (1 / 2 + near * (1 / 6 + near * (1 / 24 + near * (1 / 120 + near / 720))))
  growth = jnp.sum(before * jnp.where(small, series, power - moved), axis=-1, keepdims=True)
  lift = jnp.sum(before * power * moved, axis=-1, keepdims=True)
  return jnp.maximum(lift / (1.0 + growth) - jnp.log1p(growth), 0.0)
