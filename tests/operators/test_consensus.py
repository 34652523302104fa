import functools
import itertools
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cqd_jax.operators import frame_of, sign_consensus, ties, trim

DTYPES = [jnp.float32, jnp.bfloat16]
WEIGHTS = np.array([0.5, 1.25, 0.75])


def consensus(task_vectors, weights, normalize=True):
  """Sign election and disjoint mean of float64 entries `[T, ...]`, entry by entry, as the paper has it."""
  merged = np.zeros(task_vectors.shape[1:])
  for index in np.ndindex(merged.shape):
    entries = [(weight, value) for weight, value in zip(weights, task_vectors[:, *index], strict=True)]
    mass = sum(weight * value for weight, value in entries)
    agreeing = [(weight, value) for weight, value in entries if weight * value * mass > 0]
    if agreeing:
      total = sum(weight * value for weight, value in agreeing)
      merged[index] = total / sum(abs(weight) for weight, _ in agreeing) if normalize else total
  return merged


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("weights", [None, WEIGHTS, np.array([0.5, -1.25, 0.75])], ids=["none", "some", "negative"])
def test_the_elected_sign_merges_and_the_rest_is_silent(make_tree, to_float64, check_close, dtype, normalize, weights):
  trees = make_tree(0, dtype, lead=(3,))
  result = jax.jit(functools.partial(sign_consensus, normalize=normalize))(trees, weights)
  used = np.ones(3) if weights is None else weights
  check_close(result, jax.tree.map(lambda leaf: consensus(leaf, used, normalize), to_float64(trees)), dtype, scale=10.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("granularity", ["kernel", "model"])
def test_ties_is_trim_and_consensus(make_tree, to_float64, check_close, dtype, granularity):
  trees = make_tree(1, dtype, lead=(3,))
  result = jax.jit(functools.partial(ties, density=0.4, granularity=granularity))(trees, WEIGHTS)
  each = [trim(jax.tree.map(operator.itemgetter(t), trees), density=0.4, granularity=granularity) for t in range(3)]
  stacked = jax.tree.map(lambda *leaves: np.stack([np.asarray(leaf, np.float64) for leaf in leaves]), *each)
  check_close(result, jax.tree.map(lambda leaf: consensus(leaf, WEIGHTS), stacked), dtype, scale=10.0)


@pytest.mark.parametrize(
  ("entries", "weights", "paper", "mergekit"),
  [
    ([3, 1, -2], [1, 1, 1], 2, 2),
    ([3, 1, -5], [1, 1, 1], -5, -5),
    ([3, 0, 0], [1, 1, 1], 3, 3),  # zeros do not count in the mean
    ([0, 0, 0], [1, 1, 1], 0, 0),
    ([2, -2, 0], [1, 1, 1], 0, 2),  # an exact balance
    ([4, 1, -2], [1, 3, 1], 7 / 4, 7 / 4),
    ([4, 1, -2], [1, 0, 1], 4, 4),
    ([4, 1, -2], [0, 0, 0], 0, 0),
    ([4, 1, -2], [-1, -1, -1], -2.5, 2.5),  # plus of the first two: -5 over 2, or over -2
    ([4, 1, 2], [1, 1, -1], 2.5, 2.5),
    ([1, 1, 4], [1, 1, -2], -4, 4),  # -8 over 2, or over -2
    ([3, 3, -1], [2, 1, -3], 12 / 6, 12),  # all three say plus; 2 + 1 - 3 = 0, and mergekit divides by 1
    ([np.inf, 1, -2], [1, 1, 1], np.inf, np.inf),
    ([np.inf, -np.inf, 1], [1, 1, 1], np.nan, np.nan),
    ([np.nan, 1, 2], [1, 1, 1], np.nan, np.nan),
  ],
)
def test_by_hand(entries, weights, paper, mergekit):
  task_vectors, weights = {"w": jnp.array(entries, jnp.float32)[:, None]}, np.array(weights, np.float32)
  for convention, expected in (("paper", paper), ("mergekit", mergekit)):
    result = sign_consensus(task_vectors, weights, convention=convention)["w"]
    np.testing.assert_allclose(result, np.array([expected], np.float32), rtol=1e-6)


def test_without_negative_weights_and_exact_balance_both_conventions_agree(make_tree):
  trees = make_tree(2, lead=(3,))
  one, other = (ties(trees, WEIGHTS, density=0.5, convention=convention) for convention in ("paper", "mergekit"))
  jax.tree.map(np.testing.assert_array_equal, one, other)


def test_the_order_of_task_vectors_does_not_matter(make_tree):
  trees = make_tree(3, lead=(3,))
  expected = ties(trees, WEIGHTS, density=0.5)
  for order in itertools.permutations(range(3)):
    order = np.array(order)
    result = ties(jax.tree.map(lambda leaf, order=order: leaf[order], trees), WEIGHTS[order], density=0.5)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), result, expected)


