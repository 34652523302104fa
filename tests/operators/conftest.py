import jax
import jax.numpy as jnp
import numpy as np
import pytest

SHAPES = {
  "layers": {"attention": {"kernel": (3, 5, 4)}, "mlp": {"bias": (3, 7)}},
  "blocks_1": {"kernel": (2, 6), "bias": (6,)},
  "head": {"kernel": (6, 4)},
}


@pytest.fixture
def make_tree():
  """Makes a random tree of stacked and unstacked leaves; `lead` are axes in front of all of them."""

  def make(seed, dtype=jnp.float32, lead=()):
    source = np.random.default_rng(seed)
    return jax.tree.map(
      lambda shape: jnp.asarray(source.normal(size=(*lead, *shape)).astype(np.float32).astype(dtype)),
      SHAPES,
      is_leaf=lambda node: isinstance(node, tuple),
    )

  return make


@pytest.fixture
def to_float64():
  return lambda tree: jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)


@pytest.fixture
def flat64():
  """All entries of a tree as one float64 vector."""
  return lambda tree: np.concatenate([np.ravel(np.asarray(leaf, np.float64)) for leaf in jax.tree.leaves(tree)])


@pytest.fixture
def check_close():
  """Compares a tree with float64 values: to float32 rounding, or to one rounding to a narrower dtype."""

  def check(tree, expected, dtype=jnp.float32, scale=1.0):
    assert jax.tree.structure(tree) == jax.tree.structure(expected)
    epsilon = float(jnp.finfo(dtype).eps)

    def compare(path, leaf, value):
      assert leaf.dtype == dtype, path
      assert leaf.shape == value.shape, path
      rtol, atol = (4 * epsilon, 4 * epsilon * scale) if dtype == jnp.float32 else (0.51 * epsilon, 1e-6 * scale)
      np.testing.assert_allclose(np.asarray(leaf, np.float64), value, rtol=rtol, atol=atol, err_msg=str(path))

    jax.tree.map_with_path(compare, tree, expected)

  return check
