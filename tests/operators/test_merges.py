"""Merges of T task vectors: each against its definition in float64 NumPy, and what they promise together."""

import functools
import itertools
import operator

import jax
import jax.numpy as jnp
import merge_oracles as oracle
import numpy as np
import pytest

from cqd_jax import operators as ops
from cqd_jax.operators import frame_of, sparsify

WEIGHTS = np.array([0.5, 1.25, 0.75])
EVEN = np.ones(3)


# Each: the function with its settings, its oracle on T tensors (or on two, or on one), its frame, T, and what a factor
# on all task vectors does: it comes out again, or (None) something else.
MERGES = {
  "linear": (functools.partial(ops.linear, weights=WEIGHTS), lambda x: oracle.summed(x, WEIGHTS, True), "linear", 3),
  "task_arithmetic": (
    functools.partial(ops.task_arithmetic, scale=0.6, weights=WEIGHTS),
    lambda x: 0.6 * oracle.summed(x, WEIGHTS),
    "linear",
    3,
  ),
  "nuslerp": (
    functools.partial(ops.nuslerp, weights=WEIGHTS[:2]),
    lambda x: oracle.on_arc(*x, 1.25 / 1.75),
    "inner_product",
    2,
  ),
  "nuslerp_rows": (
    functools.partial(ops.nuslerp_rows, weights=WEIGHTS[:2]),
    lambda x: oracle.rows_on_arc(x, 1.25 / 1.75, -1),
    "elementwise",
    2,
  ),
  "nuslerp_columns": (
    functools.partial(ops.nuslerp_rows, weights=WEIGHTS[:2], axis=0),
    lambda x: oracle.rows_on_arc(x, 1.25 / 1.75, 0),
    "elementwise",
    2,
  ),
  "multislerp": (
    functools.partial(ops.multislerp, weights=WEIGHTS),
    lambda x: oracle.multislerp(x, WEIGHTS),
    "inner_product",
    3,
  ),
  "karcher": (
    functools.partial(ops.karcher, weights=WEIGHTS, max_iter=30),
    lambda x: oracle.karcher(x, WEIGHTS),
    "inner_product",
    3,
  ),
  "model_stock": (ops.model_stock, oracle.model_stock, "inner_product", 3),
  "model_stock_rows": (ops.model_stock_rows, oracle.model_stock_rows, "elementwise", 3),
  "ties_rescaled": (
    functools.partial(ops.ties, weights=WEIGHTS, density=0.4, rescale=True),
    lambda x: oracle.consensus([oracle.restored(oracle.trimmed(each, 0.4), each) for each in x], WEIGHTS),
    "elementwise",
    3,
  ),
  "breadcrumbs": (
    functools.partial(ops.breadcrumbs, weights=WEIGHTS, density=0.6, gamma=0.2),
    lambda x: oracle.summed([oracle.tails_cut(each, 0.6, 0.2) for each in x], WEIGHTS),
    "elementwise",
    3,
  ),
  "breadcrumbs_mergekit": (
    functools.partial(ops.breadcrumbs, weights=WEIGHTS, density=0.9, gamma=0.2, rescale=True, convention="mergekit"),
    lambda x: oracle.summed([oracle.restored(oracle.tails_cut(each, 0.9, 0.2, True), each) for each in x], WEIGHTS),
    "elementwise",
    3,
  ),
  "breadcrumbs_ties": (
    functools.partial(ops.breadcrumbs_ties, weights=WEIGHTS, density=0.9, gamma=0.2, normalize=True),
    lambda x: oracle.consensus([oracle.tails_cut(each, 0.9, 0.2) for each in x], WEIGHTS),
    "elementwise",
    3,
  ),
  "sce": (functools.partial(ops.sce, select_topk=0.5), lambda x: oracle.sce(x, 0.5), "elementwise", 3),
  "sce_mergekit": (functools.partial(ops.sce, convention="mergekit"), lambda x: oracle.sce(x, 1.0, True), None, 3),
  "magmax": (ops.magmax, oracle.magmax, "elementwise", 3),
  "ram": (functools.partial(ops.ram, epsilon=0.7), lambda x: oracle.ram(x, epsilon=0.7), None, 3),
  "ramplus_tl": (
    functools.partial(ops.ramplus_tl, r=0.4, alpha=0.9, epsilon=0.7),
    lambda x: oracle.ram(x, 0.4, 0.9, 0.7),
    None,
    3,
  ),
  "consensus_merge": (ops.consensus_merge, lambda x: oracle.consensus_merge(x, 0.4, 2), "elementwise", 3),
  "tsv": (ops.tsv, oracle.on_matrices(oracle.tsv), "inner_product", 3),
  "iso_c": (ops.iso_c, oracle.on_matrices(oracle.iso_c), "inner_product", 3),
  "iso_cts": (
    functools.partial(ops.iso_cts, common=0.3),
    oracle.on_matrices(lambda x: oracle.iso_cts(x, 0.3)),
    "inner_product",
    3,
  ),
  "knots_ties": (
    functools.partial(ops.knots_ties, weights=WEIGHTS, density=0.4),
    lambda x: oracle.knots(x, lambda y: oracle.consensus([oracle.trimmed(each, 0.4) for each in y], WEIGHTS)),
    "elementwise",
    3,
  ),
  "wudi": (
    functools.partial(ops.wudi, ridge=0.01),
    oracle.on_matrices(lambda x: oracle.wudi(x, 0.01)),
    "inner_product",
    3,
  ),
}
EXACT = [name for name in MERGES if MERGES[name][2]]
"""Those that a factor on all task vectors passes through."""

