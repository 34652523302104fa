"""The models of a run: Hugging Face folders, with a JSON file that tells what each is and where it comes from."""

from pathlib import Path
from typing import Any

from cqd_jax.io.hf import load_pretrained
from cqd_jax.io.hf_write import ABOUT
from cqd_jax.io.run_dir import RunDirError, read_json
from cqd_jax.types import Params


def read_about(folder: Path) -> dict[str, Any]:
  """What a model of a run is.

  Raises:
    RunDirError: naming the folder, if it is no model of a run.
  """
  if not (folder / ABOUT).is_file():
    raise RunDirError(f"{folder}: not a model of a run (it has no {ABOUT})")
  about = read_json(folder / ABOUT)
  if not isinstance(about, dict):
    raise RunDirError(f"{folder / ABOUT}: expected what the model is by name, got {type(about).__name__}")
  return about


def load_model(folder: Path) -> tuple[Params, dict[str, Any]]:
  """The params of a model of a run, and what it is.

  Raises:
    ValueError: naming the folder or the file: no model of a run, or damaged.
  """
  about = read_about(folder)
  return load_pretrained(folder).params, about
