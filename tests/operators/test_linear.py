import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cqd_jax.operators import apply_task_vector, linear_merge, merge_weights

DTYPES = [jnp.float32, jnp.bfloat16]


def drawn_weights(key, tree, **settings):
  """The weights w1, w2 that a key draws, at every entry: those of an all-ones parent beside a parent of zeros."""
  ones = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), tree)
  zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), tree)
  free = jax.jit(functools.partial(linear_merge, key, normalize=False, **settings))
  return free(ones, zeros), free(zeros, ones)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("granularity", "normalize"), [("model", True), ("layer", True), ("kernel", False)])
def test_the_child_is_the_weighted_sum_of_its_parents(
  make_tree, to_float64, check_close, dtype, granularity, normalize
):
  first, second, key = make_tree(0, dtype), make_tree(1, dtype), jax.random.key(3)
  settings = {"std": 0.3, "mean": 0.9, "granularity": granularity}

  def expected(a, b, w1, w2):
    total = w1 + w2 if normalize else 1.0
    return w1 / total * a + w2 / total * b

  weights = [to_float64(tree) for tree in drawn_weights(key, first, **settings)]
  child = jax.tree.map(expected, to_float64(first), to_float64(second), *weights)
  merge = functools.partial(linear_merge, normalize=normalize, **settings)
  check_close(jax.jit(merge)(key, first, second), child, dtype, scale=10.0)


def test_one_pair_of_weights_a_model(make_tree):
  for weights in drawn_weights(jax.random.key(0), make_tree(0), std=0.5):
    values = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(weights)])
    assert len(np.unique(values)) == 1


def test_one_pair_of_weights_a_layer(make_tree):
  for weights in drawn_weights(jax.random.key(1), make_tree(0), std=0.5, granularity="layer"):
    stacked = [leaf.reshape(3, -1) for leaf in jax.tree.leaves(weights["layers"])]
    rows = [np.unique(np.concatenate([leaf[layer] for leaf in stacked])) for layer in range(3)]
    rest = [
      np.unique(np.concatenate([np.ravel(leaf) for leaf in weights[name].values()])) for name in ("blocks_1", "head")
    ]
    assert [len(values) for values in rows + rest] == [1] * 5  # the same in all leaves of a layer
    assert len({float(values[0]) for values in rows + rest}) == 5  # and its own in each layer


def test_one_pair_of_weights_a_kernel_of_each_layer(make_tree):
  for weights in drawn_weights(jax.random.key(2), make_tree(0), std=0.5, granularity="kernel"):
    parts = [part for leaf in jax.tree.leaves(weights["layers"]) for part in leaf]
    parts += [leaf for name in ("blocks_1", "head") for leaf in weights[name].values()]
    assert [len(np.unique(part)) for part in parts] == [1] * 9
    assert len({float(np.ravel(part)[0]) for part in parts}) == 9


def test_two_stacks_of_different_depth_have_layers_of_their_own():
  tree = {"encoder": {"layers": {"w": jnp.ones((2, 3))}}, "decoder": {"layers": {"w": jnp.ones((4, 3))}}}
  weights, _ = drawn_weights(jax.random.key(4), tree, std=0.5, granularity="layer")
  assert len(np.unique(np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(weights)]))) == 6


@pytest.mark.parametrize("granularity", ["model", "kernel"])
def test_the_weights_are_independent_normal_draws(granularity):
  # 4000 keys: the mean has standard error 0.5 / 63 = 0.008, the standard deviation 0.0056, the correlation 0.016;
  # each bound is 6 of them, so that a change of the generator breaks it once in 10^8 times.
  tree = {"a_1": {"w": jnp.ones(1)}, "a_2": {"w": jnp.ones(1)}}
  keys = jax.random.split(jax.random.key(5), 4000)
  settings = {"std": 0.5, "mean": 2.0, "granularity": granularity}
  first, second = jax.vmap(lambda key: drawn_weights(key, tree, **settings))(keys)
  columns = [np.ravel(tree["a_1"]["w"]) for tree in (first, second)]
  if granularity != "model":
    columns.append(np.ravel(first["a_2"]["w"]))
  for column in columns:
    assert abs(np.mean(column) - 2.0) < 0.048
    assert abs(np.std(column) - 0.5) < 0.034
  correlations = np.corrcoef(columns)[np.triu_indices(len(columns), 1)]
  assert np.max(np.abs(correlations)) < 0.096


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_spread_the_child_is_exactly_the_mean(make_tree, to_float64, dtype):
  first, second = make_tree(6, dtype), make_tree(7, dtype)
  child = linear_merge(jax.random.key(0), first, second, std=0)
  exact = jax.tree.map(lambda a, b: jnp.asarray((a + b) / 2, dtype), to_float64(first), to_float64(second))
  jax.tree.map(np.testing.assert_array_equal, child, exact)


