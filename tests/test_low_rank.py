import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cqd_jax.low_rank import LowRankUpdate, MatrixSVD, combine_shared, matmul, partition_shared, take_rows


def make_update(seed=0, dtype=jnp.float32, rows=7, columns=5):
  source = np.random.default_rng(seed)

  def draw(*shape):
    return jnp.asarray(source.normal(size=shape), dtype)

  return LowRankUpdate(draw(rows, columns), draw(rows, 3), draw(3, 2).astype(jnp.float32), draw(columns, 2))


def written_out(update):
  kernel, left, core, right = (np.asarray(part, np.float64) for part in jax.tree.leaves(update))
  return kernel + left @ core @ right.T


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.bfloat16, 0.15)])
def test_products_and_rows_are_those_of_the_matrix_written_out(dtype, tolerance):
  update = make_update(dtype=dtype)
  dense = written_out(update)
  x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 4, 7)), dtype)
  product = matmul(x, update)
  assert product.dtype == dtype
  np.testing.assert_allclose(product.astype(jnp.float32), np.asarray(x, np.float64) @ dense, atol=tolerance)
  wide = matmul(x, update, preferred_element_type=jnp.float32)
  assert wide.dtype == jnp.float32
  np.testing.assert_allclose(wide, np.asarray(x, np.float64) @ dense, atol=tolerance)
  ids = jnp.array([[6, 0], [3, 3]])
  rows = take_rows(update, ids)
  assert rows.dtype == dtype
  np.testing.assert_allclose(rows.astype(jnp.float32), dense[np.asarray(ids)], atol=tolerance)
  np.testing.assert_allclose(written_out(update.T), dense.T)


def test_arrays_are_multiplied_and_looked_up_as_they_are():
  matrix = jnp.arange(6.0).reshape(3, 2)
  np.testing.assert_array_equal(matmul(jnp.ones((4, 3)), matrix), np.full((4, 2), [6.0, 9.0]))
  np.testing.assert_array_equal(take_rows(matrix, jnp.array([2])), [[4.0, 5.0]])


def test_own_and_shared_parts_make_the_whole():
  params = {"kernel": make_update(), "bias": jnp.ones(5), "list": [make_update(1), jnp.zeros(2)]}
  own, shared = partition_shared(params)
  assert own["kernel"].shape == (3, 2)
  assert shared["bias"] is None
  assert shared["kernel"].core is None
  assert len(jax.tree.leaves(own)) + len(jax.tree.leaves(shared)) == len(jax.tree.leaves(params))
  jax.tree.map(np.testing.assert_array_equal, combine_shared(own, shared), params)
  doubled = combine_shared(jax.tree.map(lambda leaf: 2 * leaf, own), shared)
  np.testing.assert_array_equal(doubled["kernel"].core, 2 * params["kernel"].core)
  assert doubled["kernel"].kernel is params["kernel"].kernel


@pytest.mark.usefixtures("optimized")
def test_a_population_meets_the_base_in_one_product():
  """Under vmap over cores the compiled program has no batch of copies of the base's matrix."""
  update = make_update(rows=64, columns=48)
  cores = jnp.ones((5, 3, 2))
  x = jnp.ones((5, 4, 64))
  own = jax.jit(jax.vmap(lambda core, rows: matmul(rows, update.replace(core=core)))).lower(cores, x).compile()
  assert "5,64,48" not in own.as_text()
  assert "5,48,64" not in own.as_text()
  np.testing.assert_allclose(own(cores, x)[2], matmul(x[2], update.replace(core=cores[2])), rtol=1e-4)


def test_the_leading_part_of_a_decomposition():
  matrix = np.random.default_rng(0).normal(size=(2, 6, 5))
  svd = MatrixSVD(*(jnp.asarray(part) for part in np.linalg.svd(matrix, full_matrices=False)))
  b, a = svd.first(5).balanced()
  np.testing.assert_allclose(np.matmul(b, a), matrix, atol=1e-5)
  assert [part.shape for part in svd.first(2)] == [(2, 6, 2), (2, 2), (2, 2, 5)]
