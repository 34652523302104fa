import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from unet_cases import MATRICES as KERNELS
from unet_cases import name, unet, written_as_matrices

from cqd_jax.operators import expert_svd_mutation, factorize, gaussian_mutation, svd_mutation

DTYPES = [jnp.float32, jnp.bfloat16]
MATRICES = [("layers", "attention", "kernel"), ("blocks_1", "kernel"), ("head", "kernel")]
VECTORS = [("layers", "mlp", "bias"), ("blocks_1", "bias")]


def at(tree, path):
  return functools.reduce(operator.getitem, path, tree)


def bits(leaf):
  return np.asarray(leaf).tobytes()


def inner_shares(change, origin):
  """U^T change V over the singular values of `origin`: its diagonal, and the largest entry beside it (relative)."""
  shares, beside = [], 0.0
  for delta, matrix in zip(np.atleast_3d(change.T).T, np.atleast_3d(origin.T).T, strict=True):
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    inner = u.T @ delta @ vt.T
    shares.append(np.diag(inner) / s)
    outside = np.linalg.norm(delta - u @ np.diag(np.diag(inner)) @ vt)
    beside = max(beside, outside / np.linalg.norm(matrix))
  return np.array(shares), beside


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_papers_mutation_scales_singular_values_and_keeps_the_vectors(make_tree, to_float64, dtype):
  tree = make_tree(0, dtype)
  child = jax.jit(functools.partial(svd_mutation, max_scale=3.0))(jax.random.key(0), tree)
  assert jax.tree.structure(child) == jax.tree.structure(tree)
  tolerance = 1e-4 if dtype == jnp.float32 else 2**-7
  seen = []
  for path in MATRICES:
    assert at(child, path).dtype == dtype
    assert at(child, path).shape == at(tree, path).shape
    shares, beside = inner_shares(at(to_float64(child), path), at(to_float64(tree), path))
    assert beside < tolerance
    assert np.min(shares) > -5 * tolerance
    assert np.max(shares) < 3 + 5 * tolerance
    seen.extend(np.ravel(shares))
  assert len(np.unique(np.round(seen, 4))) == len(seen)  # each singular value of each layer of each leaf has its own
  for path in VECTORS:
    assert bits(at(child, path)) == bits(at(tree, path))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_references_mutation_adds_parts_of_the_expert(make_tree, to_float64, dtype):
  tree, expert = make_tree(1, dtype), make_tree(2, dtype)
  mutate = jax.jit(lambda key, tree, expert: expert_svd_mutation(key, tree, factorize(expert), rate=0.5))
  child = mutate(jax.random.key(0), tree, expert)
  assert jax.tree.structure(child) == jax.tree.structure(tree)
  tolerance = 1e-4 if dtype == jnp.float32 else 2**-6
  seen = []
  for path in MATRICES:
    assert at(child, path).dtype == dtype
    change = at(to_float64(child), path) - at(to_float64(tree), path)
    shares, beside = inner_shares(change, at(to_float64(expert), path))
    assert beside < tolerance
    assert np.min(shares) > -5 * tolerance
    assert np.max(shares) < 0.5 + 5 * tolerance
    seen.extend(np.ravel(shares))
  if dtype == jnp.float32:
    assert len(np.unique(np.round(seen, 4))) == len(seen)
  for path in VECTORS:
    assert bits(at(child, path)) == bits(at(tree, path))


@pytest.mark.parametrize("name", ["svd", "expert"])
def test_the_random_shares_are_uniform(name):
  # 6000 shares of Uniform[0, 2]: the mean has standard error 0.577 / 77 = 0.0075, the variance 0.0038. The bounds are 6
  # of them, so that a change of the generator breaks them once in 10^8 times.
  matrix = jnp.diag(jnp.array([3.0, 2.0, 1.0]))
  keys = jax.random.split(jax.random.key(1), 2000)
  mutate = {
    "svd": lambda key: svd_mutation(key, {"w": matrix}, max_scale=2.0),
    "expert": lambda key: expert_svd_mutation(key, {"w": 0 * matrix}, factorize({"w": matrix}), rate=2.0),
  }[name]
  children = np.asarray(jax.jit(jax.vmap(mutate))(keys)["w"], np.float64)
  shares = np.diagonal(children, axis1=1, axis2=2) / [3.0, 2.0, 1.0]
  assert shares.min() >= -1e-6
  assert shares.max() <= 2 + 1e-6
  assert abs(shares.mean() - 1.0) < 0.045
  assert abs(shares.var() - 1 / 3) < 0.023
  # 3 correlations of standard error 1 / sqrt(2000) = 0.022
  assert np.max(np.abs(np.corrcoef(shares.T)[np.triu_indices(3, 1)])) < 0.135


