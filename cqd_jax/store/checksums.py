"""Checksums of a model folder's weights: kept beside them when they are written, compared before they are used."""

import hashlib
from pathlib import Path

from cqd_jax.store.run_dir import RunDirError, read_json, write_json

FILE = "checksums.json"
PATTERN = "*.safetensors"


def seal(folder: Path) -> None:
  """Keeps the SHA-256 of each file of weights in a folder, in `checksums.json`."""
  write_json(folder / FILE, {path.name: _digest(path) for path in sorted(folder.glob(PATTERN))})


def verify(folder: Path) -> bool:
  """Whether a folder's weights are those that were written; False where nothing was kept to compare with.

  Raises:
    RunDirError: naming the file that is missing or was changed since.
  """
  if not (folder / FILE).is_file():
    return False
  known = read_json(folder / FILE)
  if not isinstance(known, dict) or not all(isinstance(value, str) for value in known.values()):
    raise RunDirError(f"{folder / FILE}: damaged, expected a checksum by file")
  for name, digest in known.items():
    path = folder / Path(name).name
    if not path.is_file():
      raise RunDirError(f"{path}: is missing")
    if _digest(path) != digest:
      raise RunDirError(f"{path}: changed since it was written; it is not the model that was scored")
  return True


def _digest(path: Path) -> str:
  with path.open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()
