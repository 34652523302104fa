"""A run directory: one process at a time, and files that are written whole or not at all."""

import contextlib
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class RunDirError(ValueError):
  """A run directory that cannot be used; the message names it."""


def write_text(path: Path, text: str) -> None:
  """Writes a file; an existing one is replaced whole or not at all, also if the machine loses power."""
  unfinished = path.with_name(f".{path.name}.{os.getpid()}")
  try:
    with unfinished.open("w", encoding="utf-8") as file:
      file.write(text)
      file.flush()
      os.fsync(file.fileno())
    os.replace(unfinished, path)
  finally:
    unfinished.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
  """Writes JSON that a person can read, as `write_text` writes."""
  write_text(path, json.dumps(content, indent=2) + "\n")


def read_json(path: Path) -> Any:
  """Reads a JSON file.

  Raises:
    RunDirError: naming the file, if it is missing or no JSON.
  """
  try:
    return json.loads(path.read_text(encoding="utf-8"))
  except FileNotFoundError as error:
    raise RunDirError(f"{path}: no such file") from error
  except (ValueError, RecursionError) as error:
    raise RunDirError(f"{path}: not JSON ({error})") from error


@contextlib.contextmanager
def locked(run_dir: Path) -> Iterator[None]:
  """Holds the run directory for this process while the block runs; a killed process lets go of it by itself.

  Raises:
    RunDirError: if another process holds it, naming that.
  """
  path = run_dir / ".lock"
  descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
  try:
    try:
      fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      holder = os.read(descriptor, 32).decode(errors="replace").strip() or "unknown"
      raise RunDirError(f"{run_dir}: in use by process {holder}; nothing was changed") from None
    except OSError as error:  # some network disks have no locks
      raise RunDirError(f"{run_dir}: cannot be locked for this process ({error.strerror})") from error
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"{os.getpid()}\n".encode())
    _sweep(run_dir)
    yield
  finally:
    os.close(descriptor)


def _sweep(run_dir: Path) -> None:
  """Removes what killed processes left half written: `.NAME.PID`, here and one folder down."""
  for path in (*run_dir.glob(".*.*"), *run_dir.glob("*/.*.*")):
    if path.suffix[1:].isdigit():
      shutil.rmtree(path) if path.is_dir() else path.unlink()


def is_disk_full(error: BaseException | None) -> bool:
  """Whether an error, or what it came from, says that there is no space left; Orbax and SQLite have their own words."""
  while error is not None:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
      return True
    if any(words in str(error) for words in ("No space left on device", "disk is full", "Disk quota exceeded")):
      return True
    error = error.__cause__ or error.__context__
  return False
