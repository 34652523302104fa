"""Matrices of task vectors compared: norms, inner products and singular values, of dense ones and of factors.

On the host and in float64, where neither long sums nor small squares lose anything; only decompositions of dense
matrices run on the device, in float32. Factors are never multiplied out: all that is wanted of B A is in products of
its factors as small as its rank.
"""

from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from cqd_jax.genotypes.factors import pays_to_sample, randomized_svd
from cqd_jax.low_rank import LowRank

Change: TypeAlias = Any
"""Of one matrix `[m, n]`: a float32 array on the host, or `LowRank` factors `[m, r]` and `[r, n]` of it."""


class SingularValues(NamedTuple):
  """Singular values of one matrix.

  Attributes:
    values: `[r]` float64, falling; those that are not among them are 0, unless `sampled`.
    sampled: whether they are only the leading ones, found by the randomized way: never above the true ones, and close
      to them where they fall.
  """

  values: np.ndarray
  sampled: bool


def inner_product(first: Change, second: Change) -> float:
  """The sum of products of corresponding entries; of dense changes in any one shape, vectors too."""
  if isinstance(first, LowRank) and isinstance(second, LowRank):
    columns = _wide(first.b).T @ _wide(second.b)
    rows = _wide(first.a) @ _wide(second.a).T
    return float((columns * rows).sum())
  if isinstance(first, LowRank):
    first, second = second, first
  if isinstance(second, LowRank):
    b, a = (np.asarray(factor, np.float32) for factor in second)
    return _sum_of_products(first @ a.T, b)
  return _sum_of_products(first, second)


def singular_values(matrix: Change, *, most: int) -> SingularValues:
  """All singular values; of a large dense matrix, where it pays, the `most` largest by the randomized way.

  Args:
    matrix: dense `[m, n]` or factors.
    most: at least 1.
  """
  if isinstance(matrix, LowRank):
    return SingularValues(_values_of_factors(matrix), sampled=False)
  sampled = pays_to_sample(matrix.shape, most)
  array = jax.device_put(matrix)
  values = randomized_svd(jax.random.key(0), array, rank=most).s if sampled else _all_singular_values(array)
  # Waits: no two decompositions at once, see `low_rank.after`.
  return SingularValues(np.asarray(values, np.float64), sampled)


def captured_energy(found: SingularValues, total: float, most: int) -> Float[np.ndarray, "{most}"]:
  """How much of the squared Frobenius norm the best approximations of rank 1 to `most` hold.

  Args:
    found: of the matrix.
    total: its squared norm, which the result never exceeds.
    most: at least 1; no more than there are values, if these are sampled.
  """
  sums = np.cumsum(found.values[:most] ** 2)
  return np.minimum(np.pad(sums, (0, most - len(sums)), mode="edge"), total)


def spectral_similarity(first: SingularValues, second: SingularValues) -> float:
  """cos(diag S_A, diag S_B) of two matrices that are not zero, in (0, 1]; 1: their energy is spread alike.

  If one of the two is sampled, of as many leading values of both as were sampled. It says nothing about directions.

  Reference: Kuroki et al. 2025, CycleQD, arXiv:2410.14735: its mean over layers is the similarity of two experts.
  """
  counts = [len(each.values) for each in (first, second) if each.sampled]
  size = min(counts) if counts else max(len(first.values), len(second.values))
  one, other = (np.pad(each.values[:size], (0, max(0, size - len(each.values)))) for each in (first, second))
  return float(one @ other / (np.linalg.norm(one) * np.linalg.norm(other)))


@jax.jit
def _all_singular_values(matrix: jax.Array) -> jax.Array:
  return jnp.linalg.svd(matrix.astype(jnp.float32), compute_uv=False)


def _values_of_factors(factors: LowRank) -> np.ndarray:
  """The singular values of B A: roots of the eigenvalues of (A A^T)^(1/2) (B^T B) (A A^T)^(1/2).

  Squaring in float64 costs what is below 1e-8 of the largest, which factors in float32 do not hold either.
  """
  b, a = map(_wide, factors)
  weights, vectors = np.linalg.eigh(a @ a.T)
  root = vectors * np.sqrt(np.maximum(weights, 0.0))
  squares = np.linalg.eigvalsh(root.T @ (b.T @ b) @ root)
  return np.sqrt(np.maximum(squares[::-1], 0.0))[: min(b.shape[0], a.shape[1])]


def _wide(factor: Any) -> np.ndarray:
  return np.asarray(factor, np.float64)


def _sum_of_products(first: np.ndarray, second: np.ndarray) -> float:
  return float(np.einsum("i,i->", first.reshape(-1), second.reshape(-1), dtype=np.float64))
