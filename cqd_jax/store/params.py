"""Params on disk: one safetensors file a model, paths as keys, written so that a half-written file is never seen."""

import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from cqd_jax.trees import leaf_path
from cqd_jax.types import Params


def save_params(path: Path, params: Params) -> None:
  """Writes a nested dict of arrays; atomic: an existing file is replaced whole or not at all."""
  flat = {
    "/".join(leaf_path(key_path)): np.ascontiguousarray(leaf) for key_path, leaf in jax.tree.leaves_with_path(params)
  }
  path.parent.mkdir(parents=True, exist_ok=True)
  unfinished = path.with_name(f".{path.name}.{os.getpid()}")
  try:
    save_file(flat, unfinished)
    os.replace(unfinished, path)
  except SafetensorError as error:
    raise OSError(f"{path}: could not be written ({error})") from error
  finally:
    unfinished.unlink(missing_ok=True)


def load_params(path: Path) -> Params:
  """Reads what `save_params` wrote.

  Raises:
    FileNotFoundError: if there is no such file.
    ValueError: naming the file, if it is no whole safetensors file.
  """
  if not path.is_file():
    raise FileNotFoundError(f"{path}: no such params file")
  params: dict[str, Any] = {}
  try:
    with safe_open(path, framework="np") as file:
      for name in file.keys():  # noqa: SIM118 (not a dict)
        *parents, last = name.split("/")
        branch = params
        for parent in parents:
          branch = branch.setdefault(parent, {})
        branch[last] = jnp.asarray(file.get_tensor(name))
  except SafetensorError as error:
    raise ValueError(f"{path}: not a whole safetensors file ({error})") from error
  return params
