"""Merges by what data say; the others of the module are in `test_merges`."""

import jax
import jax.numpy as jnp
import merge_oracles as oracle
import numpy as np
import pytest

from cqd_jax.operators import fisher, frame_of, model_stock, passthrough, regmean

SOURCE = np.random.default_rng(0)
TREES = {
  "layers": {"kernel": jnp.asarray(SOURCE.normal(size=(2, 2, 5, 4)), jnp.float32)},
  "bias": jnp.asarray(SOURCE.normal(size=(2, 4)), jnp.float32),
}
INPUTS = SOURCE.normal(size=(2, 2, 30, 5))
GRAMS = {"layers": {"kernel": jnp.asarray(np.einsum("tlbi,tlbj->tlij", INPUTS, INPUTS), jnp.float32)}, "bias": None}


@pytest.mark.parametrize("alpha", [1.0, 0.7])
def test_regression_mean_solves_its_equations(alpha):
  result = jax.jit(regmean)(TREES, GRAMS, alpha=alpha)
  kernels, grams = (np.asarray(tree["layers"]["kernel"], np.float64) for tree in (TREES, GRAMS))
  expected = [oracle.regmean(kernels[:, i], grams[:, i], alpha) for i in range(2)]
  np.testing.assert_allclose(result["layers"]["kernel"], expected, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(result["bias"], TREES["bias"].mean(axis=0), rtol=1e-6)


def test_its_outputs_are_nearest_to_those_of_all_experts():
  result = np.asarray(regmean(TREES, GRAMS, alpha=1.0)["layers"]["kernel"], np.float64)
  kernels = np.asarray(TREES["layers"]["kernel"], np.float64)

  def distance(merged):
    return sum(((INPUTS[t] @ (merged - kernels[t])) ** 2).sum() for t in range(2))

  for _ in range(5):
    assert distance(result) < distance(result + 1e-2 * SOURCE.normal(size=result.shape))


def test_inputs_that_no_data_have_are_merged_by_the_mean():
  grams = {"w": GRAMS["layers"]["kernel"][:, 0].at[:, 2].set(0.0).at[:, :, 2].set(0.0)}
  trees = {"w": TREES["layers"]["kernel"][:, 0]}
  merged = regmean(trees, grams)["w"]
  np.testing.assert_allclose(merged[2], trees["w"][:, 2].mean(axis=0), rtol=1e-5)
  equal = regmean({"w": jnp.stack([trees["w"][0]] * 2)}, grams)["w"]
  np.testing.assert_allclose(equal, trees["w"][0], atol=1e-5)


def test_fisher_weighs_each_entry():
  task_vectors = {"w": jnp.array([[1.0, 2.0, 3.0], [5.0, 4.0, -3.0]], jnp.bfloat16)}
  information = {"w": jnp.array([[3.0, 0.0, 0.0], [1.0, 2.0, 0.0]])}
  result = fisher(task_vectors, information, floor=0.0)["w"]
  np.testing.assert_array_equal(result, np.array([2.0, 4.0, 0.0], jnp.bfloat16))
  assert result.dtype == jnp.bfloat16
  weighted = fisher(task_vectors, information, np.array([1.0, 3.0]))["w"]
  np.testing.assert_array_equal(weighted, np.array([3.0, 4.0, -1.5], jnp.bfloat16))


def test_of_models_they_are_what_they_are_of_task_vectors():
  base = jnp.asarray(SOURCE.normal(size=(5, 4)), jnp.float32)
  trees, grams = TREES["layers"]["kernel"][:, 0], GRAMS["layers"]["kernel"][:, 0]
  information = jnp.asarray(SOURCE.random(size=(2, 5, 4)), jnp.float32)
  for merge in (lambda x: regmean({"w": x}, {"w": grams})["w"], lambda x: fisher({"w": x}, {"w": information})["w"]):
    np.testing.assert_allclose(merge(base[None] + trees), base + merge(trees), rtol=1e-4, atol=1e-4)


def test_model_stock_of_mergekit_takes_small_ones_for_less_alike():
  trees = 1e-4 * TREES["layers"]["kernel"][:, 0]
  expected = oracle.model_stock(np.asarray(trees, np.float64), floor=1e-6)
  np.testing.assert_allclose(model_stock({"w": trees}, convention="mergekit")["w"], expected, rtol=1e-5, atol=1e-9)
  assert np.abs(expected).max() < 0.5 * np.abs(oracle.model_stock(np.asarray(trees, np.float64))).max()


def test_passthrough_scales():
  np.testing.assert_array_equal(passthrough({"w": jnp.array([1.0, -2.0])}, 0.5)["w"], [0.5, -1.0])
  assert [frame_of(each) for each in (passthrough, fisher, regmean)] == ["linear", "elementwise", "elementwise"]


@pytest.mark.parametrize(
  ("grams", "message"),
  [
    ({"w": jnp.ones((2, 4, 4))}, r"grams: expected \(2, 3, 3\) for matrices, got \(2, 4, 4\)"),
    ({"w": None}, "grams: expected .* for matrices, got NoneType"),
    ({"v": jnp.ones((2, 3, 3))}, "grams: expected the structure of task_vectors"),
  ],
)
def test_statistics_that_do_not_fit_are_refused(grams, message):
  with pytest.raises(ValueError, match=message):
    regmean({"w": jnp.ones((2, 3, 5))}, grams)
  with pytest.raises(ValueError, match=r"fishers: (misses|has)|fishers\['w'\]: expected"):
    fisher({"w": jnp.ones((2, 3, 5))}, grams if grams.get("w") is not None or "v" in grams else {})
