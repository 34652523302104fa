"""`cqd check`: reads every file of a run directory as commands would, and says what can be made again."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from cqd_jax.run.files import EXPERIMENT, RunFiles, again, open_run, read_settings
from cqd_jax.run.read_run import read_record
from cqd_jax.store.checkpoints import Checkpoints
from cqd_jax.store.checksums import verify
from cqd_jax.store.history import History
from cqd_jax.store.run_dir import RunDirError, read_json
from cqd_jax.terminal.progress import progress

SOUND, UNKNOWN = "sound", "readable; no checksum was kept"


def check(run_dir: Path, console: Console) -> None:
  """Checks every file of a run directory and prints what it found; nothing is written.

  Raises:
    RunDirError: naming the files that are damaged.
  """
  files = open_run(run_dir)
  parts = list(_parts(files))
  shown = Table(title=f"Files of {run_dir}")
  for column in ("file", "what it is"):
    shown.add_column(column, overflow="fold")
  damaged = []
  with progress(console, "checking", len(parts)) as advance:
    for path, action, remedy in parts:
      try:
        found = action()
      except (ValueError, OSError) as error:
        damaged.append(path)
        found = f"DAMAGED: {error}" if remedy in str(error) else f"DAMAGED: {error}; {remedy}"
      shown.add_row(str(path.relative_to(files.path)), found)
      advance(note=path.name)
  console.print(shown, markup=False)
  if damaged:
    raise RunDirError(f"{run_dir}: damaged: {', '.join(str(path.relative_to(files.path)) for path in damaged)}")


def _parts(files: RunFiles) -> Iterator[tuple[Path, Callable[[], str], str]]:
  """Each file with what reads it and what to do where that fails."""
  resume = f"cqd resume {files.path}"
  yield files.facts, lambda: _read(files.read_facts), "nothing else has what it says: begin another run"
  if files.read_facts()["kind"] == EXPERIMENT:
    remedy = f"delete it: the settings with which the run began are in {files.facts.name}"
    yield files.settings, lambda: _read(lambda: read_settings(files)), remedy
  if files.history.exists() or files.finished:
    remedy = f"move it elsewhere; {resume} makes the run again from its experts"
    yield files.history, lambda: _history(files.history), remedy
  for folder in sorted((files.path / "checkpoints").glob("*")):
    remedy = f"{resume} goes back to the one before, or begins the method again"
    yield folder, lambda folder=folder: _checkpoint(folder), remedy  # type: ignore[misc]
  if files.finished:
    yield files.scores, lambda: _read(lambda: read_record(files)), again(files)
  for folder in sorted(files.models.glob("[!.]*")):
    remedy = f"delete the folder, and {files.scores.name}; {resume} writes it again"
    yield folder, lambda folder=folder: _model(folder), remedy  # type: ignore[misc]


def _read(action: Callable[[], object]) -> str:
  action()
  return SOUND


def _history(path: Path) -> str:
  with History(path) as history:
    people = {method: history.individuals(method) for method in history.methods()}
    for method in people:
      history.metrics(method)
      history.cells(method)
  count = sum(map(len, people.values()))
  failed = sum(int(np.isnan(own.scores).any(axis=1).sum()) for own in people.values())
  return f"{SOUND}: {count} individuals of {len(people)} method{'s' * (len(people) != 1)}" + (
    f", {failed} failed" if failed else ""
  )


def _checkpoint(folder: Path) -> str:
  with Checkpoints(folder) as checkpoints:
    steps = checkpoints.steps()
    for step in steps:
      checkpoints.verify(step)
  return f"{SOUND}: {len(steps)} of batch {', '.join(map(str, steps)) or 'none'}"


def _model(folder: Path) -> str:
  about = folder / "model.json"
  if about.is_file():
    read_json(about)
  return SOUND if verify(folder) else UNKNOWN
