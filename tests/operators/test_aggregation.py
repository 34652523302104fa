import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cqd_jax.operators import aggregate, task_arithmetic, uniform_average

DTYPES = [jnp.float32, jnp.bfloat16]


def weighted(tree, weights):
  return jax.tree.map(lambda leaf: np.tensordot(weights, np.asarray(leaf, np.float64), axes=1), tree)


def softmax(values):
  powers = np.exp(np.asarray(values, np.float64) - np.max(values))
  return powers / powers.sum()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_weights_are_the_softmax_of_the_fitnesses(make_tree, check_close, dtype):
  trees = make_tree(0, dtype, lead=(3,))
  fitnesses = [0.7, 0.1, -0.4]
  expected = weighted(trees, softmax(fitnesses))
  check_close(jax.jit(aggregate)(trees, jnp.array(fitnesses)), expected, dtype)


def test_each_population_member_has_its_own_aggregate(make_tree, check_close):
  trees = make_tree(1, lead=(2, 4))
  fitnesses = np.random.default_rng(2).normal(size=(2, 4)).astype(np.float32)
  merged = jax.jit(jax.vmap(aggregate))(trees, jnp.asarray(fitnesses))
  for i in range(2):
    expected = weighted(jax.tree.map(operator.itemgetter(i), trees), softmax(fitnesses[i]))
    check_close(jax.tree.map(operator.itemgetter(i), merged), expected)


@pytest.mark.parametrize("bad", [jnp.nan, -jnp.inf, jnp.inf])
def test_nothing_of_an_individual_without_a_finite_fitness_leaks(make_tree, check_close, bad):
  trees = make_tree(3, lead=(3,))
  poisoned = jax.tree.map(lambda leaf: leaf.at[1].set(jnp.nan), trees)
  expected = weighted(jax.tree.map(lambda leaf: leaf[jnp.array([0, 2])], trees), softmax([0.5, 1.5]))
  check_close(jax.jit(aggregate)(poisoned, jnp.array([0.5, bad, 1.5])), expected)


def test_without_any_finite_fitness_the_aggregate_is_the_base(make_tree):
  trees = jax.tree.map(lambda leaf: leaf * jnp.nan, make_tree(4, jnp.bfloat16, lead=(2,)))
  for leaf in jax.tree.leaves(jax.jit(aggregate)(trees, jnp.array([-jnp.inf, jnp.nan]))):
    np.testing.assert_array_equal(np.asarray(leaf, np.float32), 0.0)


@pytest.mark.parametrize(
  ("fitnesses", "weights"),
  [
    ([3e38, -3e38], [1, 0]),
    ([3e38, 3e38], [0.5, 0.5]),
    ([-3e38, -3e38], [0.5, 0.5]),
    ([1000, 999], [0.731059, 0.268941]),
  ],
)
def test_large_fitnesses_do_not_overflow(fitnesses, weights):
  merged = jax.jit(aggregate)({"w": jnp.eye(2)}, jnp.array(fitnesses, jnp.float32))
  np.testing.assert_allclose(merged["w"], weights, rtol=1e-5)


def test_integer_fitnesses_are_taken():
  merged = jax.jit(aggregate)({"w": jnp.eye(2)}, jnp.array([1, 3]))
  np.testing.assert_allclose(merged["w"], softmax([1, 3]), rtol=1e-6)


def test_gradients_are_those_of_the_softmax_and_finite_beside_invalid_individuals():
  source = np.random.default_rng(5)
  rows, probe = source.normal(size=(4, 6)), source.normal(size=6)
  rows[2] = np.nan
  fitnesses = np.array([0.2, -1.0, np.nan, 0.4])
  valid = [0, 1, 3]
  weights, products = softmax(fitnesses[valid]), rows[valid] @ probe

  def objective(leaf, fits):
    return jnp.sum(aggregate({"w": leaf}, fits)["w"] * jnp.asarray(probe, jnp.float32))

  by_leaf, by_fitness = jax.jit(jax.grad(objective, argnums=(0, 1)))(
    jnp.asarray(rows, jnp.float32), jnp.asarray(fitnesses, jnp.float32)
  )
  np.testing.assert_allclose(by_leaf[jnp.array(valid)], weights[:, None] * probe, rtol=1e-5, atol=1e-6)
  np.testing.assert_array_equal(by_leaf[2], 0.0)
  expected = weights * (products - weights @ products)
  np.testing.assert_allclose(by_fitness[jnp.array(valid)], expected, rtol=1e-5, atol=1e-6)
  assert by_fitness[2] == 0.0


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_average_and_the_scaled_sum(make_tree, check_close, dtype):
  trees = make_tree(6, dtype, lead=(5,))
  check_close(jax.jit(uniform_average)(trees), weighted(trees, np.full(5, 0.2)), dtype)
  check_close(jax.jit(task_arithmetic)(trees, 0.4), weighted(trees, np.full(5, 0.4)), dtype)


def test_a_sum_in_bfloat16_does_not_lose_small_terms():
  # 256 + 1 + ... + 1 in bfloat16 would stay 256.
  leaf = jnp.concatenate([jnp.full((1, 1), 256.0), jnp.ones((16, 1))]).astype(jnp.bfloat16)
  assert float(task_arithmetic({"w": leaf}, 1.0)["w"][0]) == 272.0


def test_arguments_that_do_not_fit_are_refused():
  trees = {"w": jnp.ones((3, 2))}
  with pytest.raises(ValueError, match="fitnesses: expected one fitness a task vector"):
    aggregate(trees, jnp.ones((3, 1)))
  with pytest.raises(ValueError, match=r"task_vectors\['w'\]: expected 2 individuals"):
    aggregate(trees, jnp.ones(2))
  with pytest.raises(ValueError, match=r"task_vectors\['w'\]: expected floats"):
    aggregate({"w": jnp.arange(3)}, jnp.ones(3))
  with pytest.raises(ValueError, match="task_vectors: expected at least one"):
    uniform_average({"w": jnp.ones((0, 2))})
  with pytest.raises(ValueError, match=r"task_vectors\['b'\]: expected 3 individuals|task_vectors\['w'\]: expected 2"):
    task_arithmetic({"w": jnp.ones((3, 2)), "b": jnp.ones((2, 2))}, 1.0)
  with pytest.raises(ValueError, match="scale: expected a scalar"):
    task_arithmetic(trees, jnp.ones(3))


def test_numpy_arrays_are_taken():
  combined = aggregate({"w": np.array([[1.0, 2.0], [3.0, 4.0]])}, np.array([0.0, np.log(3.0)]))
  np.testing.assert_allclose(combined["w"], [2.5, 3.5], rtol=1e-6)
