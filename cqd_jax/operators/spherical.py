"""Spherical interpolation: between task vectors along arcs instead of along lines.

Only inner products decide the weights, so that SLERP, or a mean on the sphere, of cores in orthonormal bases is exactly
the core of that of task vectors. Of whole models these functions are the same, but the inner products are others.
"""

import functools
from typing import Any, get_args

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from cqd_jax.operators.arithmetic import (
  Convention,
  Granularity,
  check_choice,
  check_parents,
  check_rows_axis,
  check_setting,
  check_sum,
  check_task_vectors,
  check_weights,
)
from cqd_jax.operators.frames import needs_frame
from cqd_jax.operators.inner_products import combine, cosines_of, lengths_of
from cqd_jax.trees import widen
from cqd_jax.types import Params

NEARLY_PARALLEL = 1e-6
"""Where the cosine is nearer to 1, arc and line have the same weights in float32."""

NEARLY_OPPOSITE = 5e-4
"""Where the cosine is nearer to -1 (178.2 degrees), the arc is not determined well enough to follow it."""


@needs_frame("inner_product")
def slerp(
  first: Params,
  second: Params,
  t: ArrayLike,
  *,
  granularity: Granularity = "model",
  convention: Convention = "paper",
) -> Params:
  """Interpolates on the arc from `first` (t = 0) to `second` (t = 1).

  With the angle W between the two task vectors, each taken whole as one vector, the result is
  `(sin((1 - t) W) first + sin(t W) second) / sin W`. The task vectors are not normalized: between
  equal lengths that length is kept, and between others it changes on the way.

  Args:
    first: float leaves `[...]` of one task vector; no population axis.
    second: the other one; same structure, shapes and dtypes.
    t: scalar; may be traced. Outside of [0, 1] the arc goes on.
    granularity: what has an angle: all that an individual has, or each tensor (mergekit).
    convention: "mergekit": the line instead of the arc where the cosine is beyond 0.9995 or -0.9995; and a vector of no
      length is at a right angle to all others.

  Returns:
    Structure, shapes and dtypes of `first`; computed in float32. The line `(1 - t) first + t second` takes the place of
    the arc where there is none: if one of the two is zero, and where the cosine is within `NEARLY_PARALLEL` of 1 or
    `NEARLY_OPPOSITE` of -1. So equal ends give themselves, and between opposite ones the way leads through zero. A NaN
    or an infinity in either makes every entry NaN. `cosine_similarity` says which lengths are too small or too large.

  Raises:
    ValueError: if the trees differ or hold anything but floats, or `t` is no finite scalar.

  Reference: Shoemake 1985, "Animating rotation with quaternion curves", for unit vectors. mergekit gives it whole
  weights, whose cosines are nearly always above 0.9995.
  """
  first, second = check_parents(first, second)
  check_setting("t", t)
  check_choice("granularity", granularity, get_args(Granularity))
  check_choice("convention", convention, get_args(Convention))
  if granularity == "model" and convention == "paper":
    return interpolate(first, second, slerp_weights(cosine_similarity(first, second), t))
  pair = jax.tree.map(lambda *leaves: jnp.stack(leaves), first, second)

  def on_arc(gram: jax.Array) -> jax.Array:
    cosine = cosines_of(gram, convention)[0, 1]
    if convention == "mergekit":
      cosine = jnp.where(cosine > 1.0 - NEARLY_OPPOSITE, 1.0, cosine)
    return jnp.stack(slerp_weights(cosine, t))

  return combine(pair, on_arc, granularity)


@needs_frame("inner_product")
def nuslerp(
  task_vectors: Params,
  weights: ArrayLike | None = None,
  *,
  granularity: Granularity = "kernel",
  convention: Convention = "paper",
) -> Params:
  """`slerp` of two, at the place that two weights say: t = w2 / (w1 + w2).

  Args:
    task_vectors: float leaves `[2, ...]`.
    weights: `[2]`, any real dtype; may be traced. None: the middle. It is taken too where they sum to less than 1e-6.
    granularity: what has an angle: each tensor, or the whole model.
    convention: "mergekit": a vector of no length is at a right angle to all others.

  Returns:
    One task vector, leaves `[...]` in the dtypes of `task_vectors`, as `slerp` between those two: equal ones give
    themselves, between opposite ones the way leads through zero, a zero is met on the line, a NaN makes its tensor NaN.

  Raises:
    ValueError: if there are not two, or `weights` is no vector of two finite numbers.

  Reference: mergekit's nuslerp; no paper. `nuslerp_flatten: false` is `nuslerp_rows`.
  """
  return _nuslerp(task_vectors, weights, None, granularity, convention)