ROUNDED = ["linear", "breadcrumbs_ties", "sce", "multislerp", "magmax", "tsv"]
SLOPES = ["breadcrumbs_ties", "sce", "model_stock", "iso_cts", "knots_ties", "wudi"]
"""One of each family, for what takes another program for each."""

SHAPES = {"layers": {"kernel": (2, 5, 4)}, "head": {"kernel": (6, 4)}, "bias": (7,)}

compiled = functools.cache(lambda name: jax.jit(MERGES[name][0]))


def make_tree(seed, dtype=jnp.float32, lead=()):
  source = np.random.default_rng(seed)

  def draw(shape):
    return jnp.asarray(source.normal(size=(*lead, *shape)).astype(np.float32).astype(dtype))

  return jax.tree.map(draw, SHAPES, is_leaf=lambda node: isinstance(node, tuple))


@pytest.mark.parametrize("name", MERGES)
def test_a_merge_is_what_its_definition_says(to_float64, check_close, name):
  _, definition, frame, size = MERGES[name]
  trees = make_tree(0, lead=(size,))
  result = compiled(name)(trees)
  check_close(result, oracle.over_tensors(definition, to_float64(trees)), scale=80.0)
  if frame:
    assert frame_of(MERGES[name][0]) == frame


@pytest.mark.parametrize("name", ROUNDED)
def test_bfloat16_is_rounded_once(to_float64, check_close, name):
  trees = make_tree(1, jnp.bfloat16, lead=(3,))
  result = compiled(name)(trees)
  check_close(result, oracle.over_tensors(MERGES[name][1], to_float64(trees)), jnp.bfloat16, scale=20.0)


@pytest.mark.parametrize("name", EXACT)
def test_a_factor_on_all_comes_out_again(name):
  trees = make_tree(2, lead=(MERGES[name][3],))
  one, other = compiled(name)(trees), compiled(name)(jax.tree.map(lambda leaf: -0.25 * leaf, trees))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(-4 * b, a, rtol=1e-3, atol=2e-5), one, other)


@pytest.mark.parametrize(
  "name", ["sce", "magmax", "ram", "ramplus_tl", "consensus_merge", "model_stock", "tsv", "wudi"]
)
def test_the_order_of_task_vectors_does_not_matter(name):
  trees = make_tree(3, lead=(3,))
  expected = compiled(name)(trees)
  for order in ([1, 2, 0], [2, 1, 0]):
    result = compiled(name)(jax.tree.map(lambda leaf, order=order: leaf[np.array(order)], trees))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), result, expected)


