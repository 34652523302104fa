"""Random base models and experts of low rank, for tests of core space."""

import jax
import jax.numpy as jnp
import numpy as np

from cqd_jax.low_rank import LowRank

SHAPES = {
  "embed": {"embedding": (11, 6)},
  "layers": {"up": {"kernel": (3, 6, 9), "bias": (3, 9)}, "down": {"kernel": (3, 9, 6)}},
  "blocks_1": {"kernel": (7, 5)},
  "norm": {"scale": (6,)},
}
MATRICES = ("embed/embedding", "layers/up/kernel", "layers/down/kernel", "blocks_1/kernel")


def is_shape(node):
  return isinstance(node, tuple) and not hasattr(node, "_fields")


def as_array(values, dtype):
  """What JAX makes of float64 values, without a program for each shape."""
  return jnp.asarray(values.astype(np.float32).astype(dtype))


def random_tree(seed, dtype=jnp.float32, lead=()):
  source = np.random.default_rng(seed)
  return jax.tree.map(lambda shape: as_array(source.normal(size=(*lead, *shape)), dtype), SHAPES, is_leaf=is_shape)


def low_rank_experts(seed, ranks, dtype=jnp.float32):
  """An expert for each of `ranks`: factors at matrices, arrays at vectors."""
  source = np.random.default_rng(seed)

  def leaf(name, rank):
    def draw(*shape):
      return as_array(source.normal(size=shape) / 2, dtype)

    def make(path, shape):
      if name(path) not in MATRICES:
        return draw(*shape)
      *stack, rows, columns = shape
      return LowRank(draw(*stack, rows, rank), draw(*stack, rank, columns))

    return make

  def name(path):
    return "/".join(entry.key for entry in path)

  return [jax.tree.map_with_path(leaf(name, rank), SHAPES, is_leaf=is_shape) for rank in ranks]


def dense_float64(expert):
  """An expert's task vector written out by NumPy."""

  def write(node):
    if isinstance(node, LowRank):
      return np.asarray(node.b, np.float64) @ np.asarray(node.a, np.float64)
    return np.asarray(node, np.float64)

  return jax.tree.map(write, expert, is_leaf=lambda node: isinstance(node, LowRank))


def pick(population, index):
  return jax.tree.map(lambda leaf: leaf[index], population)


def relative_distance(tree, expected):
  """The largest relative distance of any leaf, in Frobenius norms."""

  def distance(one, other):
    one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
    assert one.shape == other.shape
    return np.linalg.norm(one - other) / max(np.linalg.norm(other), 1e-30)

  return max(jax.tree.leaves(jax.tree.map(distance, tree, expected)))
