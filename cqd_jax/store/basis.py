"""A core space on disk. Genotypes mean nothing without it, and made again elsewhere it may be another."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cqd_jax.genotypes import CoreBasis
from cqd_jax.store.params import load_params, save_params
from cqd_jax.trees import Path as TreePath
from cqd_jax.trees import is_matrix, map_with_path
from cqd_jax.types import Params

PARTS = ("left", "right", "experts", "errors")


def save_basis(path: Path, basis: CoreBasis) -> None:
  """Writes all of a basis but the base model, as one safetensors file; atomic. Params are nested dicts."""
  named = {part: getattr(basis, part) for part in PARTS}
  structure: Any = jax.tree.structure(basis.base)
  each = [None if own is None else np.array(own, np.int32) for own in basis.ranks]
  save_params(path, {**named, "ranks": jax.tree.unflatten(structure, each)})


def load_basis(path: Path, base: Params) -> CoreBasis:
  """Reads what `save_basis` wrote, for the same base model.

  Raises:
    FileNotFoundError: if there is no such file.
    ValueError: naming the file, if it is no whole one, or of a base of another shape.
  """
  content = load_params(path)

  def of(part: str, tree_path: TreePath) -> Any:
    branch = content.get(part, {})
    for name in tree_path:
      branch = branch.get(name) if isinstance(branch, dict) else None
      if branch is None:
        raise ValueError(f"{path}: holds no {part} of {'/'.join(tree_path)}; it is of another base model")
    return branch

  def read(part: str, everywhere: bool) -> Params:
    return map_with_path(
      lambda tree_path, leaf: of(part, tree_path) if everywhere or is_matrix(tree_path, leaf) else None, base
    )

  structure: Any = jax.tree.structure(base)
  ranks = structure.flatten_up_to(read("ranks", everywhere=False))
  basis = CoreBasis(
    base=base,
    left=read("left", everywhere=False),
    right=read("right", everywhere=False),
    experts=read("experts", everywhere=True),
    errors=read("errors", everywhere=False),
    ranks=tuple(None if own is None else tuple(own.tolist()) for own in ranks),
  )
  try:
    jax.eval_shape(basis.materialize, jax.tree.map(lambda leaf: jnp.zeros(leaf.shape[1:]), basis.experts))
  except (TypeError, ValueError) as error:
    raise ValueError(f"{path}: is of another base model ({str(error).splitlines()[0]})") from error
  return basis