@pytest.mark.parametrize("shape", [(5, 5), (7, 2), (1, 6), (4, 1), (2, 3, 5, 4)])
def test_factors_give_the_matrix_back_in_any_shape(shape):
  matrix = np.random.default_rng(3).normal(size=shape).astype(np.float32)
  u, s, vt = jax.jit(factorize)({"w": jnp.asarray(matrix)})["w"]
  rank = min(shape[-2:])
  assert u.shape == (*shape[:-1], rank)
  assert vt.shape == (*shape[:-2], rank, shape[-1])
  np.testing.assert_allclose(s, np.linalg.svd(np.float64(matrix), compute_uv=False), rtol=1e-4, atol=1e-6)
  np.testing.assert_allclose(np.float64(u) * np.float64(s)[..., None, :] @ np.float64(vt), matrix, atol=1e-5)


def test_factors_are_float32_and_have_nothing_for_vectors(make_tree):
  factors = jax.jit(factorize)(make_tree(0, jnp.bfloat16))
  assert {leaf.dtype for leaf in jax.tree.leaves(factors)} == {jnp.dtype(jnp.float32)}
  assert factors["blocks_1"]["bias"] is None
  assert factors["layers"]["mlp"]["bias"] is None
  assert factors["layers"]["attention"]["kernel"].s.shape == (3, 4)


def test_a_population_picks_among_stacked_experts_inside_jit(make_tree):
  experts, trees = make_tree(4, lead=(3,)), make_tree(5, lead=(2,))
  keys, active = jax.random.split(jax.random.key(2), 2), jnp.array([2, 0])
  factors = jax.jit(jax.vmap(factorize))(experts)

  @jax.jit
  @functools.partial(jax.vmap, in_axes=(0, 0, 0, 0))
  def mutate(key, tree, task, rate):
    return expert_svd_mutation(key, tree, jax.tree.map(lambda leaf: leaf[task], factors), rate=rate)

  alone = jax.jit(lambda key, tree, expert, rate: expert_svd_mutation(key, tree, factorize(expert), rate=rate))
  children = mutate(keys, trees, active, jnp.array([0.1, 0.7]))
  for i, (task, rate) in enumerate([(2, 0.1), (0, 0.7)]):
    tree, expert = jax.tree.map(operator.itemgetter(i), trees), jax.tree.map(operator.itemgetter(task), experts)
    jax.tree.map(
      functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4),
      jax.tree.map(operator.itemgetter(i), children),
      alone(keys[i], tree, expert, rate),
    )


def test_zero_matrices_stay_zero():
  tree = {"w": jnp.zeros((4, 3)), "layers": {"w": jnp.zeros((2, 3, 3))}}
  for child in (
    svd_mutation(jax.random.key(0), tree, max_scale=2.0),
    expert_svd_mutation(jax.random.key(0), tree, factorize(tree), rate=1.0),
  ):
    for leaf in jax.tree.leaves(child):
      np.testing.assert_array_equal(leaf, 0.0)


