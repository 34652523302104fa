"""What genotypes mean: params by float64 NumPy in every space, experts to the bit, and what a space does not have."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from core_cases import dense_float64, low_rank_experts, pick, random_tree, relative_distance

from cqd_jax.genotypes import CoreBasis, group_leaves
from cqd_jax.genotypes.space import (
  Candidates,
  coefficients,
  core,
  core_space,
  dense,
  dense_space,
  population_of_one,
  population_size,
  take,
)
from cqd_jax.low_rank import LowRankUpdate, MatrixSVD
from cqd_jax.trees import leaf_path

BASE = random_tree(0)
LOW_RANK = low_rank_experts(1, [1, 2, 2])
EXPERTS = [dense_float64(expert) for expert in LOW_RANK]
"""Of three experts the task vectors, float64."""


def stacked(dtype=jnp.float32):
  return jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves), dtype), *EXPERTS)


def keep(rank, make):
  return make()


ROOTS = {
  "dense": lambda: dense_space(BASE, stacked()),
  "core": lambda: core_space(CoreBasis.from_experts(BASE, LOW_RANK)),
  "core, base shared": lambda: core_space(CoreBasis.from_experts(BASE, LOW_RANK), share_base=True),
}
KINDS = {
  **ROOTS,
  "dense of dense": lambda: dense(ROOTS["dense"](), keep),
  "core of dense": lambda: core(ROOTS["dense"](), keep, rank=0),
  **{
    f"coefficients of {name}, by {granularity}": functools.partial(
      lambda name, granularity: coefficients(ROOTS[name](), keep, granularity=granularity), name, granularity
    )
    for name, granularity in (
      ("dense", "model"),
      ("dense", "kernel"),
      ("core", "layer"),
      ("core, base shared", "kernel"),
    )
  },
  "coefficients of cores of dense": lambda: coefficients(ROOTS["dense"](), keep, rank=0),
}


def sum_of(weights):
  """The params of base + sum over experts of weights times task vector, float64; a weight a leaf or one for all."""
  total = jax.tree.map(np.float64, BASE)
  for weight, expert in zip(weights, EXPERTS, strict=True):
    total = jax.tree.map(lambda leaf, own, weight=weight: leaf + weight * own, total, expert)
  return total


def written_out(params):
  """Params without shared bases."""

  def write(leaf):
    if not isinstance(leaf, LowRankUpdate):
      return np.float64(leaf)
    parts = (np.float64(part) for part in (leaf.kernel, leaf.left, leaf.core, leaf.right))
    kernel, left, own, right = parts
    return kernel + left @ own @ np.swapaxes(right, -1, -2)

  return jax.tree.map(write, params, is_leaf=lambda node: isinstance(node, LowRankUpdate))


@pytest.mark.parametrize("name", KINDS)
def test_the_experts_are_the_experts_in_every_space(name):
  space = KINDS[name]()
  assert space.num_experts == population_size(space.initial) == population_size(space.experts) == 3
  assert space.scored_in is space or space.scored_in is space.parent
  assert space.parent is None or space.parent.parent is None
  individuals = space.as_scored(space.initial)
  params = written_out(space.scored_in.materialize(individuals))
  for index in range(3):
    expected = sum_of(np.eye(3)[index])
    assert relative_distance(jax.tree.map(lambda leaf, i=index: leaf[i], params), expected) < 1e-6
    leaves = list(space.leaves(pick(space.initial, index)))
    assert [path for path, _ in leaves] == [leaf_path(path) for path, _ in jax.tree.leaves_with_path(BASE)]
    assert relative_distance([leaf for _, leaf in leaves], jax.tree.leaves(expected)) < 1e-6


@pytest.mark.parametrize("name", KINDS)
def test_sums_are_sums_in_every_space(name):
  """What linear operators rely on, where an individual is a whole model and where it is a handful of numbers."""
  space = KINDS[name]()
  weights = np.array([0.5, -0.25, 1.5], np.float32)
  individual = jax.tree.map(lambda leaf: jnp.einsum("e,e...->...", weights, leaf), space.experts)
  assert relative_distance([leaf for _, leaf in space.leaves(individual)], jax.tree.leaves(sum_of(weights))) < 1e-5
  found = space.core_of(individual)
  assert (found is None) == (space.basis is None)
  if found is not None:
    basis, cores = found
    assert basis is space.basis
    assert relative_distance(basis.materialize(cores), sum_of(weights)) < 1e-5


@pytest.mark.parametrize("name", ROOTS)
@pytest.mark.parametrize("granularity", ["model", "layer", "kernel"])
def test_one_hot_coefficients_are_the_experts_to_the_bit(name, granularity):
  root = ROOTS[name]()
  space = coefficients(root, keep, granularity=granularity)
  groups = group_leaves(BASE, granularity).size
  np.testing.assert_array_equal(space.initial, np.repeat(np.eye(3)[:, :, None], groups, axis=2))
  assert space.initial.dtype == jnp.float32
  jax.tree.map(np.testing.assert_array_equal, space.as_scored(space.initial), root.experts)


def test_each_group_of_weights_has_its_own_coefficients():
  space = coefficients(ROOTS["dense"](), keep, granularity="kernel")
  names = group_leaves(BASE, "kernel").names
  individual = np.random.default_rng(0).normal(size=(3, len(names))).astype(np.float32)
  leaves = dict(space.leaves(jnp.asarray(individual)))
  for path, base in jax.tree.leaves_with_path(BASE):
    path = leaf_path(path)
    own = [np.float64(dict(_by_path(expert))[path]) for expert in EXPERTS]
    name = "/".join(path)
    if path[0] == "layers" and path[-1] == "kernel":
      weights = np.stack([individual[:, names.index(f"{name}[{layer}]")] for layer in range(3)], axis=1)
    else:
      weights = individual[:, names.index(name if name in names else "rest")]
    expected = np.float64(base)
    for expert, weight in zip(own, np.float64(weights), strict=True):
      expected = expected + np.reshape(weight, weight.shape + (1,) * (expert.ndim - weight.ndim)) * expert
    np.testing.assert_allclose(leaves[path], expected, rtol=1e-5, atol=1e-5)


def _by_path(tree):
  return [(leaf_path(path), leaf) for path, leaf in jax.tree.leaves_with_path(tree)]


def test_a_search_may_begin_with_more_than_the_experts():
  space = coefficients(ROOTS["dense"](), keep, granularity="model", starts=(0.25, 1.0))
  assert space.others == ("0.25 x the experts' sum", "1 x the experts' sum")
  assert (space.num_experts, population_size(space.initial)) == (3, 5)
  np.testing.assert_array_equal(space.initial[3:, :, 0], [[0.25] * 3, [1.0] * 3])
  np.testing.assert_array_equal(space.experts, space.initial[:3])
  leaves = [leaf for _, leaf in space.leaves(space.initial[3])]
  assert relative_distance(leaves, jax.tree.leaves(sum_of([0.25] * 3))) < 1e-6


def test_what_is_exact_where():
  assert {name: make().frame for name, make in KINDS.items()} == {
    name: "linear" if name.startswith("coefficients") else "inner_product" if name.startswith("core") else "elementwise"
    for name in KINDS
  }
  assert {name: make().name for name, make in KINDS.items()} == {name: name.split(" ")[0].strip(",") for name in KINDS}


@pytest.mark.parametrize("name", ["dense", "core", "core of dense"])
def test_the_factors_of_experts_give_them_back(name):
  space = KINDS[name]()
  factors = space.expert_svd()

  def check(svd, leaf):
    if svd is None:
      return
    product = np.float64(svd.u) * np.float64(svd.s)[..., None, :] @ np.float64(svd.vt)
    np.testing.assert_allclose(product, leaf, atol=1e-5)

  jax.tree.map(check, factors, space.experts, is_leaf=lambda node: node is None or isinstance(node, MatrixSVD))
  assert any(
    isinstance(leaf, MatrixSVD) for leaf in jax.tree.leaves(factors, is_leaf=lambda n: isinstance(n, MatrixSVD))
  )


def test_coefficients_have_no_directions_of_experts():
  assert coefficients(ROOTS["dense"](), keep).expert_svd is None


def test_a_core_space_is_kept_by_its_rank_and_truncates_to_it():
  root = ROOTS["dense"]()
  kept = []

  def remember(rank, make):
    kept.append(rank)
    return make()

  space = core(root, remember, rank=1, share_base=True)
  assert kept == [1]
  assert (space.share_base, space.basis.ranks[0]) == (True, (1, 1, 1))
  # Each expert's matrix is its best approximation of rank 1.
  own = dict(_by_path(EXPERTS[2]))["blocks_1", "kernel"]
  u, s, vt = np.linalg.svd(own)
  expected = np.float64(BASE["blocks_1"]["kernel"]) + s[0] * np.outer(u[:, 0], vt[0])
  leaves = dict(space.leaves(pick(space.initial, 2)))
  np.testing.assert_allclose(leaves["blocks_1", "kernel"], expected, atol=1e-5)
  assert core(root, remember, rank=0).basis.ranks[0] != (1, 1, 1)
  assert kept == [1, 0]
  by_rank = coefficients(root, remember, rank=1)
  assert kept == [1, 0, 1]
  assert (by_rank.scored_in.name, by_rank.scored_in.basis.ranks[0]) == ("core", (1, 1, 1))
  assert coefficients(root, remember).scored_in is root
  with pytest.raises(ValueError, match="rank: expected at least 0, got -1"):
    core(root, remember, rank=-1)


def test_experts_read_in_core_space_stay_there():
  root = ROOTS["core"]()
  assert core(root, keep, rank=1, share_base=True) is root
  assert coefficients(root, keep).scored_in is root
  assert coefficients(root, keep, rank=3).scored_in is root
  with pytest.raises(ValueError, match="genotype: dense, but the experts of this run were read in core space"):
    dense(root, keep)


def test_coefficients_share_the_base_where_their_parent_does():
  space = KINDS["coefficients of core, base shared, by kernel"]()
  assert space.share_base
  params = space.materialize(space.as_scored(space.initial))
  shared = [
    leaf
    for leaf in jax.tree.leaves(params, is_leaf=lambda n: isinstance(n, LowRankUpdate))
    if isinstance(leaf, LowRankUpdate)
  ]
  assert shared
  assert all(leaf.core.shape[0] == 3 and leaf.kernel.ndim == leaf.core.ndim - 1 for leaf in shared)
  assert not KINDS["coefficients of cores of dense"]().share_base


@pytest.mark.parametrize("name", ["dense", "coefficients"])
def test_models_of_half_precision_stay_so(name):
  base = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), BASE)
  space = dense_space(base, stacked(jnp.bfloat16))
  if name == "coefficients":
    space = coefficients(space, keep, granularity="model")
    jax.tree.map(np.testing.assert_array_equal, space.as_scored(space.initial), stacked(jnp.bfloat16))
  params = space.materialize(space.as_scored(space.initial))
  assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
  assert {leaf.dtype for _, leaf in space.leaves(pick(space.initial, 0))} == {jnp.dtype(jnp.bfloat16)}


def test_candidates_are_written_out_as_they_are_asked_for():
  space = ROOTS["dense"]()
  candidates = Candidates(space.initial, space)
  assert candidates.size == 3
  params = candidates.params_of([2, 0, 2])
  assert population_size(params) == 3
  jax.tree.map(np.testing.assert_array_equal, pick(params, 0), pick(params, 2))
  assert relative_distance(pick(params, 1), sum_of([1, 0, 0])) < 1e-6


def test_individuals_of_a_population():
  population = {"a": jnp.arange(6).reshape(3, 2), "b": jnp.arange(3)}
  assert population_size(population) == 3
  assert jax.tree.map(np.ndarray.tolist, jax.tree.map(np.asarray, take(population, 1))) == {"a": [2, 3], "b": 1}
  one = population_of_one(take(population, 2))
  assert jax.tree.map(jnp.shape, one) == {"a": (1, 2), "b": (1,)}
  assert jax.tree.map(jnp.shape, take(population, np.array([0, 2]))) == {"a": (2, 2), "b": (2,)}
