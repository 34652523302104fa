"""What a leaf of a params pytree is: its name, its layer, whether it is made of matrices or of vectors.

A leaf whose path holds the key `layers` followed by a name that is no number (`layers/mlp/up/kernel`) is
STACKED: its leading axis runs over the layers, the form that `jax.lax.scan` wants. Everywhere else a layer is a
module: the path up to its first component that ends in a number (`layers/0`, `blocks_3`, `Dense_1`), or, without
one, the path without the leaf's own name.

Behind the axis of a stack, a leaf of two axes is a matrix. One of more axes is ONE matrix if it is named `kernel`: that
of a convolution, [kh, kw, in, out], is the matrix [kh * kw * in, out] by which patches of the input are multiplied. By
another name it is a stack of matrices on its last two axes. All other leaves are vectors.

Names and shapes do not decide everything. What `check_layers` lets pass is read by these rules, and a model that means
something else has to rename:
- a level `layers` without numbers whose leaves happen to share their leading length is a stack, whatever it holds:
  vectors of one length, or kernels of convolutions that are all 3 high and have no bias beside them;
- a kernel [d, heads, head_dim], as Flax's attention has it, is a matrix [d * heads, head_dim]; and kernels that
  `nn.scan` or `nn.vmap` stack under another name than `layers` are one tall matrix.
"""

import itertools
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, UInt32

from cqd_jax.types import Params, PRNGKey

STACK = "layers"
KERNEL = "kernel"

Path = tuple[str, ...]


def leaf_path(key_path: tuple[Any, ...]) -> Path:
  """The names along a `jax.tree_util` key path, as strings."""
  return tuple(jax.tree_util.keystr((entry,), simple=True) for entry in key_path)


def is_stacked(path: Path) -> bool:
  """Whether the leaf at `path` carries a leading layer axis."""
  return bool(stack_path(path))


def stack_path(path: Path) -> Path:
  """The path of the stack to which a stacked leaf belongs, up to its `layers`; () for a leaf that is not stacked."""
  for depth, (name, following) in enumerate(itertools.pairwise(path), start=1):
    if name == STACK and not following.isdigit():
      return path[:depth]
  return ()


def is_matrix(path: Path, leaf: jax.Array | jax.ShapeDtypeStruct) -> bool:
  """Whether a leaf is a matrix, or a stack of matrices on its last two axes; else it is made of vectors."""
  return leaf.ndim - is_stacked(path) >= 2


def matrix_shape(path: Path, leaf: jax.Array | jax.ShapeDtypeStruct) -> tuple[int, ...]:
  """The shape `[..., m, n]` of `as_matrices(path, leaf)`; of a leaf of vectors its own."""
  depth = int(is_stacked(path))
  if path[-1:] == (KERNEL,) and leaf.ndim - depth > 2:
    return (*leaf.shape[:depth], math.prod(leaf.shape[depth:-1]), leaf.shape[-1])
  return tuple(leaf.shape)


def as_matrices(path: Path, leaf: jax.Array) -> jax.Array:
  """A leaf as the matrix that it is, or as a stack of them, `[..., m, n]` (see the module); vectors as they are."""
  return leaf.reshape(matrix_shape(path, leaf))


def from_matrices(matrices: jax.Array, like: jax.Array) -> jax.Array:
  """What `as_matrices` made of a leaf in the shape of that leaf again; `like` has that shape."""
  return matrices.reshape(like.shape)


def check_layers(tree: Params, name: str) -> None:
  """Raises where leaves are stacked by their path and can be no stack by their shape.

  Below one level `layers` all leaves have one leading length, scalars aside, which belong to no layer; a leaf named
  `kernel` holds a matrix of each layer, so it has three axes or more; and no sibling is numbered. What passes may still
  be something else: see the module.

  Args:
    tree: arrays or shapes of one individual, without a population axis.
    name: of the argument, for the message.

  Raises:
    ValueError: naming the leaf.
  """
  lengths: dict[Path, int] = {}
  paths = [(leaf_path(key_path), leaf) for key_path, leaf in jax.tree.leaves_with_path(tree)]
  numbered = {level for path, _ in paths for level in _numbered_levels(path)}
  for path, leaf in paths:
    stack = stack_path(path)
    if not stack or leaf.ndim == 0:
      continue
    level = "/".join(stack)
    if stack in numbered:
      expected = f"no leaf beside numbered modules in {level}"
    elif path[-1] == KERNEL and leaf.ndim < 3:
      expected = f"matrices [layers, m, n] in the stack {level}"
    elif lengths.setdefault(stack, leaf.shape[0]) != leaf.shape[0]:
      expected = f"a leading axis of {lengths[stack]} layers in all leaves of the stack {level}"
    else:
      continue
    raise ValueError(
      f"{name} at {'/'.join(path)}: expected {expected}, got shape {tuple(leaf.shape)}. If {level} is no stack along a "
      "leading axis, number its modules (layers/0/...) or rename the level"
    )


