import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cqd_jax.operators import consensus_merge, emr, frame_of, tall_masks

SHAPES = {"a": (5, 3), "b": (7,)}


def test_a_mask_is_where_a_task_is_large_beside_the_rest():
  task_vectors = {"w": jnp.array([[1.0, 0.3, 0.0, 0.0, jnp.nan], [1.0, -1.0, 2.0, 0.0, 1.0]])}
  merged = jax.tree.map(lambda leaf: leaf.sum(axis=0), task_vectors)
  masks = tall_masks(task_vectors, merged, threshold=0.4)["w"]
  np.testing.assert_array_equal(masks, [[True, False, False, True, False], [True, True, True, True, False]])
  each = tall_masks(task_vectors, merged, threshold=np.array([0.2, 2.0]))["w"]
  np.testing.assert_array_equal(each, [[True, True, False, True, False], [False, True, True, True, False]])
  both = consensus_merge(task_vectors, threshold=0.4)["w"]
  np.testing.assert_array_equal(both, [2.0, 0.0, 0.0, 0.0, 0.0])
  np.testing.assert_array_equal(consensus_merge(task_vectors, agree=1)["w"][:3], np.array([2.0, -0.7, 2.0], np.float32))


def test_elect_mask_and_rescale_by_hand():
  task_vectors = {"a": jnp.array([[1.0, -4.0, 2.0], [3.0, 1.0, -2.0]], jnp.bfloat16), "b": jnp.array([[0.0], [1.0]])}
  merged = emr(task_vectors)
  np.testing.assert_array_equal(merged.unified["a"], np.array([3.0, -4.0, 0.0], jnp.bfloat16))
  np.testing.assert_array_equal(merged.masks["a"], [[True, True, False], [True, False, False]])
  np.testing.assert_allclose(merged.scales, [7 / 7, 7 / 4])  # of |1| + |4| + |2|, and of 3 + 1 + 2 + 1
  back = merged.task_vector(1)
  np.testing.assert_array_equal(back["a"], np.array([5.25, 0.0, 0.0], jnp.bfloat16))
  np.testing.assert_array_equal(back["b"], [1.75])
  assert back["a"].dtype == jnp.bfloat16


def test_one_and_equal_task_vectors_come_back_and_opposite_ones_do_not():
  leaf = jnp.asarray(np.random.default_rng(0).normal(size=(5, 3)), jnp.float32)
  for same in (1, 3):
    merged = emr({"w": jnp.stack([leaf] * same)})
    np.testing.assert_allclose(merged.task_vector(same - 1)["w"], leaf, rtol=1e-6)
  nothing = emr({"w": jnp.stack([leaf, -leaf])})
  assert not np.asarray(nothing.unified["w"]).any()
  assert not np.asarray(nothing.task_vector(0)["w"]).any()


def test_a_rescaled_task_vector_has_its_own_sum_of_magnitudes(flat64):
  source = np.random.default_rng(1)
  trees = {name: jnp.asarray(source.normal(size=(3, *shape)), jnp.float32) for name, shape in SHAPES.items()}
  merged = jax.jit(emr)(trees)
  for t in range(3):
    own = flat64(jax.tree.map(lambda leaf, t=t: leaf[t], trees))
    assert np.abs(flat64(merged.task_vector(t))).sum() == pytest.approx(np.abs(own).sum(), rel=1e-5)


def test_masks_need_entries_and_shapes_that_fit():
  assert [frame_of(each) for each in (tall_masks, consensus_merge, emr)] == ["elementwise"] * 3
  with pytest.raises(ValueError, match=r"merged: expected a leaf of shape \(3,\), got \(2,\)"):
    tall_masks({"w": jnp.ones((2, 3))}, {"w": jnp.ones(2)})
