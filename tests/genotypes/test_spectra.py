"""Norms, inner products and singular values against float64 NumPy on matrices that are written out."""

import jax.numpy as jnp
import numpy as np
import pytest

from cqd_jax.genotypes.spectra import (
  SingularValues,
  captured_energy,
  inner_product,
  singular_values,
  spectral_similarity,
)
from cqd_jax.low_rank import LowRank


def draw(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def draw_factors(seed, rows, columns, rank):
  return LowRank(draw(seed, rows, rank), draw(seed + 100, rank, columns))


def written_out(change):
  if isinstance(change, LowRank):
    return np.asarray(change.b, np.float64) @ np.asarray(change.a, np.float64)
  return change.astype(np.float64)


def with_spectrum(seed, values, rows, columns):
  source = np.random.default_rng(seed)
  u, v = (np.linalg.qr(source.normal(size=(size, len(values))))[0] for size in (rows, columns))
  return ((u * values) @ v.T).astype(np.float32)


CHANGES = {
  "dense": draw(0, 9, 7),
  "other dense": draw(1, 9, 7),
  "factors": draw_factors(2, 9, 7, 3),
  "factors of another rank": draw_factors(3, 9, 7, 5),
  "more columns than the matrix has": draw_factors(4, 9, 7, 12),
}


@pytest.mark.parametrize("second", CHANGES)
@pytest.mark.parametrize("first", CHANGES)
def test_inner_products_are_those_of_the_matrices(first, second):
  one, other = CHANGES[first], CHANGES[second]
  expected = (written_out(one) * written_out(other)).sum()
  scale = np.linalg.norm(written_out(one)) * np.linalg.norm(written_out(other))
  assert inner_product(one, other) == pytest.approx(expected, abs=2e-6 * scale)


def test_inner_products_of_vectors():
  one, other = draw(0, 3, 5), draw(1, 3, 5)
  assert inner_product(one, other) == pytest.approx(float((one.astype(float) * other).sum()), rel=1e-6)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_neither_tiny_nor_huge_changes_are_lost_in_squares(scale):
  dense = (draw(0, 9, 7) * scale).astype(np.float32)
  assert inner_product(dense, dense) == pytest.approx(float((dense.astype(np.float64) ** 2).sum()), rel=1e-12)
  expected = np.linalg.svd(dense.astype(np.float64), compute_uv=False)
  np.testing.assert_allclose(singular_values(dense, most=3).values, expected, rtol=1e-4)
  factors = draw_factors(2, 9, 7, 3)
  factors = LowRank(factors.b * np.float32(scale), factors.a)
  assert inner_product(factors, factors) == pytest.approx((written_out(factors) ** 2).sum(), rel=1e-9)


def test_long_sums_lose_nothing():
  ones = np.full((1000, 20_000), np.float32(1.0))  # beyond 2^24, where a float32 sum of ones stands still
  assert inner_product(ones, ones) == 2e7


@pytest.mark.parametrize("name", CHANGES)
def test_singular_values_are_those_of_the_matrix(name):
  found = singular_values(CHANGES[name], most=2)
  expected = np.linalg.svd(written_out(CHANGES[name]), compute_uv=False)
  assert not found.sampled
  assert found.values.dtype == np.float64
  assert (np.diff(found.values) <= 0).all()
  np.testing.assert_allclose(found.values, expected[: len(found.values)], atol=1e-5 * expected[0])
  assert np.allclose(expected[len(found.values) :], 0, atol=1e-12)  # of factors: beyond their rank


def test_factors_that_are_not_of_full_rank():
  b = np.concatenate([draw(0, 9, 2), np.zeros((9, 2), np.float32)], axis=1)
  found = singular_values(LowRank(b, draw(1, 4, 7)), most=4).values
  np.testing.assert_allclose(found[2:], 0, atol=1e-6)
  assert (singular_values(LowRank(np.zeros((9, 2), np.float32), draw(1, 2, 7)), most=4).values == 0).all()


def test_large_factors_are_never_written_out():
  """Their product would take 240 GB."""
  one, other = (draw_factors(seed, 300_000, 200_000, 2) for seed in (0, 1))
  inner = np.sum((one.b.T.astype(np.float64) @ other.b) * (one.a.astype(np.float64) @ other.a.T))
  assert inner_product(one, other) == pytest.approx(inner, rel=1e-6)
  values = singular_values(one, most=8).values
  assert (values**2).sum() == pytest.approx(inner_product(one, one), rel=1e-9)


def test_large_matrices_are_sampled_from_below():
  values = 0.7 ** np.arange(40)
  matrix = with_spectrum(5, values, 520, 600)
  found = singular_values(matrix, most=8)
  assert found.sampled
  assert len(found.values) == 8
  np.testing.assert_allclose(found.values, values[:8], rtol=1e-4)
  flat = draw(6, 520, 600)
  sampled, exact = singular_values(flat, most=8), np.linalg.svd(flat, compute_uv=False)
  assert (sampled.values <= exact[:8] * (1 + 1e-5)).all()
  assert (sampled.values > exact[:8] * 0.8).all()  # of a flat spectrum less is found


def test_captured_energy_grows_to_the_whole():
  matrix = draw(0, 9, 7)
  squares = np.linalg.svd(matrix.astype(np.float64), compute_uv=False) ** 2
  total = inner_product(matrix, matrix)
  held = captured_energy(singular_values(matrix, most=12), total, 12)
  np.testing.assert_allclose(held, np.pad(np.cumsum(squares), (0, 5), mode="edge"), rtol=1e-5)
  assert (held <= total).all()
  few = captured_energy(SingularValues(np.array([3.0, 1.0]), sampled=False), 10.0, 1)
  assert few.tolist() == [9.0]


def test_similarity_is_the_cosine_of_the_singular_values():
  one, other = SingularValues(np.array([3.0, 4.0, 0.0]), False), SingularValues(np.array([4.0, 3.0]), False)
  assert spectral_similarity(one, other) == pytest.approx(24 / 25)
  assert spectral_similarity(one, one) == pytest.approx(1)
  few = SingularValues(np.array([2.0]), True)
  assert spectral_similarity(one, few) == pytest.approx(1)  # of the leading value alone
  assert spectral_similarity(SingularValues(np.array([5.0]), False), one) == pytest.approx(3 / 5)
  two = SingularValues(np.array([4.0, 3.0]), True)
  assert spectral_similarity(two, SingularValues(np.array([4.0]), False)) == pytest.approx(4 / 5)  # padded with zeros


def test_bfloat16_factors():
  factors = draw_factors(2, 9, 7, 3)
  narrow = LowRank(*(jnp.asarray(factor, jnp.bfloat16) for factor in factors))
  expected = np.linalg.svd(written_out(narrow), compute_uv=False)[:3]
  np.testing.assert_allclose(singular_values(narrow, most=4).values, expected, rtol=1e-6)
