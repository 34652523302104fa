import functools
import math
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cqd_jax.operators import dare, frame_of, magprune, sparsify, trim, trim_tails

DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16]
TENSORS = {"layers": 1, "blocks_1": 0, "head": 0}
"""How many leading axes of a leaf run over tensors."""


def ranked_together(tree, granularity):
  """Flat float64 views of the tree's leaves, in lists of what is ranked together."""
  if granularity == "model":
    return [[leaf.reshape(-1) for leaf in jax.tree.leaves(tree)]]
  leaves = [(name, leaf) for name in tree for leaf in jax.tree.leaves(tree[name])]
  return [[part.reshape(-1)] for name, leaf in leaves for part in (leaf if TENSORS[name] else [leaf])]


def trimmed(tree, density, granularity):
  """The same in float64 NumPy: everything below the k-th largest magnitude is set to 0, by sorting."""
  tree = jax.tree.map(lambda leaf: np.array(leaf, np.float64), tree)
  for group in ranked_together(tree, granularity):
    magnitudes = np.sort(np.abs(np.concatenate(group)))[::-1]
    cut = magnitudes[max(1, math.floor(density * len(magnitudes))) - 1]
    for part in group:
      part[np.abs(part) < cut] = 0
  return tree


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("granularity", ["kernel", "model"])
@pytest.mark.parametrize("density", [1e-6, 0.2, 0.5, 0.99, 1.0])
def test_the_largest_entries_are_kept_to_the_bit(make_tree, dtype, granularity, density):
  tree = make_tree(0, dtype)
  result = jax.jit(functools.partial(trim, density=density, granularity=granularity))(tree)

  def compare(leaf, expected, original):
    assert leaf.dtype == dtype
    np.testing.assert_array_equal(np.asarray(leaf, np.float64), expected)
    assert (np.asarray(leaf) == np.asarray(original))[expected != 0].all()

  jax.tree.map(compare, result, trimmed(tree, density, granularity), tree)


def test_leaves_of_several_dtypes_are_ranked_by_their_values(make_tree):
  tree = {**make_tree(1, jnp.bfloat16), "head": make_tree(1)["head"], "blocks_1": make_tree(1, jnp.float16)["blocks_1"]}
  result = trim(tree, density=0.3, granularity="model")
  assert jax.tree.map(lambda leaf: leaf.dtype, result) == jax.tree.map(lambda leaf: leaf.dtype, tree)
  jax.tree.map(np.testing.assert_array_equal, result, trimmed(tree, 0.3, "model"))


def test_a_stack_is_trimmed_as_its_layers_would_be(make_tree):
  stacked = make_tree(2)["layers"]
  result = trim({"layers": stacked}, density=0.4)["layers"]
  for layer in range(3):
    pick = functools.partial(jax.tree.map, operator.itemgetter(layer))
    jax.tree.map(
      np.testing.assert_array_equal,
      pick(result),
      trim({"layers": {str(layer): pick(stacked)}}, density=0.4)["layers"][str(layer)],
    )


@pytest.mark.parametrize(
  ("entries", "density", "kept"),
  [
    ([4, -3, 2, -1], 0.5, [4, -3, 0, 0]),
    ([4, -3, 2, -1], 0.74, [4, -3, 0, 0]),
    ([4, -3, 2, -1], 0.75, [4, -3, 2, 0]),
    ([4, -3, 2, -1], 0.01, [4, 0, 0, 0]),  # one is always kept
    ([1, -1, 1, 2], 0.5, [1, -1, 1, 2]),  # the second largest is 1: all of them stay
    ([0, 0, 5, 0], 0.5, [0, 0, 5, 0]),
    ([0, 0, 0, 0], 0.5, [0, 0, 0, 0]),
    ([1e-40, 3e-40, -2e-40, 0], 0.5, [0, 3e-40, -2e-40, 0]),  # denormal numbers
    ([np.nan, 1, np.inf, 2], 0.5, [np.nan, 0, np.inf, 0]),
    ([np.nan, 1, -np.nan, 2], 0.5, [np.nan, 0, np.nan, 0]),
  ],
)
def test_by_hand(entries, density, kept):
  entries, kept = np.array(entries, np.float32), np.array(kept, np.float32)
  for granularity in ("kernel", "model"):
    result = np.asarray(trim({"w": jnp.asarray(entries)}, density=density, granularity=granularity)["w"])
    assert ((result == kept) | (np.isnan(result) & np.isnan(kept))).all(), result
    same = result.view(np.uint32) == np.where(kept == 0, 0, entries).astype(np.float32).view(np.uint32)
    assert same.all(), "what is kept is kept to the bit, what is not is +0"


def test_the_share_is_rounded_down_as_a_floating_product():
  assert int(jnp.count_nonzero(trim({"w": jnp.arange(1.0, 101.0)}, density=0.29)["w"])) == 28  # 0.29 * 100 < 29