SAME = [
  "linear",
  "nuslerp",
  "nuslerp_rows",
  "multislerp",
  "karcher",
  "model_stock",
  "model_stock_rows",
  "magmax",
  "sce_mergekit",
]
"""Of equal task vectors they give these."""


@pytest.mark.parametrize("name", SAME)
def test_equal_task_vectors_give_themselves(name):
  tree = make_tree(4)
  result = compiled(name)(jax.tree.map(lambda leaf: jnp.stack([leaf] * MERGES[name][3]), tree))
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), result, tree)


def test_equal_task_vectors_of_tsv_are_cut_to_their_rank():
  tree = make_tree(5)
  result = compiled("tsv")(jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), tree))
  u, s, vt = np.linalg.svd(np.asarray(tree["head"]["kernel"], np.float64), full_matrices=False)
  np.testing.assert_allclose(result["head"]["kernel"], u[:, :1] * s[:1] @ vt[:1], atol=2e-5)


def test_equal_task_vectors_of_wudi_give_themselves_up_to_the_ridge():
  kernel = 2 * jnp.eye(6, 4)
  merged = ops.wudi({"w": jnp.stack([kernel] * 3)}, ridge=1e-3)["w"]
  # Between the sum and itself; the form's eigenvalues are 3 / 4.
  np.testing.assert_allclose(merged, kernel * (1 + 2 * 1e-3 / (0.75 + 1e-3)), atol=1e-4)


@pytest.mark.parametrize("name", MERGES)
def test_nothing_gives_nothing_and_one_that_is_nan_spoils_its_tensor_at_most(name):
  size = MERGES[name][3]
  zeros = jax.tree.map(jnp.zeros_like, make_tree(6, lead=(size,)))
  for leaf in jax.tree.leaves(compiled(name)(zeros)):
    assert (leaf == 0).all()
  trees = make_tree(6, lead=(size,))
  spoiled = {**trees, "head": {"kernel": trees["head"]["kernel"].at[1, 2, 3].set(jnp.nan)}}
  result, clean = compiled(name)(spoiled), compiled(name)(trees)
  if name not in ("consensus_merge", "breadcrumbs", "breadcrumbs_ties", "breadcrumbs_mergekit"):
    assert np.isnan(result["head"]["kernel"][2, 3])
  del result["head"], clean["head"]
  jax.tree.map(np.testing.assert_array_equal, result, clean)


@pytest.mark.parametrize("name", ["linear", "multislerp", "model_stock", "consensus_merge", "iso_c", "wudi"])
def test_opposite_task_vectors_cancel(name):
  tree = make_tree(7)
  merge = MERGES[name][0]
  merge = functools.partial(merge, weights=np.ones(2)) if name in ("linear", "multislerp") else merge
  result = jax.jit(merge)(jax.tree.map(lambda leaf: jnp.stack([leaf, -leaf]), tree))
  for leaf in jax.tree.leaves(result):
    np.testing.assert_allclose(leaf, 0, atol=1e-5)


@pytest.mark.parametrize("name", SLOPES)
def test_gradients_are_finite(name):
  leaf = make_tree(8, lead=(MERGES[name][3],))["head"]["kernel"]
  grad = jax.jit(jax.grad(lambda x: jnp.sum(MERGES[name][0]({"w": x})["w"] ** 2)))(leaf)
  assert np.isfinite(grad).all()
  assert np.asarray(grad).any()


@pytest.mark.parametrize("name", ["multislerp", "karcher", "nuslerp"])
def test_gradients_at_zero_and_at_equal_ones_are_finite(name):
  merge = MERGES[name][0]
  grad = jax.jit(jax.grad(lambda x: jnp.sum(merge({"w": x})["w"] ** 2)))
  equal = jnp.broadcast_to(jnp.arange(1.0, 7.0).reshape(1, 2, 3), (MERGES[name][3], 2, 3))
  for trees in (jnp.zeros_like(equal), equal):
    assert np.isfinite(grad(trees)).all()