@needs_frame("elementwise")
def nuslerp_rows(
  task_vectors: Params, weights: ArrayLike | None = None, *, axis: int = -1, convention: Convention = "paper"
) -> Params:
  """`nuslerp` with an angle for each vector along an axis of each tensor.

  Args:
    task_vectors: float leaves `[2, ...]`.
    weights: `[2]`, as for `nuslerp`.
    axis: of a tensor, along which a vector lies: -1, or 0. A tensor of one axis is one vector. mergekit's
      `nuslerp_row_wise: false` is -1 and `true` is 0, of matrices [out, in]; the kernels of Flax are their transposes.
    convention: as for `nuslerp`.

  Returns:
    As `nuslerp`.

  Raises:
    ValueError: as `nuslerp`, or if `axis` is another.
  """
  check_rows_axis(axis)
  return _nuslerp(task_vectors, weights, axis, "kernel", convention)


def _nuslerp(
  task_vectors: Params,
  weights: ArrayLike | None,
  axis: int | None,
  granularity: Granularity,
  convention: Convention,
) -> Params:
  task_vectors, _ = check_task_vectors(task_vectors, 2)
  weights = check_weights(weights, 2)
  check_choice("granularity", granularity, get_args(Granularity))
  check_choice("convention", convention, get_args(Convention))
  mass = weights[0] + weights[1]
  t = jnp.where(jnp.abs(mass) < 1e-6, 0.5, weights[1] / jnp.where(jnp.abs(mass) < 1e-6, 1.0, mass))
  return combine(
    task_vectors, lambda gram: jnp.stack(slerp_weights(cosines_of(gram, convention)[0, 1], t)), granularity, axis=axis
  )


@needs_frame("inner_product")
def multislerp(
  task_vectors: Params,
  weights: ArrayLike | None = None,
  *,
  normalize_weights: bool = True,
  eps: ArrayLike = 1e-8,
  granularity: Granularity = "kernel",
) -> Params:
  """The weighted mean of directions, at the weighted mean of lengths.

  With unit vectors `u_t = x_t / (|x_t| + eps)` and `m = sum_t w_t u_t`, it is `(sum_t w_t |x_t|) m / |m|`. (As
  published it projects the u_t to the tangent space at m, adds them with the same weights, and follows the exponential
  map of the sum. That sum is always zero.)

  Args:
    task_vectors: float leaves `[T, ...]`.
    weights: `[T]`, any real dtype; may be traced. None: all 1.
    normalize_weights: whether the weights are divided by their sum.
    eps: added to lengths, above 0.
    granularity: what is one vector: each tensor, or the whole model.

  Returns:
    One task vector, leaves `[...]` in the dtypes of `task_vectors`; computed in float32. Equal ones give themselves. A
    zero has no direction, and counts in the mean length. Where the directions cancel (|m| below 5e-4 of the weights)
    it is the weighted sum. One is itself if its weight is normalized. A NaN makes its tensor NaN.

  Raises:
    ValueError: if the leaves' leading axes differ or are empty, `weights` is no vector of T finite numbers, or they are
      known to sum to 0 and shall be normalized.

  Reference: Goddard 2025, mergekit's multislerp; no paper.
  """
  task_vectors, size = check_task_vectors(task_vectors)
  weights = check_weights(weights, size)
  check_setting("eps", eps, low=0.0)
  check_choice("granularity", granularity, get_args(Granularity))
  if normalize_weights:
    check_sum(weights)
    weights = weights / jnp.sum(weights)

  def on_sphere(gram: jax.Array) -> jax.Array:
    lengths = lengths_of(gram)
    along = weights / (lengths + eps)
    square = along @ (gram @ along)
    cancels = square <= (NEARLY_OPPOSITE * jnp.sum(jnp.abs(weights))) ** 2
    scale = jnp.sum(weights * lengths) / jnp.sqrt(jnp.where(cancels, 1.0, square))
    return jnp.where(cancels, weights, scale * along)

  return combine(task_vectors, on_sphere, granularity)


