"""Core space of a U-Net: each convolution's kernel is the one matrix [kh * kw * in, out]."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from core_cases import pick, relative_distance
from unet_cases import MATRICES, name, unet, written_as_matrices

from cqd_jax.genotypes import CoreBasis, apply_coefficients, group_leaves
from cqd_jax.low_rank import LowRank, LowRankUpdate
from cqd_jax.operators import aggregate, expert_svd_mutation, factorize, linear_merge, svd_mutation

TOLERANCE = 2e-6


def low_rank_unet(seed, rank):
  """An expert as factors of its kernels' matrices."""
  source = np.random.default_rng(seed)

  def make(path, leaf):
    rows, columns = MATRICES.get(name(path), (None, None))
    if rows is None:
      return leaf
    return LowRank(*(jnp.asarray(source.normal(size=shape), jnp.float32) for shape in ((rows, rank), (rank, columns))))

  return jax.tree.map_with_path(make, unet(seed))


def test_with_nothing_truncated_it_is_the_dense_space():
  base, experts = unet(0), unet(1, lead=(3,))
  basis = CoreBasis.from_experts(base, experts)
  assert {fit.path: fit.rank for fit in basis.fits()} == {path: min(shape) for path, shape in MATRICES.items()}
  key = jax.random.key(0)

  def variations(tree):
    yield pick(tree, 1)
    for granularity in ("model", "layer", "kernel"):
      yield linear_merge(key, pick(tree, 0), pick(tree, 2), std=0.5, granularity=granularity)
    yield aggregate(tree, jnp.linspace(0.1, 0.9, 3))
    yield svd_mutation(key, pick(tree, 0), max_scale=2.0)
    yield expert_svd_mutation(key, pick(tree, 0), factorize(pick(tree, 1)), rate=0.7)
    groups = group_leaves(pick(tree, 0), "kernel")
    coefficients = jax.random.normal(key, (3, groups.size))
    yield apply_coefficients(coefficients, tree, groups)

  for core, dense in zip(variations(basis.experts), variations(experts), strict=True):
    assert relative_distance(basis.task_vector(core), dense) < 10 * TOLERANCE
    expected = jax.tree.map(lambda leaf, update: np.asarray(leaf, np.float64) + update, base, dense)
    assert relative_distance(basis.materialize(core), expected) < 10 * TOLERANCE
    assert relative_distance(basis.encode(dense), core) < 10 * TOLERANCE
    assert jax.tree.map(jnp.shape, basis.materialize(core)) == jax.tree.map(jnp.shape, base)


@pytest.mark.parametrize("factors", [False, True])
def test_it_is_the_core_space_of_the_matrices(factors):
  """The same numbers as of a model whose kernels are written as matrices, dense experts truncated or given factors."""
  experts = [low_rank_unet(seed, rank=2) if factors else unet(seed) for seed in (1, 2)]
  options = {} if factors else {"rank": 2}
  ours = CoreBasis.from_experts(unet(0), experts, **options)
  flat = experts if factors else [written_as_matrices(expert) for expert in experts]
  theirs = CoreBasis.from_experts(written_as_matrices(unet(0)), flat, **options)
  for part in ("left", "right", "experts", "errors"):
    jax.tree.map(np.testing.assert_array_equal, getattr(ours, part), getattr(theirs, part))
  assert ours.ranks == theirs.ranks
  genotype = pick(ours.experts, 1)
  for method in ("task_vector", "materialize"):
    found, expected = getattr(ours, method)(genotype), getattr(theirs, method)(genotype)
    jax.tree.map(np.testing.assert_array_equal, written_as_matrices(found), expected)
  outside = unet(7)
  jax.tree.map(np.testing.assert_array_equal, ours.encode(outside), theirs.encode(written_as_matrices(outside)))


def test_apply_shares_the_kernels_in_their_own_shape():
  basis = CoreBasis.from_experts(unet(0), unet(1, lead=(3,)), rank=2)
  for genotype, models in (
    (pick(basis.experts, 1), basis.materialize(pick(basis.experts, 1))),
    (basis.experts, jax.vmap(basis.materialize)(basis.experts)),
  ):
    applied = basis.apply(genotype)
    kernel = applied["out"]["kernel"]
    assert isinstance(kernel, LowRankUpdate)
    assert kernel.kernel is basis.base["out"]["kernel"]
    own, left, core, right = (np.asarray(part, np.float64) for part in jax.tree.leaves(kernel))
    update = left @ core @ right.T
    written = own + update.reshape(*update.shape[:-2], *own.shape)
    np.testing.assert_allclose(written, models["out"]["kernel"], atol=1e-5)
    np.testing.assert_allclose(applied["out"]["bias"], models["out"]["bias"], rtol=1e-6)


def test_a_convolution_with_a_shared_kernel_is_that_of_the_model_written_out():
  """As a user's model would do it: into the space of the core, where the rest are products of channels."""
  basis = CoreBasis.from_experts(unet(0), unet(1, lead=(2,)), rank=2)
  genotype = pick(basis.experts, 0)
  kernel = basis.apply(genotype)["out"]["kernel"]
  image = jax.random.normal(jax.random.key(0), (2, 6, 5, 4))
  convolve = functools.partial(
    jax.lax.conv_general_dilated,
    window_strides=(1, 1),
    padding="SAME",
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
  )
  inner = convolve(image, kernel.left.reshape(*kernel.kernel.shape[:-1], -1))
  shared = convolve(image, kernel.kernel) + jnp.einsum("bhwa,ac,oc->bhwo", inner, kernel.core, kernel.right)
  written = convolve(image, basis.materialize(genotype)["out"]["kernel"])
  np.testing.assert_allclose(shared, written, atol=1e-4)


def test_a_stack_of_convolutions():
  source = np.random.default_rng(0)
  base, *experts = (
    {"layers": {"conv": {"kernel": jnp.asarray(source.normal(size=(2, 3, 3, 4, 5)), jnp.float32)}}} for _ in range(3)
  )
  basis = CoreBasis.from_experts(base, experts)
  assert basis.left["layers"]["conv"]["kernel"].shape == (2, 36, 10)
  assert basis.experts["layers"]["conv"]["kernel"].shape == (2, 2, 10, 5)
  for index, expert in enumerate(experts):
    assert relative_distance(basis.task_vector(pick(basis.experts, index)), expert) < TOLERANCE


def test_what_does_not_fit_is_named():
  base, expert = unet(0), unet(1)
  for factors in (
    LowRank(jnp.ones((3, 3, 4, 1)), jnp.ones((3, 3, 1, 2))),
    LowRank(jnp.ones((4, 1)), jnp.ones((1, 2))),
  ):
    with pytest.raises(ValueError, match=r"task_vectors\[0\] at out/kernel: expected factors .*\(36, 2\)"):
      CoreBasis.from_experts(base, [expert | {"out": {"kernel": factors, "bias": None}}])
  with pytest.raises(ValueError, match=r"task_vectors\[0\] at out/kernel: expected shape \(3, 3, 4, 2\)"):
    CoreBasis.from_experts(base, [expert | {"out": {"kernel": jnp.ones((36, 2)), "bias": None}}])
  tree = {"layers": {"dense": {"kernel": jnp.ones((4, 6)), "bias": jnp.ones(6)}}}
  with pytest.raises(ValueError, match=r"base at layers/dense/kernel: .*rename the level"):
    CoreBasis.from_experts(tree, [tree])
