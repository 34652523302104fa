"""Spherical interpolation: between two task vectors along the arc instead of along the line.

Only inner products decide the weights, so SLERP of cores in orthonormal bases is exactly the core of SLERP.
"""

import functools

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from cqd_jax.operators.arithmetic import check_parents, check_setting
from cqd_jax.operators.frames import needs_frame
from cqd_jax.trees import widen
from cqd_jax.types import Params

NEARLY_PARALLEL = 1e-6
"""Where the cosine is nearer to 1, arc and line have the same weights in float32."""

NEARLY_OPPOSITE = 5e-4
"""Where the cosine is nearer to -1 (178.2 degrees), the arc is not determined well enough to follow it."""


@needs_frame("inner_product")
def slerp(first: Params, second: Params, t: ArrayLike) -> Params:
  """Interpolates on the arc from `first` (t = 0) to `second` (t = 1).

  With the angle W between the two task vectors, each taken whole as one vector, the result is
  `(sin((1 - t) W) first + sin(t W) second) / sin W`. The task vectors are not normalized: between
  equal lengths that length is kept, and between others it changes on the way.

  Args:
    first: float leaves `[...]` of one task vector; no population axis.
    second: the other one; same structure, shapes and dtypes.
    t: scalar; may be traced. Outside of [0, 1] the arc goes on.

  Returns:
    Structure, shapes and dtypes of `first`; computed in float32. The line `(1 - t) first + t second` takes the place of
    the arc where there is none: if one of the two is zero, and where the cosine is within `NEARLY_PARALLEL` of 1 or
    `NEARLY_OPPOSITE` of -1. So equal ends give themselves, and between opposite ones the way leads through zero. A NaN
    or an infinity in either makes every entry NaN. `cosine_similarity` says which lengths are too small or too large.

  Raises:
    ValueError: if the trees differ or hold anything but floats, or `t` is no finite scalar.

  Reference: Shoemake 1985, "Animating rotation with quaternion curves", for unit vectors. mergekit takes an angle for
  each tensor, of whole weights unless stated otherwise; this is one angle, of task vectors.
  """
  first, second = check_parents(first, second)
  check_setting("t", t)
  return interpolate(first, second, slerp_weights(cosine_similarity(first, second), t))


def cosine_similarity(first: Params, second: Params) -> jax.Array:
  """The cosine of the angle between two task vectors, each taken whole as one vector.

  Args:
    first: float leaves `[...]`.
    second: same structure and shapes.

  Returns:
    float32 `[]` in [-1, 1], for any lengths between about 1e-19 and 1e19, whose squares float32 can hold. 1 if either
    is shorter, the zero vector above all. NaN if either is longer, or holds a NaN or an infinity.
  """

  def inner(one: Params, other: Params) -> jax.Array:
    # Sums of products and no matrix product, for which accelerators would round the factors.
    parts = jax.tree.map(lambda a, b: jnp.sum(widen(a) * widen(b)).astype(jnp.float32), one, other)
    return functools.reduce(jnp.add, jax.tree.leaves(parts))

  squares = jnp.stack([inner(first, first), inner(second, second)])
  has_direction = jnp.all(squares != 0)
  # Replaced before the root, whose gradient must stay finite too; two roots, since the product might overflow.
  lengths = jnp.sqrt(jnp.where(has_direction, squares, 1.0))
  quotient = jnp.clip(inner(first, second) / lengths[0] / lengths[1], -1.0, 1.0)
  return jnp.where(jnp.isfinite(squares).all(), jnp.where(has_direction, quotient, 1.0), jnp.nan)


def slerp_weights(cosine: ArrayLike, t: ArrayLike) -> tuple[jax.Array, jax.Array]:
  """The weights of the two ends at `t`, those of the arc or of the line; see `slerp`.

  Args:
    cosine: of the angle, `[...]`.
    t: `[...]`, broadcast with `cosine`.

  Returns:
    Two float32 `[...]`.
  """
  cosine, t = jnp.asarray(cosine, jnp.float32), jnp.asarray(t, jnp.float32)
  straight = (cosine > 1.0 - NEARLY_PARALLEL) | (cosine < NEARLY_OPPOSITE - 1.0)
  # Replaced before the arc cosine, whose gradient must stay finite too.
  angle = jnp.arccos(jnp.where(straight, 0.0, cosine))

  def weight(part: jax.Array) -> jax.Array:
    return jnp.where(straight, part, jnp.sin(part * angle) / jnp.sin(angle))

  return weight(1.0 - t), weight(t)


def interpolate(first: Params, second: Params, weights: tuple[jax.Array, jax.Array]) -> Params:
  """The weighted sum of two task vectors, in float32 and rounded to the dtypes of `first`."""
  ours, theirs = weights

  def combine(one: jax.Array, other: jax.Array) -> jax.Array:
    return (ours * widen(one) + theirs * widen(other)).astype(one.dtype)

  return jax.tree.map(combine, first, second)
