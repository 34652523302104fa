"""Merges whose weights depend on nothing but inner products of the T task vectors.

They see an individual only by its lengths and angles, so on cores in orthonormal bases they are what they are on task
vectors; and T^2 numbers per tensor decide, whatever its size.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from cqd_jax.operators.arithmetic import Convention, Granularity, map_tensors, total, weighted_sum
from cqd_jax.trees import widen
from cqd_jax.types import Params

NO_LENGTH = 1e-8
"""A vector of no more than this length has no direction in mergekit."""

Coefficients = Callable[[jax.Array], jax.Array]
"""From the inner products of T vectors, `[T, T, ...]`, to their weights, `[T, ...]`."""


def combine(
  task_vectors: Params, coefficients: Coefficients, granularity: Granularity, *, axis: int | None = None
) -> Params:
  """The sum of T task vectors with weights that depend on their inner products, in float32 and rounded once.

  Args:
    task_vectors: arrays `[T, ...]`.
    coefficients: from inner products to weights; with an axis they have that of the tensors, of length 1.
    granularity: whose inner products: of each tensor, or of all together.
    axis: along which the vectors of a tensor lie; None: a tensor is one.
  """

  def merge(tensors: jax.Array) -> jax.Array:
    along = None if axis is None or tensors.ndim < 3 else axis
    return weighted_sum(coefficients(inner_products(tensors, along)), tensors).astype(tensors.dtype)

  if granularity == "kernel":
    return map_tensors(merge, task_vectors)
  weights = coefficients(total([inner_products(leaf) for leaf in jax.tree.leaves(task_vectors)]))
  return jax.tree.map(lambda leaf: weighted_sum(weights, leaf).astype(leaf.dtype), task_vectors)


def inner_products(tensors: jax.Array, axis: int | None = None) -> jax.Array:
  """Of T tensors `[T, ...]` with one another, float32 `[T, T]`; or of their vectors along an axis, which is kept."""
  size = tensors.shape[0]
  wide = [widen(tensors[t]) for t in range(size)]
  # Sums of products and no matrix product, for which accelerators would round the factors.
  pairs = {
    (i, j): jnp.sum(wide[i] * wide[j], axis=axis, keepdims=axis is not None).astype(jnp.float32)
    for i in range(size)
    for j in range(i, size)
  }
  return jnp.stack([jnp.stack([pairs[min(i, j), max(i, j)] for j in range(size)]) for i in range(size)])


def lengths_of(gram: jax.Array) -> jax.Array:
  """Of T vectors by their inner products, `[T, ...]`; with finite gradients at 0."""
  squares = jnp.stack([gram[t, t] for t in range(gram.shape[0])])
  return jnp.where(squares == 0, 0.0, jnp.sqrt(jnp.where(squares == 0, 1.0, squares)))


def cosines_of(gram: jax.Array, convention: Convention) -> jax.Array:
  """`[T, T, ...]`; 1 where a vector is zero, or 0 where it has no length in mergekit's convention."""
  long = lengths_of(gram)
  there = long > (NO_LENGTH if convention == "mergekit" else 0.0)
  there = there | jnp.isnan(long)
  safe = jnp.where(there, long, 1.0)
  quotients = jnp.clip(gram / safe[:, None] / safe[None], -1.0, 1.0)
  return jnp.where(there[:, None] & there[None], quotients, 0.0 if convention == "mergekit" else 1.0)
