"""Merging by singular values: directions that task vectors share are told apart, or made equally strong.

All need matrices (`cqd_jax.trees` says what is one); vectors, as biases and norms, are merged by their mean. Kernels
are [in, out], the transposes of those of the papers: what is "left" there is "right" here.

In core space (`CoreBasis`) a matrix is its core, which has the same singular values but for zeros. So with a stated
`rank` the merge of cores is exactly the core of the merge; the default takes its size from the matrix, which for a core
is another.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from cqd_jax.checks import check_key
from cqd_jax.low_rank import MatrixSVD
from cqd_jax.operators.arithmetic import Convention, check_task_vectors, check_weights, total
from cqd_jax.operators.consensus import ties
from cqd_jax.operators.frames import needs_frame
from cqd_jax.operators.in_turn import InTurn, exact, merge_matrices
from cqd_jax.operators.sparse_merges import dare_ties
from cqd_jax.trees import from_matrices, is_matrix, map_with_path, matrix_shape, widen
from cqd_jax.types import Params, PRNGKey


@needs_frame("inner_product")
def tsv(task_vectors: Params, weights: ArrayLike | None = None, *, rank: int | None = None) -> Params:
  """Adds task vectors whose singular vectors were made orthogonal to one another: TSV-Merge.

  Of each matrix of each task vector the `rank` largest singular values and their vectors are kept. All left vectors
  together are replaced by the nearest orthonormal ones, so are the right ones, and the singular values put between.

  Args:
    task_vectors: float leaves `[T, ...]`.
    weights: `[T]` factors of the task vectors; may be traced. None: all 1, the paper.
    rank: how many singular values each task vector keeps; static. None: min(m, n) / T, at least 1, the paper.

  Returns:
    One task vector, leaves `[...]` in the dtypes of `task_vectors`; computed in float32, vectors by their mean. Zeros
    give zeros; equal ones give themselves, cut to the rank; of opposite ones the result is zero; one is cut to its
    rank. A NaN makes its matrix NaN. Singular values of zero to rounding take no part. Gradients need singular values
    that differ.

  Raises:
    ValueError: if the leaves' leading axes differ or are empty, layers can be no stack, or a setting is out of range.

  Reference: Gargiulo et al. 2024, arXiv:2412.00081.
  """
  task_vectors, size = check_task_vectors(task_vectors)
  factors = check_weights(weights, size)
  _check_rank(rank)
  turn = InTurn()

  def merge(matrices: jax.Array) -> jax.Array:
    kept = rank or max(1, min(matrices.shape[-2:]) // size)
    parts = turn.svd(matrices).first(kept)
    left, right = turn.orthonormal(_side_by_side(parts.u)), turn.orthonormal(_side_by_side(_right(parts)))
    values = _side_by_side(_times(factors, parts.s)[..., None, :])
    return exact(left * values, right.mT)

  return merge_matrices(merge, task_vectors, factors)


@needs_frame("inner_product")
def iso_c(task_vectors: Params, weights: ArrayLike | None = None, *, rank: int | None = None) -> Params:
  """The sum of task vectors with all its singular values made equal to their mean.

  Args:
    task_vectors: float leaves `[T, ...]`.
    weights: `[T]` of the sum; may be traced. None: all 1, the paper.
    rank: how many singular values take part; static. None: min(m, n), the paper.

  Returns:
    One task vector, leaves `[...]` in the dtypes of `task_vectors`; computed in float32, vectors by their mean. Zeros,
    and opposite ones, give zeros; equal ones, and one, give what the sum of them would. A NaN makes its matrix NaN.
    Singular values of zero to rounding count in the mean and stay zero, where the paper raises their vectors, which are
    arbitrary. Gradients need singular values that differ.

  Raises:
    ValueError: as `tsv`.

  Reference: Marczak et al. 2025, arXiv:2502.04959.
  """
  task_vectors, size = check_task_vectors(task_vectors)
  factors = check_weights(weights, size)
  _check_rank(rank)
  turn = InTurn()

  def merge(matrices: jax.Array) -> jax.Array:
    parts = turn.svd(_weighted(factors, matrices)).first(rank or min(matrices.shape[-2:]))
    mean = jnp.mean(parts.s, axis=-1)[..., None, None]
    return mean * exact(parts.u, parts.vt)

  return merge_matrices(merge, task_vectors, factors)


@needs_frame("inner_product")
def iso_cts(
  task_vectors: Params, weights: ArrayLike | None = None, *, common: float = 0.8, rank: int | None = None
) -> Params:
  """`iso_c` whose weakest directions make room for those that each task vector has of its own.

  The strongest directions of the sum are kept; each task vector adds the strongest of what it has beside them. All
  left vectors together are replaced by the nearest orthonormal ones, so are the right ones, and all get the mean of
  their singular values.

  Args:
    task_vectors: float leaves `[T, ...]`.
    weights: `[T]` factors of the task vectors; may be traced. None: all 1, the paper.
    common: the share of directions that is the sum's, in [0, 1]; static. It is rounded so that T divides the rest. The
      paper has 0.8.
    rank: how many directions there are in all; static. None: min(m, n), the paper.

  Returns:
    As `iso_c`. What a task vector has beside the common directions is told by the outputs (the left vectors of the
    paper) only, as in the authors' program.

  Raises:
    ValueError: as `tsv`.

  Reference: Marczak et al. 2025, arXiv:2502.04959.
  """
  task_vectors, size = check_task_vectors(task_vectors)
  factors = check_weights(weights, size)
  _check_rank(rank)
  if not 0.0 <= common <= 1.0:
    raise ValueError(f"common: expected a share in [0, 1], got {common}")
  turn = InTurn()

  def merge(matrices: jax.Array) -> jax.Array:
    directions = min(rank or min(matrices.shape[-2:]), min(matrices.shape[-2:]))
    own = (directions - int(common * directions)) // size
    weighted = _times(factors, matrices)
    shared = turn.svd(_weighted(factors, matrices)).first(directions - size * own)
    lefts, rights, values = [shared.u], [_right(shared)], [shared.s]
    if own:
      beside = weighted - exact(exact(weighted, _right(shared)), _right(shared).mT)
      parts = turn.svd(beside).first(own)
      lefts, rights = [*lefts, _side_by_side(parts.u)], [*rights, _side_by_side(_right(parts))]
      values = [*values, _side_by_side(parts.s[..., None, :])[..., 0, :]]
    mean = jnp.mean(jnp.concatenate(values, axis=-1), axis=-1)[..., None, None]
    left, right = (turn.orthonormal(jnp.concatenate(side, axis=-1)) for side in (lefts, rights))
    return mean * exact(left, right.mT)

  return merge_matrices(merge, task_vectors, factors)


@needs_frame("elementwise")
def knots(merge: Callable[[Params], Params], task_vectors: Params, *, rank: int | None = None) -> Params:
  """Merges task vectors by any method in the directions that they have in common: KnOTS.

  The T matrices of a kernel, on one another, are `U S V^T` with V for all and a part of U for each. The parts are
  merged by the method, and S and V put behind. Vectors are merged by the method as they are.

  Args:
    merge: from leaves `[T, ...]` to leaves `[...]`.
    task_vectors: float leaves `[T, ...]`.
    rank: how many singular values are kept; static. None: all. Of T adapters of rank r there are at most T r.

  Returns:
    One task vector, leaves `[...]` in the dtypes of `task_vectors`; computed in float32. Zeros give zeros. With a
    linear method it is that method. A NaN makes its matrix NaN. Singular values of zero to rounding take no part;
    but their zeros count where entries are ranked, unless the `rank` leaves them out.

  Raises:
    ValueError: as `tsv`.

  Reference: Stoica et al. 2024, arXiv:2410.19735.
  """
  task_vectors, size = check_task_vectors(task_vectors)
  _check_rank(rank)
  turn = InTurn()
  behind: list[tuple[jax.Array, jax.Array] | None] = []

  def take_apart(path: tuple[str, ...], leaf: jax.Array) -> jax.Array:
    like = jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype)
    if not is_matrix(path, like):
      behind.append(None)
      return leaf
    matrices = widen(leaf.reshape(size, *matrix_shape(path, like)))
    *_, rows, columns = matrices.shape
    tall = jnp.moveaxis(matrices, 0, -3).reshape(*matrices.shape[1:-2], size * rows, columns)
    svd = turn.svd(tall).first(rank or min(tall.shape[-2:]))
    behind.append((svd.s, svd.vt))
    return jnp.moveaxis(svd.u.reshape(*svd.u.shape[:-2], size, rows, -1), -3, 0)

  merged = merge(map_with_path(take_apart, task_vectors))
  rest = iter(behind)

  def put_together(leaf: jax.Array, like: jax.Array) -> jax.Array:
    part = next(rest)
    if part is None:
      return leaf
    return from_matrices(exact(leaf * part[0][..., None, :], part[1]), like[0]).astype(like.dtype)

  return jax.tree.map(put_together, merged, task_vectors)


@needs_frame("elementwise")
def knots_ties(
  task_vectors: Params,
  weights: ArrayLike | None = None,
  *,
  density: ArrayLike = 0.2,
  normalize: bool = True,
  rank: int | None = None,
) -> Params:
  """`ties` in the directions that task vectors have in common (`knots`).

  Args:
    task_vectors: float leaves `[T, ...]`.
    weights: `[T]`, any real dtype; may be traced. None: all 1.
    density: the share of entries that is kept of each part; may be traced.
    normalize: whether the weighted mean of what agrees is taken; False: the weighted sum.
    rank: as for `knots`.

  Returns:
    As `knots`.

  Raises:
    ValueError: as `knots` and `ties`.

  Reference: Stoica et al. 2024, arXiv:2410.19735.
  """
  return knots(functools.partial(ties, weights=weights, density=density, normalize=normalize), task_vectors, rank=rank)


@needs_frame("elementwise")
def knots_dare_ties(
  key: PRNGKey,
  task_vectors: Params,
  weights: ArrayLike | None = None,
  *,
  density: ArrayLike = 0.5,
  normalize: bool = False,
  rank: int | None = None,
  convention: Convention = "paper",
) -> Params:
  """`dare_ties` in the directions that task vectors have in common (`knots`).

  Args:
    key: typed PRNG key; consumed.
    task_vectors: float leaves `[T, ...]`.
    weights: `[T]`, any real dtype; may be traced. None: all 1.
    density: the probability with which an entry of a part is kept; may be traced.
    normalize: whether the weighted mean of what agrees is taken; False: the weighted sum.
    rank: as for `knots`.
    convention: as for `dare_ties`.

  Returns:
    As `knots`.

  Raises:
    ValueError: as `knots` and `dare_ties`.

  Reference: Stoica et al. 2024, arXiv:2410.19735.
  """
  check_key(key)
  merge = functools.partial(
    dare_ties, key, weights=weights, density=density, normalize=normalize, convention=convention
  )
  return knots(merge, task_vectors, rank=rank)


def _check_rank(rank: int | None) -> None:
  if rank is not None and rank < 1:
    raise ValueError(f"rank: expected at least 1, got {rank}")


def _weighted(factors: jax.Array, matrices: jax.Array) -> jax.Array:
  return total([factors[t] * matrices[t] for t in range(matrices.shape[0])])


def _times(factors: jax.Array, arrays: jax.Array) -> jax.Array:
  """`[T, ...]`, each of the T times its factor."""
  return factors.reshape(-1, *(1,) * (arrays.ndim - 1)) * arrays


def _right(parts: MatrixSVD) -> jax.Array:
  """Right singular vectors as columns, zeroed where the singular value is."""
  return jnp.where(parts.s[..., None, :] == 0, 0.0, parts.vt.mT)


def _side_by_side(columns: jax.Array) -> jax.Array:
  """`[T, ..., m, k]` as `[..., m, T k]`."""
  return jnp.concatenate(list(columns), axis=-1)
