"""Matrices that are known by low-rank factors, and the two places where a model meets one: a product and a lookup.

In a params tree a matrix is an array, or a `LowRankUpdate`: a shared array and a small core that is one individual's
own. So P individuals of one base model are P cores, and read the base's weights once.
"""

from typing import Any, NamedTuple, TypeAlias

import flax.struct
import jax
import jax.numpy as jnp

from cqd_jax.types import ArrayField, Params


class LowRank(NamedTuple):
  """The matrix `b @ a`, or a stack of them; what a LoRA adapter holds of a kernel, its scale included.

  Attributes:
    b: `[..., m, r]`.
    a: `[..., r, n]`.
  """

  b: jax.Array
  a: jax.Array


class MatrixSVD(NamedTuple):
  """The thin singular value decomposition of a matrix, or of a stack of them, or its leading part; float32.

  Attributes:
    u: `[..., m, r]` left singular vectors, r at most min(m, n).
    s: `[..., r]` singular values, falling.
    vt: `[..., r, n]` right singular vectors.
  """

  u: jax.Array
  s: jax.Array
  vt: jax.Array

  def first(self, rank: int) -> "MatrixSVD":
    """The part of the `rank` largest singular values; itself where there are no more."""
    return MatrixSVD(self.u[..., :rank], self.s[..., :rank], self.vt[..., :rank, :])

  def balanced(self) -> LowRank:
    """Two factors, each with the square root of the singular values."""
    root = jnp.sqrt(self.s)
    return LowRank(self.u * root[..., None, :], root[..., None] * self.vt)


class LowRankUpdate(flax.struct.PyTreeNode):
  """The matrix `kernel + left @ core @ right^T`, or a stack of them, never written out.

  Of a population only `core` has a leading axis P; the rest is shared.

  Attributes:
    kernel: `[..., m, n]` of the base model. A convolution's has its own shape `[..., kh, kw, in, out]`, and the rest is
      of the matrix with m = kh * kw * in: `left`, its m split likewise, is a convolution to a channels.
    left: `[..., m, a]` orthonormal columns.
    core: `[..., a, b]`, as a rule float32.
    right: `[..., n, b]` orthonormal columns.
  """

  kernel: ArrayField
  left: ArrayField
  core: ArrayField
  right: ArrayField

  @property
  def T(self) -> "LowRankUpdate":
    """The transposed matrix of one individual."""
    return LowRankUpdate(self.kernel.mT, self.right, self.core.mT, self.left)


Matrix: TypeAlias = Any
"""An array or a `LowRankUpdate` (jaxtyping would have to know both)."""


def matmul(x: jax.Array, matrix: Matrix, *, preferred_element_type: Any = None) -> jax.Array:
  """`x @ matrix`.

  A `LowRankUpdate` costs m n + m a + a b + b n multiply-adds a row. Under `jax.vmap` over the core only, base and
  bases take part in ONE product with the rows of all individuals.

  Args:
    x: `[..., m]`.
    matrix: `[m, n]`.
    preferred_element_type: of the result; None: what `x` and the matrix promote to.

  Returns:
    `[..., n]`.
  """

  def dot(rows: jax.Array, factor: jax.Array, dtype: Any = preferred_element_type) -> jax.Array:
    return jnp.einsum("...i,io->...o", rows, factor, preferred_element_type=dtype)

  if not isinstance(matrix, LowRankUpdate):
    return dot(x, matrix)
  product = dot(x, matrix.kernel)
  inner = dot(dot(x, matrix.left, None), matrix.core.astype(matrix.left.dtype), None)
  return product + dot(inner, matrix.right.mT).astype(product.dtype)


def take_rows(matrix: Matrix, indices: jax.Array) -> jax.Array:
  """`matrix[indices]`: rows `[..., n]` of an `[m, n]` matrix; of a `LowRankUpdate` only these rows are written out."""
  if not isinstance(matrix, LowRankUpdate):
    return matrix[indices]
  rows = matrix.kernel[indices]
  inner = matmul(matrix.left[indices], matrix.core)
  return rows + matmul(inner, matrix.right.mT).astype(rows.dtype)


def sequence_after(array: jax.Array, done: jax.Array) -> jax.Array:
  """`array`, as soon as `done` is there, for what must not be computed at the same time.

  A batched decomposition on a CPU waits, in a thread of XLA's pool, for other threads of the pool to do its parts. As
  many of them at once as there are threads wait for ever (jaxlib 0.10, two cores: within seconds); one never does. So
  in one program each has to begin with what comes `after` the one before.
  """
  # Always 0, which the compiler cannot know: it drops barriers and what is multiplied by 0, but must wait for this.
  nothing = jnp.minimum(jnp.isnan(done).any().astype(jnp.int32), 0)
  return array + nothing.astype(array.dtype)


def partition_shared(params: Params) -> tuple[Params, Params]:
  """A model, or a population, as what is its own and what is shared.

  Returns:
    The params with the core in the place of each `LowRankUpdate`; and what those lack, with None where nothing is
    shared. `combine_shared` takes both.
  """

  def own(node: Any) -> Any:
    return node.core if isinstance(node, LowRankUpdate) else node

  def shared(node: Any) -> LowRankUpdate | None:
    return node.replace(core=None) if isinstance(node, LowRankUpdate) else None

  def is_update(node: Any) -> bool:
    return isinstance(node, LowRankUpdate)

  return jax.tree.map(own, params, is_leaf=is_update), jax.tree.map(shared, params, is_leaf=is_update)


def combine_shared(own: Params, shared: Params) -> Params:
  """The params of which `partition_shared` gave the two parts; `own` may be another individual's."""
  return jax.tree.map(lambda mine, rest: mine if rest is None else rest.replace(core=mine), own, shared)
