import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cqd_jax.genotypes import apply_coefficients, group_leaves

SHAPES = {
  "embedding": {"kernel": (9, 4)},
  "layers": {
    "attention": {"k": {"kernel": (2, 4, 3)}, "q": {"kernel": (2, 4, 4)}},
    "mlp": {"up": {"kernel": (2, 4, 6)}},
    "norm": {"scale": (2, 4)},
  },
  "norm": {"scale": (4,)},
}
# in the order of the leaves: the group of each, and of each layer of the stacked ones
INDICES = {
  "model": (0, 0, 0, 0, 0, 0),
  "layer": (4, (0, 1), (0, 1), (2, 3), 4, 4),
  "kernel": (0, (1, 2), (3, 4), (5, 6), 7, 7),
}
NAMES = {
  "model": ("model",),
  "layer": ("layers/attention[0]", "layers/attention[1]", "layers/mlp[0]", "layers/mlp[1]", "rest"),
  "kernel": (
    "embedding/kernel",
    "layers/attention/k/kernel[0]",
    "layers/attention/k/kernel[1]",
    "layers/attention/q/kernel[0]",
    "layers/attention/q/kernel[1]",
    "layers/mlp/up/kernel[0]",
    "layers/mlp/up/kernel[1]",
    "rest",
  ),
}
GRANULARITIES = list(INDICES)
DTYPES = [jnp.float32, jnp.bfloat16]


def make_tree(seed=0, dtype=jnp.float32, lead=()):
  source = np.random.default_rng(seed)
  return jax.tree.map(
    lambda shape: jnp.asarray(source.normal(size=(*lead, *shape)), dtype),
    SHAPES,
    is_leaf=lambda node: isinstance(node, tuple),
  )


def expected_leaves(coefficients, experts, granularity):
  coefficients = np.float64(coefficients)
  for leaf, group in zip(jax.tree.leaves(experts), INDICES[granularity], strict=True):
    leaf = np.asarray(leaf, np.float64)
    if isinstance(group, int):
      yield np.tensordot(coefficients[:, group], leaf, axes=1)
    else:
      yield np.stack([np.tensordot(coefficients[:, g], leaf[:, layer], axes=1) for layer, g in enumerate(group)])


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_leaves_are_grouped_and_named(granularity):
  groups = group_leaves(make_tree(), granularity)
  assert groups.names == NAMES[granularity]
  assert groups.indices == INDICES[granularity]
  assert groups.size == len(NAMES[granularity])
  other = group_leaves(make_tree(1, jnp.bfloat16), granularity)
  assert (other, hash(other)) == (groups, hash(groups))


def test_layers_that_are_not_stacked_are_told_by_their_numbers():
  ones = functools.partial(jnp.ones, (2, 2))
  block = {"attention": {"q": ones(), "o": ones()}, "mlp": {"up": ones()}, "norm": jnp.ones(2)}
  tree = {"layers": {"0": block, "1": block}, "head": ones(), "Dense_3": {"kernel": ones(), "bias": jnp.ones(2)}}
  groups = group_leaves(tree, "layer")
  assert groups.names == (
    "Dense_3",
    "layers/0/attention",
    "layers/0/mlp",
    "layers/1/attention",
    "layers/1/mlp",
    "rest",
  )
  # Dense_3: bias, kernel; head; then o, q, up, norm of each layer
  assert groups.indices == (5, 0, 5, 1, 1, 2, 5, 3, 3, 4, 5)


def test_a_kernel_of_a_convolution_is_one_matrix():
  conv, stack = {"kernel": jnp.ones((3, 3, 2, 4)), "bias": jnp.ones(4)}, {"conv": {"kernel": jnp.ones((2, 3, 3, 4, 4))}}
  groups = group_leaves({"Conv_0": conv, "Conv_1": conv, "layers": stack}, "kernel")
  assert groups.names == (
    "Conv_0/kernel",
    "Conv_1/kernel",
    "layers/conv/kernel[0]",
    "layers/conv/kernel[1]",
    "rest",
  )
  assert groups.indices == (4, 0, 4, 1, (2, 3))  # each bias before its kernel


def test_layers_that_can_be_no_stack_are_refused_where_they_matter():
  tree = {"layers": {"dense": {"kernel": jnp.ones((4, 6))}}}
  for granularity in ("layer", "kernel"):
    with pytest.raises(ValueError, match=r"params at layers/dense/kernel: .*rename the level"):
      group_leaves(tree, granularity)
  assert group_leaves(tree).names == ("model",)


