"""What a leaf is, by its path: stacked or not, matrix or vector, and of which layer."""

import jax
import jax.numpy as jnp
import pytest

from cqd_jax.trees import is_matrix, is_stacked, layer_name, leaf_keys, leaf_path, num_parameters, stack_path

TREE = {
  "embed": {"embedding": jnp.zeros((7, 4))},
  "layers": {"norm": {"scale": jnp.zeros((2, 4))}, "up": {"kernel": jnp.zeros((2, 4, 8))}},
  "blocks_3": {"norm": {"scale": jnp.zeros(4)}, "conv": {"kernel": jnp.zeros((3, 3, 4, 4))}},
}


def leaves(tree):
  return {"/".join(leaf_path(path)): (leaf_path(path), leaf) for path, leaf in jax.tree.leaves_with_path(tree)}


@pytest.mark.parametrize(
  ("name", "stacked", "matrix"),
  [
    ("embed/embedding", False, True),
    ("layers/norm/scale", True, False),  # one vector a layer, not a matrix
    ("layers/up/kernel", True, True),
    ("blocks_3/norm/scale", False, False),
    ("blocks_3/conv/kernel", False, True),
  ],
)
def test_stacks_and_matrices(name, stacked, matrix):
  path, leaf = leaves(TREE)[name]
  assert is_stacked(path) == stacked
  assert is_matrix(path, leaf) == matrix


@pytest.mark.parametrize(
  ("path", "layer", "stack"),
  [
    (("layers", "3", "mlp", "kernel"), "layers/3", ()),
    (("model", "layers", "mlp", "kernel"), "model/layers/mlp", ("model", "layers")),
    (("blocks_12", "attention", "kernel"), "blocks_12", ()),
    (("Dense_0", "bias"), "Dense_0", ()),
    (("head", "kernel"), "head", ()),
    (("kernel",), "", ()),
  ],
)
def test_layers_and_stacks_by_path(path, layer, stack):
  assert layer_name(path) == layer
  assert stack_path(path) == stack


def test_paths_of_dicts_lists_and_attributes_are_names():
  tree = {"a": [jnp.zeros(1), {"b": jnp.zeros(1)}]}
  assert sorted(leaves(tree)) == ["a/0", "a/1/b"]


def test_every_leaf_has_its_own_key():
  keys = leaf_keys(jax.random.key(0), TREE)
  assert jax.tree.structure(keys) == jax.tree.structure(TREE)
  data = {tuple(jax.random.key_data(key).tolist()) for key in jax.tree.leaves(keys)}
  assert len(data) == 5


def test_parameters_are_counted_in_arrays_and_in_shapes():
  expected = 7 * 4 + 2 * 4 + 2 * 4 * 8 + 4 + 3 * 3 * 4 * 4
  assert num_parameters(TREE) == expected
  assert num_parameters(jax.eval_shape(lambda: TREE)) == expected