def test_a_setting_of_zero_is_the_neutral_one(make_tree):
  tree, key = make_tree(6), jax.random.key(0)
  for child in (
    jax.jit(lambda: gaussian_mutation(key, tree, std=0))(),
    jax.jit(lambda: expert_svd_mutation(key, tree, factorize(make_tree(7)), rate=0))(),
  ):
    jax.tree.map(np.testing.assert_array_equal, child, tree)
  gone = jax.jit(lambda: svd_mutation(key, tree, max_scale=0))()
  for path in MATRICES:
    np.testing.assert_array_equal(at(gone, path), 0.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gaussian_noise_has_the_stated_spread_and_reaches_vectors(dtype):
  # 40,000 draws a leaf: the standard error of the mean is std / 200, of the standard deviation std / 283; bounds of 6.
  # Rounding 1 + noise to bfloat16 would swamp noise of 0.0003; around 0 it does not.
  tree = {"layers": {"w": jnp.zeros((4, 100, 100), dtype), "scale": jnp.zeros((4, 10_000), dtype)}}
  child = jax.jit(functools.partial(gaussian_mutation, std=0.0003))(jax.random.key(3), tree)
  columns = [np.ravel(np.asarray(leaf, np.float64)) for leaf in jax.tree.leaves(child)]
  assert {leaf.dtype for leaf in jax.tree.leaves(child)} == {jnp.dtype(dtype)}
  for column in columns:
    assert abs(column.mean()) < 0.0003 * 0.03
    assert abs(column.std() / 0.0003 - 1) < 0.0213
    # E|x|^4 = 3 std^4, its standard error sqrt(96 / 40000) std^4: the shape, not the spread alone
    assert abs(np.mean((column / 0.0003) ** 4) - 3) < 0.3
  assert abs(np.corrcoef(columns)[0, 1]) < 0.03  # standard error 0.005


def test_gaussian_noise_is_added_to_what_was_there(make_tree, to_float64, check_close):
  tree, key = make_tree(8), jax.random.key(4)
  mutate = jax.jit(functools.partial(gaussian_mutation, std=0.5))
  noise = to_float64(mutate(key, jax.tree.map(jnp.zeros_like, tree)))
  check_close(mutate(key, tree), jax.tree.map(np.add, to_float64(tree), noise))


OPERATORS = {
  "svd": lambda key, tree: svd_mutation(key, tree, max_scale=2.0),
  "expert": lambda key, tree: expert_svd_mutation(key, tree, factorize(tree), rate=0.3),
  "gaussian": lambda key, tree: gaussian_mutation(key, tree, std=0.1),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_equal_leaves_and_equal_layers_mutate_differently_and_the_key_decides(name):
  matrix = jnp.asarray(np.random.default_rng(9).normal(size=(4, 3)), jnp.float32)
  tree = {"a": matrix, "b": matrix, "layers": {"w": jnp.stack([matrix, matrix])}}
  mutate = jax.jit(OPERATORS[name])
  child, same, other = (mutate(jax.random.key(seed), tree) for seed in (0, 0, 1))
  parts = [child["a"], child["b"], *child["layers"]["w"], other["a"], matrix]
  for i, one in enumerate(parts):
    for two in parts[i + 1 :]:
      assert np.max(np.abs(one - two)) > 1e-3
  jax.tree.map(np.testing.assert_array_equal, child, same)


@pytest.mark.parametrize("name", OPERATORS)
def test_a_population_gets_one_child_a_key(make_tree, name):
  trees, keys = make_tree(10, lead=(2,)), jax.random.split(jax.random.key(5), 2)
  children, mutate = jax.jit(jax.vmap(OPERATORS[name]))(keys, trees), jax.jit(OPERATORS[name])
  for i in range(2):
    jax.tree.map(
      functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4),
      jax.tree.map(operator.itemgetter(i), children),
      mutate(keys[i], jax.tree.map(operator.itemgetter(i), trees)),
    )


KEY, TREE = jax.random.key(0), {"w": np.ones((3, 2), np.float32), "b": np.ones(2, np.float32)}


@pytest.mark.parametrize("dtype", DTYPES)
def test_kernels_of_convolutions_mutate_as_the_one_matrix_that_they_are(to_float64, dtype):
  """The paper's and the reference's mutation against float64 NumPy on [kh * kw * in, out]."""
  tree, expert, key = unet(0, dtype), unet(1, dtype), jax.random.key(0)
  tolerance = 1e-4 if dtype == jnp.float32 else 2**-6
  scaled = jax.jit(functools.partial(svd_mutation, max_scale=3.0))(key, tree)
  added = jax.jit(lambda key, tree, expert: expert_svd_mutation(key, tree, factorize(expert), rate=0.5))(
    key, tree, expert
  )
  before, after, grown, other = map(written_as_matrices, map(to_float64, (tree, scaled, added, expert)))
  for (path, matrix), one, two, of_expert in zip(
    jax.tree.leaves_with_path(before), *map(jax.tree.leaves, (after, grown, other)), strict=True
  ):
    if name(path) not in KERNELS:
      np.testing.assert_array_equal(one, matrix)
      np.testing.assert_array_equal(two, matrix)
      continue
    for change, origin, most in ((one, matrix, 3.0), (two - matrix, of_expert, 0.5)):
      shares, beside = inner_shares(change, origin)
      assert beside < tolerance, name(path)
      assert len(np.unique(shares)) == min(matrix.shape)  # each singular value has its own
      assert np.min(shares) > -5 * tolerance
      assert np.max(shares) < most + 5 * tolerance
  for child in (scaled, added):
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), child) == jax.tree.map(
      lambda leaf: (leaf.shape, leaf.dtype), tree
    )