def test_a_sign_before_everything_comes_out_again(make_tree):
  trees = make_tree(4, lead=(3,))
  against = ties(jax.tree.map(jnp.negative, trees), WEIGHTS, density=0.5)
  jax.tree.map(np.testing.assert_array_equal, against, jax.tree.map(jnp.negative, ties(trees, WEIGHTS, density=0.5)))


def test_the_scale_of_weights_does_not_matter_to_a_mean_and_is_that_of_a_sum(make_tree):
  trees = make_tree(5, lead=(3,))
  jax.tree.map(np.testing.assert_array_equal, sign_consensus(trees, 4 * WEIGHTS), sign_consensus(trees, WEIGHTS))
  sums = [sign_consensus(trees, scale * WEIGHTS, normalize=False) for scale in (1, 4)]
  jax.tree.map(lambda one, other: np.testing.assert_array_equal(4 * one, other), *sums)


@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_task_vectors_give_themselves(make_tree, to_float64, check_close, dtype):
  tree = make_tree(6, dtype)
  trees = jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), tree)
  check_close(ties(trees, WEIGHTS, density=1.0), to_float64(tree), dtype, scale=10.0)
  check_close(ties(trees, WEIGHTS, density=0.3), to_float64(trim(tree, density=0.3)), dtype, scale=10.0)


def test_one_task_vector_is_trimmed_and_nothing_else(make_tree):
  tree = make_tree(7)
  alone = ties(jax.tree.map(lambda leaf: leaf[None], tree), density=0.3)
  jax.tree.map(np.testing.assert_array_equal, alone, trim(tree, density=0.3))


def test_the_result_stays_between_the_entries(make_tree, to_float64):
  trees = make_tree(8, lead=(3,))

  def compare(leaf, entries):
    assert (leaf <= entries.max(axis=0).clip(0) + 1e-5).all()
    assert (leaf >= entries.min(axis=0).clip(max=0) - 1e-5).all()

  jax.tree.map(compare, sign_consensus(trees, WEIGHTS), to_float64(trees))


def test_a_population_is_merged_one_by_one(make_tree):
  trees, weights = make_tree(9, lead=(2, 3)), jnp.array([[1.0, 1.0, 1.0], [0.5, 1.25, 0.75]])
  merge = functools.partial(ties, density=0.4)
  together = jax.jit(jax.vmap(merge))(trees, weights)
  for i in range(2):
    alone = merge(jax.tree.map(operator.itemgetter(i), trees), weights[i])
    jax.tree.map(
      functools.partial(np.testing.assert_allclose, rtol=1e-6), jax.tree.map(operator.itemgetter(i), together), alone
    )


def test_gradients_are_finite_and_those_of_the_mean(make_tree):
  trees = make_tree(10, lead=(3,))

  def objective(trees, weights):
    return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(ties(trees, weights, density=0.5)))

  grads, slopes = jax.grad(objective, argnums=(0, 1))(trees, jnp.asarray(WEIGHTS, jnp.float32))
  assert np.isfinite(slopes).all()
  for leaf in jax.tree.leaves(grads):  # the shares of each mean sum to 1, or nobody takes part
    shares = np.asarray(leaf).sum(axis=0)
    assert (np.isclose(shares, 1, rtol=1e-5) | (shares == 0)).all()


def test_bfloat16_task_vectors_are_merged_without_float32_copies(optimized):
  tree = {"w": jax.ShapeDtypeStruct((3, 512, 512), jnp.bfloat16)}
  weights = jax.ShapeDtypeStruct((3,), jnp.float32)
  memory = jax.jit(sign_consensus).lower(tree, weights).compile().memory_analysis()
  assert memory.temp_size_in_bytes < 512 * 512 * 2 / 4


def test_both_need_the_entries():
  assert [frame_of(ties), frame_of(sign_consensus)] == ["elementwise"] * 2


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"task_vectors": {"w": jnp.arange(3)}}, r"task_vectors\['w'\]: expected floats"),
    ({"task_vectors": {"w": jnp.ones((0, 3))}}, "task_vectors: expected at least one individual"),
    ({"task_vectors": {"w": jnp.ones((2, 3)), "v": jnp.ones(3)}}, r"task_vectors\['[wv]'\]: expected [23] individuals"),
    ({"weights": np.ones(3)}, r"weights: expected one weight per task vector, shape \(2,\), got shape \(3,\)"),
    ({"weights": np.array([1.0, np.nan])}, "weights: expected finite numbers"),
    ({"density": 0.0}, r"density: expected a share in \(0, 1\]"),
  ],
)
def test_arguments_that_do_not_fit_are_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    ties(**({"task_vectors": {"w": jnp.ones((2, 3))}, "density": 0.5} | changes))


def test_unknown_words_are_refused():
  # beartype would refuse the words before we do; users run without it
  task_vectors = {"w": jnp.ones((2, 3))}
  plain = getattr(sign_consensus, "__wrapped__", sign_consensus)
  with pytest.raises(ValueError, match="convention: expected one of paper, mergekit, got 'majority'"):
    plain(task_vectors, convention="majority")
