import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cqd_jax.genotypes import factors
from cqd_jax.low_rank import LowRank


def with_spectrum(seed, values, *shape):
  """A stack of matrices with the given singular values, float64."""
  source = np.random.default_rng(seed)
  *stack, rows, columns = shape
  u, v = (np.linalg.qr(source.normal(size=(*stack, size, len(values))))[0] for size in (rows, columns))
  return np.einsum("...mr,r,...nr->...mn", u, values, v)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(8, 5), (5, 8), (2, 6, 6), (2, 3, 4, 7)])
def test_exact_truncation_is_the_best_approximation(shape, dtype):
  matrix = jnp.asarray(np.random.default_rng(0).normal(size=shape), dtype)
  wide = np.asarray(matrix, np.float64)
  u, s, vt = np.linalg.svd(wide, full_matrices=False)
  for rank in (1, 3, min(shape[-2:]), 100):
    b, a = factors.truncate(matrix, rank, method="exact")
    assert b.dtype == a.dtype == jnp.float32
    assert b.shape[-1] == a.shape[-2] == min(rank, *shape[-2:])
    best = (u[..., :rank] * s[..., None, :rank]) @ vt[..., :rank, :]
    np.testing.assert_allclose(np.matmul(b, a), best, atol=1e-5)
    error = factors.relative_error(matrix, LowRank(b, a))
    lost = np.linalg.norm(best - wide, axis=(-2, -1)) / np.linalg.norm(wide, axis=(-2, -1))
    np.testing.assert_allclose(error, lost, atol=1e-6)


def test_the_randomized_way_is_nearly_as_good():
  values = 1.0 / np.arange(1, 41)  # a slow decay, the hard case
  matrix = jnp.asarray(with_spectrum(0, values, 2, 90, 70), jnp.float32)
  best = np.sqrt((values[6:] ** 2).sum() / (values**2).sum())
  for number in range(5):
    found = factors.truncate(matrix, 6, method="randomized", key=jax.random.key(number))
    error = np.asarray(factors.relative_error(matrix, found))
    assert (error > best * (1 - 1e-5)).all()
    assert (error < best * 1.01).all()


def test_the_randomized_way_finds_a_matrix_of_low_rank_exactly():
  matrix = jnp.asarray(with_spectrum(1, np.array([3.0, 2.0, 0.5]), 60, 50), jnp.float32)
  found = factors.truncate(matrix, 3, method="randomized")
  assert float(factors.relative_error(matrix, found)) < 2e-6
  svd = factors.randomized_svd(jax.random.key(0), matrix, rank=5)
  np.testing.assert_allclose(svd.s, [3.0, 2.0, 0.5, 0, 0], atol=1e-5)


@pytest.mark.parametrize("scale", [1e-20, 1e-35, 1e25])
def test_energy_of_very_small_and_very_large_matrices(scale):
  values = np.array([4.0, 2.0, 1.0, 0.5, 0.25])
  matrix = jnp.asarray(with_spectrum(3, values, 20, 10) * scale, jnp.float32)
  found = factors.truncate_by_energy(matrix, 0.95)
  assert found.b.shape[-1] == 3  # 21 of 21.3
  np.testing.assert_allclose(factors.relative_error(matrix, found), np.sqrt(0.3125 / 21.3125), rtol=1e-3)


def test_energy_is_reached_by_samples_that_grow():
  matrix = jnp.asarray(with_spectrum(2, np.ones(50), 70, 60), jnp.float32)
  found = factors.truncate_by_energy(matrix, 0.8, method="randomized")  # 40 of 50: more than the first 32
  assert found.b.shape[-1] == 40
  assert factors.truncate_by_energy(matrix, 1.0, method="randomized").b.shape[-1] == 50


def test_auto_samples_large_matrices_of_small_rank_only():
  assert factors.pays_to_sample((3, 600, 4096), 16)
  assert not factors.pays_to_sample((600, 4096), 80)
  assert not factors.pays_to_sample((500, 4096), 16)


def test_zero_loses_nothing():
  zero = jnp.zeros((2, 5, 4))
  for found in (
    factors.truncate(zero, 2, method="exact"),
    factors.truncate(zero, 2, method="randomized"),
    factors.truncate_by_energy(zero, 0.9),
  ):
    np.testing.assert_array_equal(factors.relative_error(zero, found), [0.0, 0.0])
