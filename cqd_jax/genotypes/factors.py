"""Low-rank factors of dense task vectors: truncated SVD, exact or randomized, of stacks of matrices at once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from cqd_jax.low_rank import LowRank, MatrixSVD
from cqd_jax.types import PRNGKey

METHODS = ("auto", "exact", "randomized")

LARGE = 512
"""`auto` takes the randomized way for matrices with more rows and columns than this, if the rank is much smaller."""

OVERSAMPLING, POWER_ITERATIONS = 10, 2


def truncate(matrix: jax.Array, rank: int, *, method: str = "auto", key: PRNGKey | None = None) -> LowRank:
  """The best approximation of rank at most `rank` (the randomized way: nearly the best).

  Args:
    matrix: `[..., m, n]` floats.
    rank: at least 1; min(m, n) is the whole matrix.
    method: "exact", "randomized", or "auto", which is randomized for large matrices and small ranks.
    key: of the randomized way; None: a fixed one.

  Returns:
    float32 factors.
  """
  *stack, rows, columns = matrix.shape
  wide = matrix.astype(jnp.float32)
  if rank >= min(rows, columns):  # nothing to leave out
    identity = jnp.broadcast_to(jnp.eye(min(rows, columns)), (*stack, *(min(rows, columns),) * 2))
    return LowRank(identity, wide) if rows < columns else LowRank(wide, identity)
  if method == "randomized" or (method == "auto" and pays_to_sample(matrix.shape, rank)):
    return _balance(randomized_svd(_default(key), wide, rank=rank))
  return _balance(exact_svd(wide).first(rank))


def truncate_by_energy(
  matrix: jax.Array, energy: float, *, method: str = "auto", key: PRNGKey | None = None
) -> LowRank:
  """The approximation of the least rank that keeps `energy` of the squared Frobenius norm of EACH matrix of a stack.

  On the host, since the rank becomes a shape. Arguments and result as of `truncate`; `energy` in (0, 1].
  """
  shortest = min(matrix.shape[-2:])
  largest = jnp.abs(matrix).max(initial=0.0).astype(jnp.float32)
  scale = jnp.where(largest > 0, largest, 1.0)  # or squares could be too small, or too large, for float32
  matrix = matrix.astype(jnp.float32) / scale
  total = _energy(matrix)
  rank = 32
  while method != "exact" and (method == "randomized" or pays_to_sample(matrix.shape, rank)):
    svd = randomized_svd(_default(key), matrix, rank=min(rank, shortest))
    if (needed := _least_rank(svd.s, total, energy)) is not None:
      return _balance(svd.first(needed), scale)
    if rank >= shortest:
      break
    rank *= 2
  svd = exact_svd(matrix)
  return _balance(svd.first(_least_rank(svd.s, total, energy) or shortest), scale)


def pays_to_sample(shape: tuple[int, ...], rank: int) -> bool:
  """Whether `auto` is randomized."""
  shortest = min(shape[-2:])
  return shortest > LARGE and 8 * rank <= shortest


@jax.jit
def exact_svd(matrix: jax.Array) -> MatrixSVD:
  """All singular values, by LAPACK or what the device has."""
  return MatrixSVD(*jnp.linalg.svd(matrix.astype(jnp.float32), full_matrices=False))


@functools.partial(jax.jit, static_argnames="rank")
def randomized_svd(key: PRNGKey, matrix: jax.Array, *, rank: int) -> MatrixSVD:
  """The leading singular values from the matrix's products with a few random vectors.

  Reads the matrix 2 + 2 `POWER_ITERATIONS` times, where the exact way takes some 20 min(m, n) passes' worth of work.

  Reference: Halko, Martinsson & Tropp 2011, SIAM Review 53(2), algorithms 4.4 and 5.1.
  """
  wide = matrix.astype(jnp.float32)
  size = min(rank + OVERSAMPLING, *wide.shape[-2:])
  product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
  sketch = product(wide, jax.random.normal(key, (*wide.shape[:-2], wide.shape[-1], size)))
  basis = jnp.linalg.qr(sketch)[0]
  for _ in range(POWER_ITERATIONS):
    basis = jnp.linalg.qr(product(wide.mT, basis))[0]
    basis = jnp.linalg.qr(product(wide, basis))[0]
  u, s, vt = jnp.linalg.svd(product(basis.mT, wide), full_matrices=False)
  return MatrixSVD(product(basis, u), s, vt).first(rank)


@jax.jit
def relative_error(matrix: jax.Array, factors: LowRank) -> jax.Array:
  """`|matrix - b a| / |matrix|` in Frobenius norms, `[...]`; 0 for a matrix of zeros.

  By the difference itself: from the singular values, what is nearly nothing would be lost in rounding.
  """
  wide = matrix.astype(jnp.float32)
  rest = wide - jnp.matmul(*factors, precision=jax.lax.Precision.HIGHEST)
  # Scaled before it is squared: a task vector may be too small for squares in float32.
  scale = jnp.maximum(jnp.abs(wide).max((-2, -1), keepdims=True, initial=0.0), jnp.finfo(jnp.float32).tiny)
  size = jnp.linalg.norm(wide / scale, axis=(-2, -1))
  return jnp.where(size > 0, jnp.linalg.norm(rest / scale, axis=(-2, -1)) / jnp.where(size > 0, size, 1.0), 0.0)


def _balance(svd: MatrixSVD, scale: ArrayLike = 1.0) -> LowRank:
  """Two factors, without what is only rounding.

  Beyond the rank of a matrix its singular vectors are noise: in a basis they would be directions that another machine
  does not find again, and that other experts' cores would nonetheless be written in.
  """
  most = svd.s.max(axis=-1, keepdims=True, initial=0.0)
  noise = 8 * jnp.finfo(jnp.float32).eps * most
  return svd._replace(s=jnp.where(svd.s > noise, scale * svd.s, 0.0)).balanced()


def _energy(matrix: jax.Array) -> np.ndarray:
  norms = np.asarray(jnp.linalg.norm(matrix.astype(jnp.float32), axis=(-2, -1)), np.float64)
  return np.asarray(norms**2)


def _least_rank(singular_values: jax.Array, total: np.ndarray, energy: float) -> int | None:
  """The least rank that keeps `energy` of `total` in all matrices of a stack; None if these values are too few."""
  kept = np.cumsum(np.asarray(singular_values, np.float64) ** 2, axis=-1)
  wanted = energy * total[..., None] * (1 - 1e-6)  # the sums are of float32 values: 1.0 must be reachable
  enough = (kept >= wanted).reshape(-1, kept.shape[-1]).all(axis=0)
  return int(enough.argmax()) + 1 if enough.any() else None


def _default(key: PRNGKey | None) -> PRNGKey:
  return jax.random.key(0) if key is None else key
