"""Checkpoints of all that the next iteration depends on, by Orbax."""

from pathlib import Path
from typing import Any, TypeVar, cast

import jax
import orbax.checkpoint as ocp

from cqd_jax.trees import leaf_path

State = TypeVar("State")


def save_checkpoint(path: Path, state: Any) -> None:
  """Writes the arrays of a pytree (typed PRNG keys included) to a new folder, by their paths in the tree; atomic.

  Raises:
    ValueError: if the folder exists.
  """
  if path.exists():
    raise ValueError(f"{path}: already exists; a checkpoint is never overwritten")
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(path.absolute(), _by_path(state))


def load_checkpoint(path: Path, like: State) -> State:
  """Reads what `save_checkpoint` wrote into the structure, shapes and dtypes of `like`.

  Raises:
    FileNotFoundError: if there is no such folder.
    ValueError: naming the folder, if its content does not fit `like` or is damaged.
  """
  if not path.is_dir():
    raise FileNotFoundError(f"{path}: no such checkpoint")
  named = _by_path(like)
  target = jax.tree.map(ocp.utils.to_shape_dtype_struct, named)
  try:
    with ocp.StandardCheckpointer() as checkpointer:
      data = checkpointer.restore(path.absolute(), target)
  except Exception as error:  # Orbax and TensorStore raise many kinds; the user needs the folder's name
    raise ValueError(f"{path}: the checkpoint does not fit or is damaged ({error})") from error
  leaves, structure = jax.tree.flatten(like)
  restored = [_from_data(leaf, data[name]) for name, leaf in zip(named, leaves, strict=True)]
  return cast(State, jax.tree.unflatten(structure, restored))


def _by_path(state: Any) -> dict[str, Any]:
  """The leaves by name, in the tree's order: the file then outlives a change of the classes around them."""
  return {".".join(leaf_path(path)): _to_data(leaf) for path, leaf in jax.tree.leaves_with_path(state)}


def _is_key(leaf: Any) -> bool:
  return isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _to_data(leaf: Any) -> Any:
  return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def _from_data(like: Any, leaf: Any) -> Any:
  return jax.random.wrap_key_data(leaf, impl=jax.random.key_impl(like)) if _is_key(like) else leaf