@pytest.mark.parametrize("name", ["sce", "iso_cts"])
def test_a_population_is_merged_one_by_one(name):
  trees = make_tree(9, lead=(2, 3))
  together = jax.jit(jax.vmap(MERGES[name][0]))(trees)
  for i in range(2):
    pick = functools.partial(jax.tree.map, operator.itemgetter(i))
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    jax.tree.map(close, pick(together), compiled(name)(pick(trees)))


IN_CORE = {
  "nuslerp": functools.partial(ops.nuslerp, weights=WEIGHTS[:2]),
  "multislerp": MERGES["multislerp"][0],
  "karcher": MERGES["karcher"][0],
  "model_stock": ops.model_stock,
  "wudi": MERGES["wudi"][0],
  "tsv": functools.partial(ops.tsv, rank=2),
  "iso_c": functools.partial(ops.iso_c, rank=4),
  "iso_cts": functools.partial(ops.iso_cts, rank=6, common=0.5),
}


@pytest.mark.parametrize("name", IN_CORE)
def test_the_merge_of_cores_is_the_core_of_the_merge(name):
  merge = jax.jit(IN_CORE[name])
  assert frame_of(IN_CORE[name]) == "inner_product"
  source = np.random.default_rng(10)
  size = 2 if name == "nuslerp" else 3
  left, right = (np.linalg.qr(source.normal(size=(n, 6)))[0] for n in (11, 9))
  factors = zip(source.normal(size=(size, 6, 2)), source.normal(size=(size, 2, 6)), strict=True)
  cores = np.stack([one @ other for one, other in factors])
  dense = merge({"w": jnp.asarray(left @ cores @ right.T, jnp.float32)})["w"]
  core = merge({"w": jnp.asarray(cores, jnp.float32)})["w"]
  np.testing.assert_allclose(left @ np.asarray(core, np.float64) @ right.T, dense, atol=2e-4)


RANDOM = {
  "dare_linear": (ops.dare_linear, {"density": 0.4}, oracle.summed, {"normalize": False}, oracle.dropped),
  "dare_ties": (ops.dare_ties, {"density": 0.4}, oracle.consensus, {"normalize": False}, oracle.dropped),
  "della": (ops.della, {"density": 0.5, "epsilon": 0.3}, oracle.consensus, {"normalize": True}, oracle.pruned),
  "della_linear": (ops.della_linear, {"density": 0.5, "epsilon": 0.3}, oracle.summed, {}, oracle.pruned),
}


@pytest.mark.parametrize("convention", ["paper", "mergekit"])
@pytest.mark.parametrize("name", RANDOM)
def test_a_random_merge_is_its_definition_with_the_same_draws(monkeypatch, to_float64, check_close, name, convention):
  merge, settings, combine, how, sparsify_by = RANDOM[name]
  source = np.random.default_rng(11)
  trees = {
    "a": jnp.asarray(source.normal(size=(3, 6, 5)), jnp.float32),
    "b": jnp.asarray(source.normal(size=(3, 2, 4, 3)), jnp.float32),
  }
  drawn = {leaf: source.random(size=trees[leaf].shape).astype(np.float32) for leaf in trees}
  waiting = [jnp.asarray(own) for leaf in trees for own in drawn[leaf]]
  monkeypatch.setattr(sparsify, "draws", lambda key, shape: waiting.pop(0))
  result = merge(jax.random.key(0), trees, WEIGHTS, convention=convention, **settings)
  mergekit = convention == "mergekit"

  def expected(tensors, draws):
    sparse = [sparsify_by(*each, **settings, mergekit=mergekit) for each in zip(tensors, draws, strict=True)]
    return combine(sparse, WEIGHTS, **how, mergekit=mergekit)

  check_close(result, oracle.over_tensors(expected, to_float64(trees), drawn), scale=10.0)
  assert frame_of(merge) == "elementwise"