def test_a_task_vector_merged_with_itself_is_itself(make_tree, to_float64):
  tree = make_tree(8)
  merge = jax.jit(functools.partial(linear_merge, std=0.3, granularity="kernel"))
  for index in range(5):
    child = merge(jax.random.key(index), tree, tree)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), child, to_float64(tree))


def test_the_merge_is_linear_in_the_parents(make_tree, to_float64, check_close):
  a, b, c, d = (make_tree(seed) for seed in range(4))
  merge = jax.jit(functools.partial(linear_merge, jax.random.key(9), std=0.4, granularity="layer"))
  both = jax.tree.map(lambda x, y: x + 2 * y, to_float64(merge(a, b)), to_float64(merge(c, d)))
  joined = merge(jax.tree.map(lambda x, y: x + 2 * y, a, c), jax.tree.map(lambda x, y: x + 2 * y, b, d))
  check_close(joined, both, scale=10.0)


def test_a_population_gets_one_child_a_key(make_tree):
  first, second = make_tree(1, lead=(3,)), make_tree(2, lead=(3,))
  keys = jax.random.split(jax.random.key(1), 3)
  merge = jax.jit(functools.partial(linear_merge, granularity="kernel"))
  stds = jnp.array([0.0, 0.1, 0.2])
  children = jax.jit(jax.vmap(lambda key, a, b, std: merge(key, a, b, std=std)))(keys, first, second, stds)
  for i in range(3):
    pick = functools.partial(jax.tree.map, operator.itemgetter(i))
    alone = merge(keys[i], pick(first), pick(second), std=float(stds[i]))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), pick(children), alone)


def test_the_key_alone_decides(make_tree):
  first, second = make_tree(3), make_tree(4)
  merge = jax.jit(functools.partial(linear_merge, std=0.1))
  one, same, other = (merge(jax.random.key(seed), first, second) for seed in (0, 0, 1))
  jax.tree.map(np.testing.assert_array_equal, one, same)
  assert not np.array_equal(one["head"]["kernel"], other["head"]["kernel"])


@pytest.mark.parametrize(
  ("first", "second", "expected"),
  [
    (1.0, 3.0, (0.25, 0.75)),
    (-1.0, 3.0, (-0.5, 1.5)),
    (1.0, -1.0, (0.5, 0.5)),
    (0.0, 0.0, (0.5, 0.5)),
    (1e-30, -1e-30, (0.5, 0.5)),
    (1e-30, 3e-30, (0.25, 0.75)),
    (1.0, -0.985, (0.5, 0.5)),  # 0.015 of 1.985 is less than a hundredth
    (1.0, -0.975, (40.0, -39.0)),  # 0.025 of 1.975 is more
  ],
)
def test_weights_that_cancel_are_halves(first, second, expected):
  got = merge_weights(jnp.float32(first), jnp.float32(second))
  np.testing.assert_allclose(np.array(got), expected, rtol=1e-5)


def test_normalized_weights_sum_to_one_and_are_bounded():
  drawn = jax.random.normal(jax.random.key(0), (2, 100_000))
  first, second = merge_weights(drawn[0], drawn[1])
  np.testing.assert_allclose(first + second, 1.0, atol=1e-5)
  assert float(jnp.max(jnp.abs(first))) <= 50.51
  assert float(jnp.max(jnp.abs(second))) <= 50.51


def test_gradients_are_the_weights_and_stay_finite(make_tree, to_float64, check_close):
  first, second, probe = make_tree(0), make_tree(1), make_tree(2)
  key = jax.random.key(7)

  def objective(a, b, std, mean):
    child = apply_task_vector(probe, linear_merge(key, a, b, std=std, mean=mean, granularity="layer"))
    return sum(jax.tree.leaves(jax.tree.map(lambda x, y: jnp.sum(x * y), child, probe)))

  grads = jax.jit(jax.grad(objective, argnums=(0, 1, 2, 3)))(first, second, 0.3, 1.0)
  assert np.isfinite(grads[2:]).all()
  assert grads[2] != 0
  weights = [to_float64(tree) for tree in drawn_weights(key, first, std=0.3, granularity="layer")]
  expected = jax.tree.map(lambda w1, w2, c: w1 / (w1 + w2) * c, *weights, to_float64(probe))
  check_close(grads[0], expected, scale=10.0)
  for slope in jax.grad(lambda pair: sum(merge_weights(pair[0], pair[1])))(jnp.array([1.0, -1.0])):
    assert slope == 0.0


