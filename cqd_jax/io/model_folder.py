"""A model as a folder: its weights, and a JSON file that tells what it is and where it comes from."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cqd_jax.io.params import load_params, save_params
from cqd_jax.io.run_dir import RunDirError, read_json, write_json
from cqd_jax.types import Params

WEIGHTS, ABOUT = "params.safetensors", "model.json"


def save_model(folder: Path, params: Params, about: Mapping[str, Any]) -> None:
  """Writes a model folder; it appears whole or not at all.

  Args:
    folder: must not exist.
    params: nested dict of arrays.
    about: JSON: what the model is.

  Raises:
    RunDirError: if the folder exists.
  """
  if folder.exists():
    raise RunDirError(f"{folder}: already exists; nothing was overwritten")
  unfinished = folder.with_name(f".{folder.name}.{os.getpid()}")
  shutil.rmtree(unfinished, ignore_errors=True)
  try:
    save_params(unfinished / WEIGHTS, params)
    write_json(unfinished / ABOUT, about)
    unfinished.rename(folder)
  finally:
    shutil.rmtree(unfinished, ignore_errors=True)


def load_model(folder: Path) -> tuple[Params, dict[str, Any]]:
  """Reads what `save_model` wrote: params, and what the model is.

  Raises:
    RunDirError: naming the folder, if it is no model folder.
    ValueError: naming the file, if the weights are damaged.
  """
  if not (folder / ABOUT).is_file():
    raise RunDirError(f"{folder}: not a model folder (it has no {ABOUT})")
  about = read_json(folder / ABOUT)
  if not isinstance(about, dict):
    raise RunDirError(f"{folder / ABOUT}: expected what the model is by name, got {type(about).__name__}")
  return load_params(folder / WEIGHTS), about
