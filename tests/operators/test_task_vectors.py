import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cqd_jax.operators import apply_task_vector, task_vector

DTYPES = [jnp.float32, jnp.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_difference_is_taken_in_float32_and_rounded_once(make_tree, to_float64, check_close, dtype):
  params, base = make_tree(0, dtype), make_tree(1, dtype)
  expected = jax.tree.map(np.subtract, to_float64(params), to_float64(base))
  check_close(task_vector(params, base), expected, dtype)
  check_close(jax.jit(task_vector)(params, base), expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_applying_adds_the_scaled_task_vector(make_tree, to_float64, check_close, dtype):
  base, difference = make_tree(2, dtype), make_tree(3, dtype)
  expected = jax.tree.map(lambda b, t: b - 0.75 * t, to_float64(base), to_float64(difference))
  check_close(apply_task_vector(base, difference, -0.75), expected, dtype)
  check_close(jax.jit(apply_task_vector)(base, difference, -0.75), expected, dtype)


def test_taking_and_applying_undo_each_other(make_tree):
  # Multiples of 1/8 below 4: every sum and difference is exact, so equality is too.
  params, base = (jax.tree.map(lambda x: jnp.clip(jnp.round(8 * x), -31, 31) / 8, make_tree(seed)) for seed in (4, 5))
  again = jax.jit(lambda params, base: apply_task_vector(base, task_vector(params, base)))(params, base)
  jax.tree.map(np.testing.assert_array_equal, again, params)


def test_a_population_shares_the_base(make_tree, to_float64, check_close):
  base, differences = make_tree(6), make_tree(7, lead=(2,))
  models = jax.jit(jax.vmap(apply_task_vector, in_axes=(None, 0, 0)))(base, differences, jnp.array([1.0, 3.0]))
  for i, scale in enumerate((1.0, 3.0)):
    one = jax.tree.map(operator.itemgetter(i), models)
    expected = jax.tree.map(lambda b, t: b + scale * t[i], to_float64(base), to_float64(differences))  # noqa: B023
    check_close(one, expected)


def test_the_gradient_with_respect_to_the_scale_is_the_task_vector(make_tree):
  base, difference, probe = make_tree(8), make_tree(9), make_tree(10)

  def product(scale):
    params = apply_task_vector(base, difference, scale)
    return sum(jax.tree.leaves(jax.tree.map(lambda a, b: jnp.sum(a * b), params, probe)))

  expected = sum(
    float(np.sum(np.float64(a) * np.float64(b)))
    for a, b in zip(jax.tree.leaves(difference), jax.tree.leaves(probe), strict=True)
  )
  np.testing.assert_allclose(jax.jit(jax.grad(product))(0.3), expected, rtol=1e-4)


@pytest.mark.parametrize(
  ("params", "base", "message"),
  [
    ({"a": jnp.ones(2)}, {"a": jnp.ones(3)}, r"params\['a'\]"),
    ({"a": jnp.ones(2)}, {"b": jnp.ones(2)}, "params: misses"),
    ({"a": jnp.ones(2, jnp.bfloat16)}, {"a": jnp.ones(2)}, r"params\['a'\]"),
    ({"a": jnp.arange(2)}, {"a": jnp.arange(2)}, r"base\['a'\]: expected floats"),
  ],
)
def test_trees_that_do_not_fit_are_refused(params, base, message):
  with pytest.raises(ValueError, match=message):
    task_vector(params, base)


def test_applying_refuses_trees_and_scales_that_do_not_fit():
  with pytest.raises(ValueError, match=r"task_vector\['a'\]"):
    apply_task_vector({"a": jnp.ones(2)}, {"a": jnp.ones(3)})
  with pytest.raises(ValueError, match="scale: expected a scalar"):
    apply_task_vector({"a": jnp.ones(2)}, {"a": jnp.ones(2)}, jnp.ones(2))
  with pytest.raises(ValueError, match="scale: expected a finite number"):
    apply_task_vector({"a": jnp.ones(2)}, {"a": jnp.ones(2)}, float("nan"))