def test_without_vectors_there_is_no_rest():
  assert group_leaves({"a": jnp.ones((2, 2)), "b": jnp.ones((2, 2))}, "kernel").names == ("a", "b")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_each_group_is_the_weighted_sum_of_the_experts(granularity, dtype):
  experts, groups = make_tree(1, dtype, lead=(3,)), group_leaves(make_tree(), granularity)
  coefficients = np.random.default_rng(2).normal(size=(3, groups.size)).astype(np.float32)
  merged = jax.jit(apply_coefficients, static_argnames="groups")(jnp.asarray(coefficients), experts, groups=groups)
  assert jax.tree.structure(merged) == jax.tree.structure(experts)
  epsilon = float(jnp.finfo(dtype).eps)
  for leaf, value in zip(jax.tree.leaves(merged), expected_leaves(coefficients, experts, granularity), strict=True):
    assert leaf.dtype == dtype
    np.testing.assert_allclose(np.asarray(leaf, np.float64), value, rtol=0.51 * epsilon + 1e-6, atol=1e-5)


def test_a_population_shares_the_experts():
  experts, groups = make_tree(3, lead=(2,)), group_leaves(make_tree(), "layer")
  coefficients = np.random.default_rng(4).normal(size=(3, 2, groups.size)).astype(np.float32)
  apply = functools.partial(apply_coefficients, groups=groups)
  merged = jax.jit(jax.vmap(apply, in_axes=(0, None)))(jnp.asarray(coefficients), experts)
  for i in range(3):
    expected = expected_leaves(coefficients[i], experts, "layer")
    for leaf, value in zip(jax.tree.leaves(merged), expected, strict=True):
      np.testing.assert_allclose(leaf[i], value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_the_gradient_is_the_product_with_each_experts_group(granularity):
  experts, probe = make_tree(5, lead=(2,)), make_tree(6)
  groups = group_leaves(probe, granularity)

  def objective(coefficients):
    merged = apply_coefficients(coefficients, experts, groups)
    return sum(jax.tree.leaves(jax.tree.map(lambda a, b: jnp.sum(a * b), merged, probe)))

  expected = np.zeros((2, groups.size))
  triples = zip(jax.tree.leaves(experts), jax.tree.leaves(probe), INDICES[granularity], strict=True)
  for expert, other, group in triples:
    product = np.float64(expert) * np.float64(other)
    for k in range(2):
      for layer, g in enumerate(group if isinstance(group, tuple) else [group]):
        expected[k, g] += product[k, layer].sum() if isinstance(group, tuple) else product[k].sum()
  gradient = jax.jit(jax.grad(objective))(jnp.full((2, groups.size), 0.3))
  np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-4)


def test_arguments_that_do_not_fit_are_refused():
  tree, experts = make_tree(), make_tree(lead=(3,))
  groups = group_leaves(tree, "layer")
  with pytest.raises(ValueError, match="granularity: expected one of model, layer, kernel, got 'leaf'"):
    group_leaves(tree, "leaf")
  with pytest.raises(ValueError, match=r"params\['w'\]: expected floats"):
    group_leaves({"w": jnp.arange(3)})
  with pytest.raises(ValueError, match=r"coefficients: expected \[experts, groups\] = \(3, 5\), got shape \(5, 3\)"):
    apply_coefficients(jnp.ones((5, 3)), experts, groups)
  with pytest.raises(ValueError, match="groups: expected `group_leaves` of a tree"):
    apply_coefficients(jnp.ones((3, 5)), {"w": jnp.ones((3, 2))}, groups)
  with pytest.raises(ValueError, match="groups: made for 2 layers"):
    apply_coefficients(jnp.ones((3, 5)), jax.tree.map(lambda leaf: jnp.ones((3, 5, *leaf.shape[1:])), tree), groups)
  with pytest.raises(ValueError, match="expert_task_vectors: expected at least one"):
    apply_coefficients(jnp.ones((0, 5)), make_tree(lead=(0,)), groups)
  ragged = experts | {"norm": {"scale": jnp.ones((2, 4))}}
  with pytest.raises(ValueError, match=r"expert_task_vectors\['norm'\]\['scale'\]: expected 3 individuals"):
    apply_coefficients(jnp.ones((3, 5)), ragged, groups)
