"""What a leaf is, by its path: stacked or not, matrix or vector, and of which layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cqd_jax.models import DecoderConfig, init_params, unstack_layers
from cqd_jax.trees import (
  as_matrices,
  check_layers,
  fingerprint,
  from_matrices,
  is_matrix,
  is_stacked,
  layer_name,
  leaf_keys,
  leaf_path,
  matrix_shape,
  num_parameters,
  stack_path,
)

TREE = {
  "embed": {"embedding": jnp.zeros((7, 4))},
  "layers": {"norm": {"scale": jnp.zeros((2, 4))}, "up": {"kernel": jnp.zeros((2, 4, 8))}},
  "blocks_3": {"norm": {"scale": jnp.zeros(4)}, "conv": {"kernel": jnp.zeros((3, 3, 4, 4))}},
}


def leaves(tree):
  return {"/".join(leaf_path(path)): (leaf_path(path), leaf) for path, leaf in jax.tree.leaves_with_path(tree)}


def nested(shapes):
  """A tree of zeros from shapes by path."""
  tree = {}
  for name, shape in shapes.items():
    *parents, last = name.split("/")
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[last] = jnp.zeros(shape)
  return tree


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


@pytest.mark.parametrize(
  ("name", "shape", "expected"),
  [
    ("conv/kernel", (3, 3, 4, 5), (36, 5)),
    ("conv/kernel", (7, 4, 5), (28, 5)),
    ("Dense_0/kernel", (4, 5), (4, 5)),
    ("layers/0/conv/kernel", (3, 3, 4, 5), (36, 5)),
    ("layers/conv/kernel", (2, 3, 3, 4, 5), (2, 36, 5)),  # a stack of 2 layers
    ("layers/up/kernel", (2, 4, 5), (2, 4, 5)),
    ("layers/norm/scale", (2, 4), (2, 4)),  # vectors are what they were
    ("bias", (4,), (4,)),
    ("experts/w", (2, 3, 4, 5), (2, 3, 4, 5)),  # not called a kernel: matrices on the last two axes
    ("kernel", (3, 4, 5), (12, 5)),
  ],
)
def test_kernels_of_convolutions_are_one_matrix(name, shape, expected):
  path, leaf = tuple(name.split("/")), jnp.arange(np.prod(shape), dtype=jnp.float32).reshape(shape)
  assert matrix_shape(path, leaf) == expected
  assert matrix_shape(path, jax.ShapeDtypeStruct(shape, jnp.float32)) == expected
  matrices = as_matrices(path, leaf)
  np.testing.assert_array_equal(matrices, np.asarray(leaf).reshape(expected))
  np.testing.assert_array_equal(from_matrices(matrices, leaf), leaf)
  if shape == expected:
    assert matrices is leaf


ADVICE = r"number its modules \(layers/0/\.\.\.\) or rename the level"


@pytest.mark.parametrize(
  ("shapes", "message"),
  [
    # A user's module called "layers" that holds a Dense, a convolution or some modules side by side.
    ({"layers/dense/bias": (6,), "layers/dense/kernel": (4, 6)}, "tree at layers/dense/kernel: expected matrices"),
    ({"layers/dense/kernel": (4, 6)}, r"tree at layers/dense/kernel: expected matrices .*, got shape \(4, 6\)"),
    ({"layers/dense/kernel": (4, 4), "layers/dense/bias": (4,)}, "tree at layers/dense/kernel: expected matrices"),
    (
      {"layers/conv/bias": (8,), "layers/conv/kernel": (3, 3, 4, 8)},
      "tree at layers/conv/kernel: expected .*axis of 8 layers",
    ),
    ({"a/layers/x/w": (2, 3), "a/layers/y/w": (4, 3)}, "tree at a/layers/y/w: expected .* 2 layers .*stack a/layers"),
    # numbers beside names
    ({"layers/0/kernel": (4, 4), "layers/norm/scale": (4,)}, "tree at layers/norm/scale: .* beside numbered"),
    ({"layers/1/kernel": (4, 4), "layers/a/scale": (4,)}, "tree at layers/a/scale: .* beside numbered"),
  ],
)
def test_layers_that_can_be_no_stack_are_named(shapes, message):
  with pytest.raises(ValueError, match=f"{message}.*{ADVICE}"):
    check_layers(nested(shapes), "tree")


@pytest.mark.parametrize(
  "shapes",
  [
    {"layers/up/kernel": (2, 4, 6), "layers/up/bias": (2, 6), "head/kernel": (6, 9)},
    {"layers/conv/kernel": (2, 3, 3, 4, 8), "layers/conv/bias": (2, 8)},
    {"layers/0/kernel": (4, 6), "layers/0/bias": (6,), "layers/1/kernel": (6, 3)},
    {"encoder/layers/w": (2, 4), "decoder/layers/w": (5, 4)},  # each of its own depth
    {"layers/0/layers/w": (2, 4), "layers/1/layers/w": (3, 4)},
    {"layers/gain": (), "layers/w": (3, 4, 4)},  # a scalar belongs to no layer
    {"layers": (3, 4)},  # a leaf, no level
    {"blocks/dense/kernel": (4, 6)},
    {},
  ],
)
def test_stacks_and_numbered_layers_pass(shapes):
  check_layers(nested(shapes), "tree")


def test_the_decoders_own_params_pass():
  config = DecoderConfig(23, 16, 24, 2, 2, 1, 8, qkv_bias=True, qk_norm=True)
  params = init_params(jax.random.key(0), config)
  for tree in (params, unstack_layers(params), jax.eval_shape(lambda: params)):
    check_layers(tree, "params")
  for path, leaf in leaves(params).values():
    assert as_matrices(path, leaf) is leaf


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


def random_tree(seed=0):
  keys = jax.random.split(jax.random.key(seed), 4)
  return {
    "w": jax.random.normal(keys[0], (7, 5)),
    "h": jax.random.normal(keys[1], (6,)).astype(jnp.bfloat16),
    "n": jax.random.randint(keys[2], (3, 2), 0, 100),
    "flag": jnp.array([True, False]),
    "key": keys[3],
  }


def test_a_fingerprint_is_the_same_for_the_same_bits_and_tells_the_leaf_that_differs():
  tree = random_tree()
  np.testing.assert_array_equal(fingerprint(tree), fingerprint(jax.tree.map(jnp.copy, tree)))
  names = sorted(tree)  # the order of leaves in a dict
  generator = np.random.default_rng(0)
  for name in ("w", "h", "n", "flag"):
    for _ in range(20):
      leaf = np.array(tree[name])
      flipped = leaf.reshape(-1).view(np.uint8)
      if name == "flag":
        flipped[generator.integers(2)] ^= 1
      else:
        flipped[generator.integers(flipped.size)] ^= 1 << generator.integers(8)
      differs = np.asarray(fingerprint(tree) != fingerprint({**tree, name: jnp.asarray(leaf)})).all(axis=1)
      np.testing.assert_array_equal(differs, [other == name for other in names])
  differs = np.asarray(fingerprint(tree) != fingerprint({**tree, "key": jax.random.key(5)})).all(axis=1)
  np.testing.assert_array_equal(differs, [name == "key" for name in names])


def test_a_fingerprint_tells_an_exchange_of_entries_and_zeros_of_another_sign():
  leaf = jnp.arange(12.0).reshape(3, 4)
  assert (fingerprint({"w": leaf}) != fingerprint({"w": leaf[::-1]})).all()
  assert (fingerprint({"w": leaf}) != fingerprint({"w": leaf[:, ::-1]})).all()
  assert (fingerprint({"w": jnp.zeros(3)}) != fingerprint({"w": -jnp.zeros(3)})).all()