@pytest.mark.parametrize("granularity", ["kernel", "model"])
def test_trimming_twice_is_trimming_once_and_sign_and_scale_do_not_matter(make_tree, granularity):
  tree = make_tree(3)
  cut = functools.partial(trim, density=0.3, granularity=granularity)
  once = cut(tree)
  jax.tree.map(np.testing.assert_array_equal, cut(once), once)
  scaled = cut(jax.tree.map(lambda leaf: -4 * leaf, tree))
  jax.tree.map(np.testing.assert_array_equal, scaled, jax.tree.map(lambda leaf: -4 * leaf, once))


@pytest.mark.parametrize("granularity", ["kernel", "model"])
def test_a_population_is_trimmed_one_by_one(make_tree, granularity):
  trees = make_tree(4, lead=(3,))
  cut = functools.partial(trim, density=0.3, granularity=granularity)
  together = jax.jit(jax.vmap(cut))(trees)
  for i in range(3):
    pick = functools.partial(jax.tree.map, operator.itemgetter(i))
    jax.tree.map(np.testing.assert_array_equal, pick(together), cut(pick(trees)))


def test_gradients_pass_where_entries_do(make_tree):
  tree = make_tree(5)
  grads = jax.grad(lambda tree: sum(jnp.sum(leaf) for leaf in jax.tree.leaves(trim(tree, density=0.3))))(tree)
  jax.tree.map(np.testing.assert_array_equal, grads, jax.tree.map(lambda leaf: leaf != 0, trimmed(tree, 0.3, "kernel")))