def _numbered_levels(path: Path) -> list[Path]:
  """The levels `layers` on the way to a leaf below which its module is numbered."""
  following = enumerate(itertools.pairwise(path), start=1)
  return [path[:depth] for depth, (name, below) in following if name == STACK and below.isdigit()]


def layer_name(path: Path) -> str:
  """The layer to which an unstacked leaf belongs (see the module)."""
  for depth, name in enumerate(path):
    if re.search(r"\d$", name):
      return "/".join(path[: depth + 1])
  return "/".join(path[:-1])


def map_with_path(function: Callable[..., Any], tree: Params, *rest: Params) -> Params:
  """`jax.tree.map` whose function also gets the leaf's path as a tuple of names, first."""
  return jax.tree.map_with_path(lambda path, *leaves: function(leaf_path(path), *leaves), tree, *rest)


def as_arrays(tree: Params) -> Params:
  """The tree with NumPy leaves as JAX arrays, in the dtypes that JAX has for them; its own arrays stay as they are."""
  return jax.tree.map(jnp.asarray, tree)


def widen(leaf: jax.Array) -> jax.Array:
  """A leaf in the dtype of the arithmetic: float32, or its own where that is wider."""
  return leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))


def leaf_keys(key: PRNGKey, tree: Params) -> Params:
  """One subkey per leaf, in the structure of `tree`; `key` is consumed."""
  leaves, structure = jax.tree.flatten(tree)
  return jax.tree.unflatten(structure, list(jax.random.split(key, len(leaves))))


def fingerprint(tree: Params) -> UInt32[Array, "L 2"]:
  """A checksum of 64 bits of each of L leaves, in the order of `jax.tree.leaves`.

  A leaf with one bit changed, or two entries exchanged, has another checksum but for a chance of 2^-64. Shapes and
  dtypes do not count; typed PRNG keys are taken by their data. It is a sum over entries, so leaves stay sharded as
  they are. A program is compiled for each shape and not for each tree.
  """
  return _stack(*[_checksum(leaf) for leaf in jax.tree.leaves(tree)])


@jax.jit
def _stack(*rows: jax.Array) -> jax.Array:
  return jnp.stack(rows)


@jax.jit
def _checksum(leaf: jax.Array) -> jax.Array:
  if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
    leaf = jax.random.key_data(leaf)
  if leaf.dtype == jnp.bool_:
    leaf = leaf.astype(jnp.uint8)
  unsigned = {1: jnp.uint8, 2: jnp.uint16}.get(leaf.dtype.itemsize, jnp.uint32)
  bits = jax.lax.bitcast_convert_type(leaf, unsigned).astype(jnp.uint32)  # 8 bytes become two on a new last axis
  position = jnp.ones(bits.shape, jnp.uint32)  # from 1, or the first entry would not be mixed with anything
  for axis, length in enumerate(bits.shape):
    position = position * jnp.uint32(length) + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)

  # The mix of MurmurHash3 (Appleby, public domain), with its multipliers and with those of xxHash (Collet).
  def mix(spread: int, first: int, second: int) -> jax.Array:
    mixed = (bits ^ (position * jnp.uint32(spread))) * jnp.uint32(first)
    mixed = (mixed ^ (mixed >> 13)) * jnp.uint32(second)
    return (mixed ^ (mixed >> 16)).sum(dtype=jnp.uint32)

  return jnp.stack([mix(0x9E3779B9, 0x85EBCA6B, 0xC2B2AE35), mix(0x27D4EB2F, 0x85EBCA77, 0xC2B2AE3D)])


def num_parameters(tree: Params) -> int:
  """Number of scalars in a tree (arrays or shapes)."""
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))
