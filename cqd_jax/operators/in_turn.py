"""Decompositions of many matrices in one program, each begun when the one before is done.

See `cqd_jax.low_rank.sequence_after`: two batched ones at the same time can wait for each other for ever.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from cqd_jax.low_rank import MatrixSVD, sequence_after
from cqd_jax.operators.arithmetic import weighted_sum
from cqd_jax.trees import check_layers, is_matrix, map_with_path, matrix_shape, widen
from cqd_jax.types import Params


class InTurn:
  """Decomposes matrices one after the other; one of them serves one traced program."""

  def __init__(self) -> None:
    self._done: jax.Array | None = None

  def svd(self, matrices: jax.Array) -> MatrixSVD:
    """The thin SVD of `[..., m, n]`, with U zeroed where a singular value is zero to rounding.

    What such a value's vectors are is arbitrary, so no result must depend on them.
    """
    u, s, vt = jnp.linalg.svd(self._after(matrices), full_matrices=False)
    self._done = s
    rounding = jnp.finfo(s.dtype).eps * max(matrices.shape[-2:])
    there = ~(s <= rounding * s[..., :1])  # so that NaNs are there
    return MatrixSVD(jnp.where(there[..., None, :], u, 0.0), jnp.where(there, s, 0.0), vt)

  def orthonormal(self, columns: jax.Array) -> jax.Array:
    """The nearest matrix to `[..., m, k]` whose columns are orthonormal, within the span of those that there are."""
    svd = self.svd(columns)
    return exact(svd.u, svd.vt)

  def solve(self, matrices: jax.Array, right: jax.Array) -> jax.Array:
    """The solution of symmetric positive definite systems `[..., m, m]` for `[..., m, n]`."""
    factor = jax.scipy.linalg.cho_factor(self._after(matrices))
    solution: jax.Array = jax.scipy.linalg.cho_solve(factor, right)
    self._done = solution
    return solution

  def _after(self, matrices: jax.Array) -> jax.Array:
    return matrices if self._done is None else sequence_after(matrices, self._done)


def exact(one: jax.Array, other: jax.Array) -> jax.Array:
  """A matrix product in full float32, also where an accelerator would round the factors."""
  return jnp.matmul(one, other, precision=jax.lax.Precision.HIGHEST)


def merge_matrices(merge: Callable[..., jax.Array], task_vectors: Params, weights: jax.Array, *rest: Params) -> Params:
  """Merges all matrices by a function, and the vectors by their weighted mean `sum_t w_t x_t / T`.

  Args:
    merge: from T matrices (or stacks of them) in float32 `[T, ..., m, n]`, and the leaf of each further tree, to one.
    task_vectors: leaves `[T, ...]`.
    weights: float32 `[T]`.
    *rest: further trees, with a leaf or a subtree, or None, for each leaf of the task vectors.

  Raises:
    ValueError: if layers can be no stack (`cqd_jax.trees.check_layers`).
  """
  one = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), task_vectors)
  check_layers(one, "task_vectors")
  structure: Any = jax.tree.structure(task_vectors)
  others = [jax.tree.unflatten(structure, [_Held(each) for each in structure.flatten_up_to(tree)]) for tree in rest]

  def of_leaf(path: tuple[str, ...], leaf: jax.Array, like: jax.ShapeDtypeStruct, *held: "_Held") -> jax.Array:
    if not is_matrix(path, like):
      return (weighted_sum(weights, leaf) / leaf.shape[0]).astype(leaf.dtype)
    matrices = widen(leaf.reshape(leaf.shape[0], *matrix_shape(path, like)))
    return merge(matrices, *(each.value for each in held)).reshape(like.shape).astype(leaf.dtype)

  return map_with_path(of_leaf, task_vectors, one, *others)


class _Held:
  """Hides what is inside from `jax.tree`."""

  def __init__(self, value: Any):
    self.value = value
