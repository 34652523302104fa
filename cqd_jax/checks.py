"""Checks of arguments that can be made before tracing; each raises a `ValueError` naming the argument."""

from typing import Any

import jax
import jax.numpy as jnp

from cqd_jax.types import Params, PRNGKey


def check_key(key: PRNGKey, name: str = "key") -> None:
  """Raises unless `key` is one PRNG key: a typed one (`jax.random.key`), or a raw one of the older `PRNGKey`."""
  if not isinstance(key, jax.Array):
    raise ValueError(f"{name}: expected a key from jax.random.key, got {_describe(key)}")
  if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
    if key.shape != ():
      raise ValueError(f"{name}: expected one key, got an array of keys of shape {key.shape}")
  elif key.dtype != jnp.uint32 or key.ndim != 1:
    raise ValueError(f"{name}: expected a key from jax.random.key, got {_describe(key)}")


def check_float_leaves(tree: Params, name: str) -> None:
  """Raises unless `tree` has leaves and all of them are floating-point arrays."""
  leaves = jax.tree.leaves_with_path(tree)
  if not leaves:
    raise ValueError(f"{name}: expected a pytree of arrays, got one without leaves")
  for path, leaf in leaves:
    if not hasattr(leaf, "dtype") or not jnp.issubdtype(leaf.dtype, jnp.floating):
      raise ValueError(f"{name}{jax.tree_util.keystr(path)}: expected floats, got {_describe(leaf)}")


def check_same_tree(first: Params, second: Params, first_name: str, second_name: str) -> None:
  """Raises unless both trees have the same structure, shapes and dtypes; names the first difference."""
  ours = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(first)}
  theirs = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(second)}
  for path in ours.keys() - theirs.keys():
    raise ValueError(f"{second_name}: misses {path}, which {first_name} has")
  for path in theirs.keys() - ours.keys():
    raise ValueError(f"{second_name}: has {path}, which {first_name} has not")
  for path, leaf in ours.items():
    if leaf.shape != theirs[path].shape or leaf.dtype != theirs[path].dtype:
      raise ValueError(
        f"{second_name}{path}: expected {_describe(leaf)} as in {first_name}, got {_describe(theirs[path])}"
      )
  if not same_structure(first, second):
    raise ValueError(f"{second_name}: its containers differ from those of {first_name}")


def same_structure(first: Params, second: Params) -> bool:
  """Whether two pytrees differ in nothing but their leaves."""
  structure: Any = jax.tree.structure(first)
  return bool(structure == jax.tree.structure(second))


def check_population(tree: Params, name: str, size: int | None = None) -> int:
  """Returns the common length of the leaves' leading axis; raises where they differ (or differ from `size`)."""
  leaves = jax.tree.leaves_with_path(tree)
  if not leaves:
    raise ValueError(f"{name}: expected a pytree of arrays, got one without leaves")
  for path, leaf in leaves:
    if leaf.ndim == 0:
      raise ValueError(f"{name}{jax.tree_util.keystr(path)}: expected a leading population axis, got a scalar")
    if size is None:
      size = leaf.shape[0]
    if leaf.shape[0] != size:
      raise ValueError(
        f"{name}{jax.tree_util.keystr(path)}: expected {size} individuals on the leading axis, got shape {leaf.shape}"
      )
  assert size is not None
  return size


def _describe(value: Any) -> str:
  if hasattr(value, "dtype") and hasattr(value, "shape"):
    return f"{value.dtype}[{', '.join(map(str, value.shape))}]"
  return type(value).__name__
