"""Mutation of a task vector: along singular vectors (the child's own, or an expert's), or by Gaussian noise."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from cqd_jax.checks import check_float_leaves, check_key
from cqd_jax.low_rank import MatrixSVD, sequence_after
from cqd_jax.operators.arithmetic import check_setting
from cqd_jax.operators.frames import needs_frame
from cqd_jax.trees import (
  as_arrays,
  as_matrices,
  check_layers,
  from_matrices,
  is_matrix,
  leaf_keys,
  map_with_path,
  matrix_shape,
  widen,
)
from cqd_jax.types import Params, PRNGKey


def factorize(task_vector: Params, *, rank: int | None = None) -> Params:
  """Decomposes all matrices of a task vector, for `expert_svd_mutation`.

  Do it once per expert. `jax.vmap(factorize)` takes K stacked experts, and `jax.tree.map(lambda leaf: leaf[k], ...)`
  picks one of them, with a traced k too.

  Args:
    task_vector: float leaves `[...]` of one individual. Matrices as told by `cqd_jax.trees`: a kernel of a convolution
      is one.
    rank: how many singular values to keep of each matrix; None: all. An expert of low rank has no others.

  Returns:
    The structure of `task_vector` with a `MatrixSVD` for each leaf of matrices and None (no leaf) for each of vectors.

  Raises:
    ValueError: if `task_vector` holds anything but floats or layers that can be no stack
      (`cqd_jax.trees.check_layers`), or `rank` is below 1.
  """
  check_float_leaves(task_vector, "task_vector")
  check_layers(task_vector, "task_vector")
  if rank is not None and rank < 1:
    raise ValueError(f"rank: expected at least 1, got {rank}")
  decomposed = _decompose_in_turn(as_arrays(task_vector))
  if rank is None:
    return decomposed
  return jax.tree.map(lambda svd: svd.first(rank), decomposed, is_leaf=lambda node: isinstance(node, MatrixSVD))


@needs_frame("inner_product")
def svd_mutation(key: PRNGKey, task_vector: Params, *, max_scale: ArrayLike) -> Params:
  """Scales each singular value of each matrix by its own random factor: U (S * w) V^T, w ~ Uniform[0, max_scale]^r.

  The child keeps its singular vectors, so it stays in the span of the skills that it has. Vectors (biases, norms) pass
  through unchanged. An expectation that keeps the size of the task vector needs `max_scale` = 2.

  Args:
    key: typed PRNG key; consumed.
    task_vector: float leaves `[...]` of one individual; no population axis.
    max_scale: upper end of the factors, at least 0; may be traced.

  Returns:
    Structure, shapes and dtypes of `task_vector`; decomposed in float32.

  Raises:
    ValueError: if `task_vector` holds anything but floats or layers that can be no stack
      (`cqd_jax.trees.check_layers`), or `max_scale` is out of range.

  Reference: Kuroki et al. 2025, arXiv:2410.14735, section 3.4.
  """
  check_key(key)
  check_setting("max_scale", max_scale, low=0.0)
  check_float_leaves(task_vector, "task_vector")
  check_layers(task_vector, "task_vector")
  task_vector = as_arrays(task_vector)

  def scale(leaf: jax.Array, svd: MatrixSVD | None, subkey: PRNGKey) -> jax.Array:
    if svd is None:
      return leaf
    factors = max_scale * _draw(subkey, svd.s.shape)
    return from_matrices(_compose(svd, factors, leaf.dtype), leaf).astype(leaf.dtype)

  structure: Any
  leaves, structure = jax.tree.flatten(task_vector)
  decomposed = structure.flatten_up_to(_decompose_in_turn(task_vector))
  subkeys = jax.tree.leaves(leaf_keys(key, task_vector))
  return jax.tree.unflatten(structure, [scale(*each) for each in zip(leaves, decomposed, subkeys, strict=True)])


@needs_frame("inner_product")
def expert_svd_mutation(key: PRNGKey, task_vector: Params, expert_svd: Params, *, rate: ArrayLike) -> Params:
  """Adds a random part of an expert's task vector: + U diag(rate u * s) V^T, u ~ Uniform[0, 1]^r for each matrix.

  The mutation of the authors' program, which differs from the paper's (`svd_mutation`): U, s and V are of the expert
  of the active task, and parts are added. Vectors (biases, norms) pass through unchanged.

  Args:
    key: typed PRNG key; consumed.
    task_vector: float leaves `[...]` of one individual; no population axis.
    expert_svd: `factorize` of ONE expert's task vector. A truncated one (r smaller) serves as well.
    rate: size of the step, at least 0; may be traced. The authors use 0.1.

  Returns:
    Structure, shapes and dtypes of `task_vector`; computed in float32.

  Raises:
    ValueError: if `expert_svd` does not fit `task_vector` (one that still has an expert axis, too), `task_vector`
      holds anything but floats, or `rate` is out of range.

  Reference: github.com/SakanaAI/CycleQD.
  """
  check_key(key)
  check_setting("rate", rate, low=0.0)
  check_float_leaves(task_vector, "task_vector")
  task_vector = as_arrays(task_vector)
  factors = _matching_factors(task_vector, expert_svd)

  def add(leaf: jax.Array, svd: MatrixSVD | None, subkey: PRNGKey) -> jax.Array:
    if svd is None:
      return leaf
    shares = rate * _draw(subkey, svd.s.shape)
    return (widen(leaf) + from_matrices(_compose(svd, shares, leaf.dtype), leaf)).astype(leaf.dtype)

  leaves, structure = jax.tree.flatten(task_vector)
  subkeys = jax.tree.leaves(leaf_keys(key, task_vector))
  mutated = [add(*each) for each in zip(leaves, factors, subkeys, strict=True)]
  return jax.tree.unflatten(structure, mutated)


@needs_frame("linear")
def gaussian_mutation(key: PRNGKey, task_vector: Params, *, std: ArrayLike) -> Params:
  """Adds independent noise from N(0, std^2) to every weight, vectors too.

  In every space the noise is added to what an individual is stored as: on cores it stays in the span of the experts.

  Args:
    key: typed PRNG key; consumed.
    task_vector: float leaves `[...]` of one individual; no population axis.
    std: standard deviation, at least 0; may be traced. The paper's ablation has 0.0003.

  Returns:
    Structure, shapes and dtypes of `task_vector`; added in float32.

  Raises:
    ValueError: if `task_vector` holds anything but floats, or `std` is out of range.

  Reference: Kuroki et al. 2025, arXiv:2410.14735, section 4 (ablation).
  """
  check_key(key)
  check_setting("std", std, low=0.0)
  check_float_leaves(task_vector, "task_vector")
  task_vector = as_arrays(task_vector)

  def add(leaf: jax.Array, subkey: PRNGKey) -> jax.Array:
    return (widen(leaf) + std * jax.random.normal(subkey, leaf.shape, jnp.float32)).astype(leaf.dtype)

  return jax.tree.map(add, task_vector, leaf_keys(key, task_vector))


@needs_frame("linear")
def no_mutation(key: PRNGKey, task_vector: Params) -> Params:
  """The individual as it is."""
  del key
  return task_vector


def _decompose_in_turn(task_vector: Params) -> Params:
  """The decompositions of all matrices, each begun when the one before is done; None for a leaf of vectors."""
  before: MatrixSVD | None = None

  def decompose(path: tuple[str, ...], leaf: jax.Array) -> MatrixSVD | None:
    nonlocal before
    if not is_matrix(path, leaf):
      return None
    wide = widen(as_matrices(path, leaf))
    svd = MatrixSVD(*jnp.linalg.svd(wide if before is None else sequence_after(wide, before.s), full_matrices=False))
    before = svd
    return svd

  return map_with_path(decompose, task_vector)


def _draw(key: PRNGKey, shape: tuple[int, ...]) -> jax.Array:
  """Uniform numbers in [0, 1), float32 `[..., r]`.

  The i-th does not depend on r, so that a matrix and its core, whose singular values are the same but for zeros, draw
  the same (from keys of JAX's default kind; batched "rbg" keys draw as the whole batch goes).
  """
  *stack, rank = shape
  keys = jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(rank))
  return jnp.moveaxis(jax.vmap(lambda subkey: jax.random.uniform(subkey, stack))(keys), 0, -1)


def _compose(svd: MatrixSVD, factors: ArrayLike, dtype: Any) -> jax.Array:
  """U diag(factors * s) V^T, to the precision that leaves of `dtype` can hold."""
  # An accelerator multiplies float32 in fewer bits unless stated otherwise; bfloat16 leaves lose nothing by that.
  precision = None if jnp.finfo(dtype).bits < 32 else jax.lax.Precision.HIGHEST
  scaled = jnp.multiply(factors, svd.s)
  return jnp.matmul(svd.u * scaled[..., None, :], svd.vt, precision=precision)


def _matching_factors(task_vector: Params, expert_svd: Params) -> list[MatrixSVD | None]:
  """The factors of each leaf in order; raises unless each leaf of matrices has its own, and no other has."""

  shapes: Any = jax.tree.structure(task_vector)
  try:
    factors: list[MatrixSVD | None] = shapes.flatten_up_to(expert_svd)
  except (TypeError, ValueError) as error:
    raise ValueError(
      f"expert_svd: expected `factorize` of a tree with the structure of task_vector, got another tree ({error})"
    ) from error

  def check(path: tuple[str, ...], leaf: jax.Array, svd: Any) -> None:
    name = f"expert_svd at {'/'.join(path)}"
    if not is_matrix(path, leaf):
      if svd is not None:
        raise ValueError(f"{name}: expected None for a leaf of vectors, got {type(svd).__name__}")
      return
    if not isinstance(svd, MatrixSVD):
      raise ValueError(f"{name}: expected a MatrixSVD for a leaf of matrices, got {type(svd).__name__}")
    *stack, rows, columns = matrix_shape(path, leaf)
    rank = svd.s.shape[-1] if svd.s.ndim else 0
    expected = ((*stack, rows, rank), (*stack, rank), (*stack, rank, columns))
    got = tuple(part.shape for part in svd)
    if got != expected:
      raise ValueError(f"{name}: expected u, s, vt of shapes {expected}, got {got}")

  map_with_path(check, task_vector, jax.tree.unflatten(shapes, factors))
  return factors
