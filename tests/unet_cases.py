"""A U-Net's params as Flax Linen names and shapes them: kernels of convolutions, of their transposes and of a Dense."""

import jax
import jax.numpy as jnp
import numpy as np

SHAPES = {
  "down_0": {
    "Conv_0": {"kernel": (3, 3, 2, 4), "bias": (4,)},
    "Conv_1": {"kernel": (3, 3, 4, 4), "bias": (4,)},
    "GroupNorm_0": {"scale": (4,), "bias": (4,)},
  },
  "middle": {
    "time": {"Dense_0": {"kernel": (5, 8), "bias": (8,)}},
    "depthwise": {"kernel": (3, 3, 1, 8)},
    "along": {"kernel": (5, 8, 3)},
  },
  "up_0": {"ConvTranspose_0": {"kernel": (2, 2, 8, 4), "bias": (4,)}, "skip": {"kernel": (1, 1, 8, 4)}},
  "out": {"kernel": (3, 3, 4, 2), "bias": (2,)},
}

MATRICES = {
  "down_0/Conv_0/kernel": (18, 4),
  "down_0/Conv_1/kernel": (36, 4),
  "middle/time/Dense_0/kernel": (5, 8),
  "middle/depthwise/kernel": (9, 8),
  "middle/along/kernel": (40, 3),
  "up_0/ConvTranspose_0/kernel": (32, 4),
  "up_0/skip/kernel": (8, 4),
  "out/kernel": (36, 2),
}
"""The matrix that each kernel is: rows, columns. All other leaves are vectors."""


def name(path):
  return "/".join(entry.key for entry in path)


def unet(seed, dtype=jnp.float32, lead=()):
  source = np.random.default_rng(seed)
  return jax.tree.map(
    lambda shape: jnp.asarray(source.normal(size=(*lead, *shape)), dtype),
    SHAPES,
    is_leaf=lambda node: isinstance(node, tuple),
  )


def written_as_matrices(tree):
  """The same numbers with each kernel as the matrix that it is, in NumPy's (row-major) order."""
  return jax.tree.map_with_path(lambda path, leaf: leaf.reshape(MATRICES.get(name(path), leaf.shape)), tree)
