import jax
import jax.numpy as jnp
import merge_oracles as oracle
import numpy as np
import pytest

from cqd_jax.operators import arcee_fusion, frame_of, nearswap


def test_no_step_is_larger_than_t():
  task_vector = {"w": jnp.array([0.5, -0.01, 1e-8, 0.0, -3.0, jnp.nan], jnp.float32)}
  np.testing.assert_allclose(nearswap(task_vector, t=0.1)["w"], [0.1, -0.01, 1e-8, 0.0, -0.1, np.nan], rtol=1e-6)
  np.testing.assert_allclose(nearswap(task_vector, t=1e-7)["w"][:3], [1e-7, -1e-7, 1e-9], rtol=1e-6)
  np.testing.assert_array_equal(nearswap(task_vector, t=0.0)["w"][:5], np.zeros(5))
  assert nearswap({"w": jnp.ones(2, jnp.bfloat16)}, t=0.3)["w"].dtype == jnp.bfloat16


@pytest.mark.parametrize("size", [1.0, 3e-4])
def test_fusion_keeps_what_matters(make_tree, to_float64, size):
  base, difference = make_tree(0), jax.tree.map(lambda leaf: size * leaf, make_tree(1))
  result = jax.jit(arcee_fusion)(difference, base)

  def fuse(pair):
    return oracle.arcee_fusion(pair[0], pair[1])

  pairs = jax.tree.map(lambda one, other: np.stack([one, other]), to_float64(difference), to_float64(base))
  # Of small differences float32 still finds the mask that exact arithmetic does.
  jax.tree.map(
    lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-6), result, oracle.over_tensors(fuse, pairs)
  )
  assert any(np.asarray(leaf).any() for leaf in jax.tree.leaves(result))


def test_nothing_is_fused_of_nothing(make_tree):
  result = arcee_fusion({"w": jnp.zeros((3, 4))}, {"w": jnp.ones((3, 4))})
  np.testing.assert_array_equal(result["w"], np.zeros((3, 4)))


def test_what_does_not_fit_is_refused():
  assert [frame_of(each) for each in (nearswap, arcee_fusion)] == ["elementwise"] * 2
  with pytest.raises(ValueError, match=r"task_vector\['w'\]: expected float32\[3\] as in base"):
    arcee_fusion({"w": jnp.ones(2)}, {"w": jnp.ones(3)})
  with pytest.raises(ValueError, match="t: expected a finite number"):
    nearswap({"w": jnp.ones(2)}, t=float("nan"))