@needs_frame("inner_product")
def karcher(
  task_vectors: Params,
  weights: ArrayLike | None = None,
  *,
  max_iter: int = 10,
  tol: ArrayLike = 1e-5,
  granularity: Granularity = "kernel",
) -> Params:
  """The Riemannian mean of directions on the sphere, at the mean of lengths.

  Of all directions it is the one with the least sum of squared angles. It is found by steps along the mean of the
  tangents, from the normalized mean on; all on the inner products, so that the tensors are read twice in all.

  Args:
    task_vectors: float leaves `[T, ...]`.
    weights: `[T]`, at least 0; may be traced. None: all 1, the paper.
    max_iter: of the steps; static.
    tol: a step shorter than this, in radians, is the last; may be traced.
    granularity: what is one vector: each tensor, or the whole model.

  Returns:
    One task vector, leaves `[...]` in the dtypes of `task_vectors`; computed in float32. Equal ones give themselves. A
    zero has no direction, and counts in the mean length. Between opposite ones there is no one answer: where the mean
    of directions is shorter than 5e-4 the steps begin at the first, and may stay there. A NaN makes its tensor NaN.

  Raises:
    ValueError: if the leaves' leading axes differ or are empty, or a setting is out of range.

  Reference: Karcher 1977; Wang et al. 2026, arXiv:2603.04972.
  """
  task_vectors, size = check_task_vectors(task_vectors)
  weights = check_weights(weights, size)
  check_setting("tol", tol, low=0.0)
  check_choice("granularity", granularity, get_args(Granularity))
  if max_iter < 1:
    raise ValueError(f"max_iter: expected at least 1, got {max_iter}")
  check_sum(weights)

  def on_sphere(gram: jax.Array) -> jax.Array:
    lengths = lengths_of(gram)
    there = lengths > 0
    inverse = jnp.where(there, 1.0 / jnp.where(there, lengths, 1.0), 0.0)
    cosines = gram * inverse[:, None] * inverse[None]
    shares = jnp.where(there, weights, 0.0)
    shares = shares / jnp.where(there.any(), jnp.sum(shares), 1.0)
    mean = _karcher_mean(cosines, shares, max_iter, tol)
    return jnp.sum(weights * lengths) / jnp.sum(weights) * mean * inverse

  return combine(task_vectors, on_sphere, granularity)


def _karcher_mean(cosines: jax.Array, shares: jax.Array, max_iter: int, tol: ArrayLike) -> jax.Array:
  """The mean of unit vectors as a combination of them, `[T]`, by their cosines `[T, T]`."""

  def length(combination: jax.Array) -> jax.Array:
    square = combination @ (cosines @ combination)
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), jnp.where(square <= 0, 0.0, jnp.nan))

  def unit(combination: jax.Array) -> jax.Array:
    long = length(combination)
    return combination / jnp.where(long == 0, 1.0, long)

  def step(_: Any, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    mean, done = state
    along = jnp.clip(cosines @ mean, -1.0, 1.0)
    turned = jnp.abs(along) < 1.0  # replaced before the arc cosine, whose gradient must stay finite too
    angle = jnp.arccos(jnp.where(turned, along, 0.0))
    pull = shares * jnp.where(turned, angle / jnp.sin(angle), 1.0)
    tangent = pull - jnp.sum(pull * along) * mean
    far = length(tangent)
    moved = unit(jnp.cos(far) * mean + jnp.sinc(far / jnp.pi) * tangent)
    done = done | (far < tol)
    return jnp.where(done, mean, moved), done

  first = jnp.where(jnp.arange(len(shares)) == jnp.argmax(jnp.diag(cosines) > 0.5), 1.0, 0.0)
  begin = jnp.where(length(shares) <= NEARLY_OPPOSITE, first, shares)
  return jax.lax.fori_loop(0, max_iter, step, (unit(begin), jnp.zeros((), bool)))[0]


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