def test_scalars_empty_leaves_and_numpy_leaves_are_taken():
  tree = {"layers": {"gain": np.float32(2), "w": np.ones((2, 3), np.float32)}, "nothing": jnp.zeros((0, 4))}
  for granularity in ("kernel", "model"):
    jax.tree.map(np.testing.assert_array_equal, trim(tree, density=0.1, granularity=granularity)["layers"]["gain"], 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("drop_rate", [0.1, 0.9])
def test_what_dare_keeps_is_rescaled_and_rounded_once(make_tree, to_float64, dtype, drop_rate):
  tree = make_tree(6, dtype)
  result = jax.jit(functools.partial(dare, drop_rate=drop_rate))(jax.random.key(0), tree)
  epsilon = float(jnp.finfo(dtype).eps)

  def compare(leaf, original):
    assert leaf.dtype == dtype
    values, kept = np.asarray(leaf, np.float64), np.asarray(leaf) != 0
    np.testing.assert_allclose(
      values[kept], original[kept] / (1 - drop_rate), rtol=(2 if dtype == jnp.float32 else 0.51) * epsilon
    )

  jax.tree.map(compare, result, to_float64(tree))


def test_entries_are_dropped_independently_and_the_expectation_stays():
  # 200 keys of 3 leaves of 100 entries, kept with probability 0.3. Each bound is 6 standard deviations, so that a
  # change of the generator breaks one of them once in 10^6 times (the last is a maximum of 100).
  tree = {name: jnp.arange(1.0, 101.0) for name in "abc"}
  keys = jax.random.split(jax.random.key(1), 200)
  results = jax.jit(jax.vmap(lambda key: dare(key, tree, drop_rate=0.7)))(keys)
  kept = np.stack([np.asarray(results[name]) != 0 for name in "abc"], axis=1)  # [200, 3, 100]
  assert abs(kept.mean() - 0.3) < 6 * math.sqrt(0.3 * 0.7 / kept.size)
  pairs = [(kept[:, 0], kept[:, 1]), (kept[:, 1], kept[:, 2]), (kept[..., 1:], kept[..., :-1]), (kept[1:], kept[:-1])]
  for one, other in pairs:  # equal leaves, neighboring entries, neighboring keys
    assert abs((one & other).mean() - 0.09) < 6 * math.sqrt(0.09 * 0.91 / one.size)
  means = np.mean([np.asarray(results[name], np.float64) for name in "abc"], axis=(0, 1))
  assert np.abs(means / np.arange(1, 101) - 1).max() < 6 * math.sqrt(0.7 / 0.3 / 600)


def test_a_drop_rate_of_0_drops_nothing(make_tree):
  tree = make_tree(7, jnp.bfloat16)
  jax.tree.map(np.testing.assert_array_equal, dare(jax.random.key(2), tree, drop_rate=0.0), tree)


def test_what_is_dropped_leaves_no_trace():
  result = dare(jax.random.key(3), {"w": jnp.full(100, jnp.nan)}, drop_rate=0.5)["w"]
  assert set(np.unique(np.nan_to_num(result, nan=7.0))) == {0.0, 7.0}


def test_a_population_draws_one_by_one(make_tree):
  trees, keys = make_tree(8, lead=(3,)), jax.random.split(jax.random.key(4), 3)
  drop = functools.partial(dare, drop_rate=0.5)
  together = jax.jit(jax.vmap(drop))(keys, trees)
  for i in range(3):
    pick = functools.partial(jax.tree.map, operator.itemgetter(i))
    jax.tree.map(np.testing.assert_array_equal, pick(together), drop(keys[i], pick(trees)))


def test_both_need_the_entries():
  assert [frame_of(trim), frame_of(dare)] == ["elementwise"] * 2


@pytest.mark.parametrize(
  ("function", "message"),
  [
    (lambda tree: trim(tree, density=0.0), r"density: expected a share in \(0, 1\], got 0.0"),
    (lambda tree: trim(tree, density=1.5), r"density: expected a share in \(0, 1\], got 1.5"),
    (lambda tree: trim(tree, density=math.nan), "density: expected a share"),
    (lambda tree: trim({"w": jnp.arange(3)}, density=0.5), r"task_vector\['w'\]: expected floats"),
    (lambda tree: trim({}, density=0.5), "task_vector: expected a pytree of arrays"),
    (lambda tree: dare(jax.random.key(0), tree, drop_rate=1.0), r"drop_rate: expected a probability in \[0, 1\)"),
    (lambda tree: dare(jax.random.key(0), tree, drop_rate=-0.1), "drop_rate: expected a probability"),
    (lambda tree: dare(jax.random.key(0), tree, drop_rate=math.nan), "drop_rate: expected a probability"),
    (lambda tree: dare(jnp.zeros(2), tree, drop_rate=0.5), "key: expected a key"),
    (lambda tree: dare(jax.random.key(0), {"w": jnp.arange(3)}, drop_rate=0.5), r"task_vector\['w'\]: expected floats"),
  ],
)
def test_arguments_that_do_not_fit_are_refused(function, message):
  with pytest.raises(ValueError, match=message):
    function({"w": jnp.ones(3)})


def test_an_unknown_granularity_is_refused():
  # beartype would refuse the word before we do; users run without it
  with pytest.raises(ValueError, match="granularity: expected one of kernel, model, got 'layer'"):
    getattr(trim, "__wrapped__", trim)({"w": jnp.ones(3)}, density=0.5, granularity="layer")


def test_more_entries_than_can_be_counted_are_refused():
  huge = {"w": jax.ShapeDtypeStruct((2**16, 2**16), jnp.bfloat16)}
  with pytest.raises(ValueError, match="expected at most 4294967295 entries to be ranked together, got 4294967296"):
    jax.eval_shape(functools.partial(trim, density=0.5), huge)


@pytest.mark.parametrize(
  ("density", "gamma", "convention", "kept"),
  [
    (0.4, 0.2, "paper", [0, 0, 8, 7, 6, 5, 0, 0, 0, 0]),
    (0.4, 0.0, "paper", [10, -9, 8, 7, 0, 0, 0, 0, 0, 0]),
    (0.9, 0.2, "paper", [0, 0, 8, 7, 6, 5, -4, 3, 2, 1]),  # as many as there are below the outliers
    (0.9, 0.2, "mergekit", [0, -9, 8, 7, 6, 5, -4, 3, 2, 1]),  # one outlier less
    (1.0, 0.2, "paper", [0, 0, 8, 7, 6, 5, -4, 3, 2, 1]),
    (1.0, 0.2, "mergekit", [10, -9, 8, 7, 6, 5, -4, 3, 2, 1]),
    (0.05, 0.2, "paper", [0] * 10),
  ],
)
def test_both_tails_are_trimmed(density, gamma, convention, kept):
  entries = jnp.array([10, -9, 8, 7, 6, 5, -4, 3, 2, 1], jnp.bfloat16)
  result = trim_tails({"w": entries}, density=density, gamma=gamma, convention=convention)["w"]
  np.testing.assert_array_equal(result, np.array(kept, jnp.bfloat16))


def test_large_entries_are_pruned_less_often_and_none_more_than_it_should(monkeypatch):
  entries = jnp.array([[3.0, -1.0, 2.0, 4.0]])
  probabilities = np.array([[0.55, 0.45, 0.5, 0.6]])  # 0.5 + 0.2 ((r + 1) / 4 - 1 / 2) by ranks 2, 0, 1, 3
  for near, kept in ((1e-4, False), (-1e-4, True)):
    drawn = jnp.asarray(probabilities + near, jnp.float32)
    monkeypatch.setattr(sparsify, "draws", lambda key, shape, drawn=drawn: drawn.reshape(shape))
    result = magprune(jax.random.key(0), {"w": entries}, density=0.5, epsilon=0.2)["w"]
    np.testing.assert_allclose(result, kept * entries / probabilities, rtol=1e-6)
  columns = magprune(jax.random.key(0), {"w": entries.T}, density=0.5, epsilon=0.2, axis=0)["w"]
  np.testing.assert_allclose(columns, entries.T / probabilities.T, rtol=1e-6)