def test_kernels_of_convolutions_draw_what_their_matrices_draw():
  tree, expert, key = unet(2), unet(3), jax.random.key(1)
  matrices = written_as_matrices(tree)
  same = functools.partial(jax.tree.map, np.testing.assert_array_equal)
  same(written_as_matrices(svd_mutation(key, tree, max_scale=2.0)), svd_mutation(key, matrices, max_scale=2.0))
  factors = factorize(expert)
  same(factors, factorize(written_as_matrices(expert)))
  same(
    written_as_matrices(expert_svd_mutation(key, tree, factors, rate=0.3)),
    expert_svd_mutation(key, matrices, factors, rate=0.3),
  )
  cut = factorize(expert, rank=2)["out"]["kernel"]
  assert [part.shape for part in cut] == [(36, 2), (2,), (2, 2)]


def test_layers_that_can_be_no_stack_are_refused():
  tree = {"layers": {"dense": {"kernel": jnp.ones((4, 6)), "bias": jnp.ones(6)}}}
  for mutate in (factorize, functools.partial(svd_mutation, KEY, max_scale=2.0)):
    with pytest.raises(ValueError, match=r"task_vector at layers/dense/kernel: .*rename the level"):
      mutate(tree)


def test_settings_out_of_range_are_refused():
  tree = jax.tree.map(jnp.asarray, TREE)
  factors = factorize(tree)
  for value in (-0.1, float("nan"), float("inf")):
    with pytest.raises(ValueError, match="max_scale: expected a finite number of at least 0"):
      svd_mutation(KEY, tree, max_scale=value)
    with pytest.raises(ValueError, match="rate: expected a finite number of at least 0"):
      expert_svd_mutation(KEY, tree, factors, rate=value)
    with pytest.raises(ValueError, match="std: expected a finite number of at least 0"):
      gaussian_mutation(KEY, tree, std=value)


def test_keys_and_leaves_that_do_not_fit_are_refused():
  tree, integers = jax.tree.map(jnp.asarray, TREE), {"w": jnp.arange(3)}
  keys = jax.random.split(KEY, 2)
  for mutate in OPERATORS.values():
    with pytest.raises(ValueError, match="key: expected one key"):
      mutate(keys, tree)
    with pytest.raises(ValueError, match=r"task_vector\['w'\]: expected floats"):
      mutate(KEY, integers)
  with pytest.raises(ValueError, match="task_vector: expected a pytree of arrays"):
    factorize({})


def test_factors_of_another_tree_or_with_an_expert_axis_are_refused():
  tree = jax.tree.map(jnp.asarray, TREE)
  good = factorize(tree)
  stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), good)
  mutate = functools.partial(expert_svd_mutation, KEY, tree, rate=0.1)
  for factors, message in [
    (stacked, r"expert_svd at w: expected u, s, vt of shapes .* got"),
    (factorize({"w": jnp.ones((2, 3)), "b": jnp.ones(2)}), "expert_svd at w: expected u, s, vt of shapes"),
    (factorize({"w": jnp.ones((3, 2))}), "expert_svd: expected `factorize` of a tree"),
    (tree, "expert_svd at w: expected a MatrixSVD|expert_svd at b: expected None"),
    (good | {"w": None}, "expert_svd at w: expected a MatrixSVD"),
    (good | {"b": good["w"]}, "expert_svd at b: expected None"),
  ]:
    with pytest.raises(ValueError, match=message):
      mutate(factors)


def test_truncated_factors_of_an_expert_serve():
  tree = jax.tree.map(jnp.asarray, TREE)
  u, s, vt = factorize(tree)["w"]
  factors = {"w": type(factorize(tree)["w"])(u[:, :1], s[:1], vt[:1]), "b": None}
  child = expert_svd_mutation(KEY, tree, factors, rate=1.0)
  # the only singular value of a matrix of ones: the child is a multiple of it
  assert np.ptp(child["w"]) < 1e-5
  assert 1.0 < float(child["w"][0, 0]) < 2.0


def test_numpy_leaves_and_absent_leaves_are_taken():
  task_vector = {"w": np.eye(3), "bias": None, "b": np.ones(2, jnp.bfloat16)}
  key = jax.random.key(0)
  for child in (
    svd_mutation(key, task_vector, max_scale=2),
    expert_svd_mutation(key, task_vector, factorize(task_vector), rate=0.5),
    gaussian_mutation(key, task_vector, std=1),
  ):
    assert child["bias"] is None
    assert (child["w"].dtype, child["b"].dtype) == (jnp.float32, jnp.bfloat16)
    assert not np.allclose(child["w"], task_vector["w"])