def test_the_expectation_of_random_merges_is_the_weighted_sum():
  # 2000 draws of 3 x 12 entries: a kept share p has a standard error of at most sqrt((1 - p) / p / 2000) of an entry,
  # p at least 0.35 here, so 0.0305 of each and less of a sum; the bound is 6 times that of the largest entries.
  trees = {"w": jnp.asarray(np.random.default_rng(12).normal(size=(3, 12)), jnp.float32)}
  keys = jax.random.split(jax.random.key(1), 2000)
  bound = 6 * 0.0305 * np.sqrt((np.asarray(trees["w"]) ** 2).sum(axis=0))
  for merge in (functools.partial(ops.dare_linear, density=0.4), functools.partial(ops.della_linear, epsilon=0.3)):
    mean = jax.jit(lambda keys, merge=merge: jax.vmap(lambda key: merge(key, trees)["w"])(keys).mean(axis=0))(keys)
    assert (np.abs(mean - trees["w"].sum(axis=0)) < bound).all()


def test_task_vectors_tensors_and_layers_draw_each_for_itself():
  # 4000 entries of which a pair is kept alike with probability 1/2: a standard deviation of 0.0079; the bound is 6.
  leaf = jnp.ones((2, 3, 4000))
  merge = functools.partial(ops.dare_linear, jax.random.key(2), density=0.5, rescale=False)
  kept = [merge({"layers": {"a": one}, "b": one[:, 0]}) for one in (leaf.at[1].set(0.0), leaf.at[0].set(0.0))]
  rows = [np.asarray(row) for each in kept for row in (*each["layers"]["a"], each["b"])]
  for one, other in itertools.combinations(rows, 2):
    assert abs((one == other).mean() - 0.5) < 6 * 0.0079


def test_a_traced_density_is_that_density():
  trees = {"w": make_tree(13, lead=(3,))["head"]["kernel"]}
  for merge in (ops.ties, functools.partial(ops.breadcrumbs, gamma=0.05)):
    traced = jax.jit(lambda x, d, merge=merge: merge(x, density=d))
    for density in (0.3, 0.9):
      stated = jax.jit(functools.partial(merge, density=density))(trees)
      np.testing.assert_allclose(traced(trees, density)["w"], stated["w"], rtol=1e-6)


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda x: ops.linear(x, np.array([1.0, -1.0])), "weights: expected a sum other than 0"),
    (lambda x: ops.linear(x, np.ones(3)), r"weights: expected one weight per task vector, shape \(2,\)"),
    (lambda x: ops.karcher(x, max_iter=0), "max_iter: expected at least 1, got 0"),
    (lambda x: ops.nuslerp({"w": x["w"][:1]}), "task_vectors: expected 2 on the leading axis"),
    (lambda x: ops.nuslerp_rows(x, axis=1), "axis: expected -1 or 0, got 1"),
    (
      lambda x: ops.model_stock(jax.tree.map(lambda leaf: leaf[:1], x)),
      "expected at least 2 on the leading axis, got 1",
    ),
    (lambda x: ops.breadcrumbs(x, density=1.5), r"density: expected a share in \(0, 1\], got 1.5"),
    (lambda x: ops.breadcrumbs(x, gamma=1.0), r"gamma: expected a share in \[0, 1\), got 1.0"),
    (lambda x: ops.dare_ties(jax.random.key(0), x, density=0.0), r"density: expected a share in \(0, 1\]"),
    (lambda x: ops.della(jax.random.key(0), x, density=0.05), r"probabilities in \(0, 1\], got -0.025 to 0.125"),
    (
      lambda x: ops.della(jax.random.key(0), x, density=0.9, convention="mergekit"),
      r"probabilities in \(0, 1\], got 0.75 to 1.05",
    ),
    (lambda x: ops.sce(x, select_topk=0.0), r"expected a share in \(0, 1\]"),
    (lambda x: ops.ram(x, epsilon=-1.0), "epsilon: expected a finite number of at least 0"),
    (lambda x: ops.tsv(x, rank=0), "rank: expected at least 1, got 0"),
    (lambda x: ops.iso_cts(x, common=1.5), r"common: expected a share in \[0, 1\], got 1.5"),
    (lambda x: ops.wudi(x, ridge=-1.0), "ridge: expected a finite number of at least 0"),
    (lambda x: ops.magmax({"w": jnp.arange(3)}), r"task_vectors\['w'\]: expected floats"),
  ],
)
def test_what_does_not_fit_is_refused(call, message):
  with pytest.raises(ValueError, match=message):
    call({"w": jnp.ones((2, 3))})