def test_bfloat16_parents_are_merged_without_float32_copies():
  shapes = {"layers": {"mlp": {"kernel": (4, 2, 128, 256)}}, "head": {"kernel": (4, 256, 256)}}
  tree = jax.tree.map(
    lambda shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16), shapes, is_leaf=lambda node: isinstance(node, tuple)
  )
  merge = jax.vmap(functools.partial(linear_merge, std=0.1, granularity="layer"))
  keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 4))
  memory = jax.jit(merge).lower(keys, tree, tree).compile().memory_analysis()
  assert memory.temp_size_in_bytes < 4 * 65536 * 2 / 4  # a quarter of one leaf in its own dtype


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"std": -0.1}, "std: expected a finite number of at least 0"),
    ({"std": float("nan")}, "std: expected"),
    ({"std": float("inf")}, "std: expected"),
    ({"std": np.ones(2)}, "std: expected a scalar"),
    ({"mean": float("inf")}, "mean: expected a finite number"),
    ({"granularity": "leaf"}, "granularity: expected one of model, layer, kernel, got 'leaf'"),
    ({"key": jax.random.split(jax.random.key(0), 2)}, "key: expected one key"),
    ({"key": jnp.zeros(2)}, "key: expected a key from jax.random.key"),
    ({"first": {"w": jnp.arange(3)}}, r"first\['w'\]: expected floats"),
    ({"second": {"w": jnp.ones(4)}}, r"second\['w'\]"),
    ({"second": {"w": jnp.ones(3), "b": jnp.ones(3)}}, "second: has"),
  ],
)
def test_arguments_that_do_not_fit_are_refused(changes, message):
  arguments = {"key": jax.random.key(0), "first": {"w": jnp.ones(3)}, "second": {"w": jnp.ones(3)}, "std": 0.1}
  with pytest.raises(ValueError, match=message):
    linear_merge(**(arguments | changes))


@pytest.mark.parametrize("granularity", ["layer", "kernel"])
def test_layers_that_can_be_no_stack_are_refused_where_they_matter(granularity):
  for tree in (
    {"layers": {"a": {"w": jnp.ones((2, 3))}, "b": {"w": jnp.ones((4, 3))}}},
    {"layers": {"b": {"kernel": jnp.ones((4, 3))}}},
  ):
    path = "layers/b/" + next(iter(tree["layers"]["b"]))
    with pytest.raises(ValueError, match=f"first at {path}: expected .*number its modules"):
      linear_merge(jax.random.key(0), tree, tree, std=0.1, granularity=granularity)
    jax.tree.map(np.testing.assert_array_equal, linear_merge(jax.random.key(0), tree, tree, std=0), tree)


@pytest.mark.parametrize("granularity", ["model", "layer", "kernel"])
def test_numpy_leaves_and_a_scalar_beside_the_layers_are_taken(granularity):
  first = {"layers": {"gain": np.float32(1), "w": np.ones((2, 3, 3))}}
  second = {"layers": {"gain": jnp.float32(3), "w": jnp.zeros((2, 3, 3))}}
  child = linear_merge(jax.random.key(0), first, second, std=0, granularity=granularity)
  assert float(child["layers"]["gain"]) == 2
  np.testing.assert_array_equal(child["layers"]["w"], np.full((2, 3, 3), 0.5, np.float32))


@pytest.mark.parametrize(("granularity", "groups"), [("model", 1), ("layer", 5), ("kernel", 9)])
def test_the_weights_that_are_told_are_those_that_were_used(make_tree, granularity, groups):
  first, second = make_tree(0), make_tree(1)
  settings = {"std": 0.5, "granularity": granularity}
  plain = linear_merge(jax.random.key(5), first, second, **settings)
  child, weights = jax.jit(functools.partial(linear_merge, with_weights=True, **settings))(
    jax.random.key(5), first, second
  )
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), child, plain)
  assert weights.shape == (2, groups)
  assert weights.dtype == jnp.float32
  np.testing.assert_allclose(weights.sum(axis=0), 1, rtol=1e-5)
  ones, zeros = jax.tree.map(jnp.ones_like, first), jax.tree.map(jnp.zeros_like, first)
  used = linear_merge(jax.random.key(5), ones, zeros, **settings)  # the weight of the first parent at every entry
  entries = np.unique(np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(used)]))
  np.testing.assert_allclose(entries, np.sort(weights[0]), rtol=1e-6)
