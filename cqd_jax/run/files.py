"""The files of a run directory: what each is called, what `run.json` says, and whether a run may go on."""

import dataclasses
import datetime
import errno
import json
import os
import platform
import shutil
import warnings
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from cqd_jax.config.settings import (
  ConfigError,
  ExperimentSettings,
  changed_settings,
  dump_settings,
  load_settings,
  parse_settings,
  settings_as_json,
)
from cqd_jax.run.schema import FORMAT, Facts, Scores, read_as
from cqd_jax.store.run_dir import RunDirError, write_json, write_text
from cqd_jax.tasks.problem import changed_parts

EXPERIMENT, SCRIPT = "experiment", "run of a script"
"""Kinds of runs: what `cqd resume` goes on with, and what the script that began it does."""
PACKAGES = ("cqd_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "qdax", "numpy")


@dataclasses.dataclass(frozen=True)
class RunFiles:
  """A run directory.

  Attributes:
    path: of the directory.
  """

  path: Path

  @property
  def settings(self) -> Path:
    """All settings as YAML."""
    return self.path / "config.yaml"

  @property
  def facts(self) -> Path:
    """Settings as the run began, versions and devices of each session, seconds of each stage."""
    return self.path / "run.json"

  @property
  def history(self) -> Path:
    """SQLite."""
    return self.path / "history.sqlite"

  @property
  def models(self) -> Path:
    """Model folders."""
    return self.path / "models"

  @property
  def scores(self) -> Path:
    """The results; a run that has them is finished."""
    return self.path / "scores.json"

  @property
  def report(self) -> Path:
    """The page to look at."""
    return self.path / "report.html"

  def read_facts(self) -> dict[str, Any]:
    """What `run.json` says; raises RunDirError naming the field that is damaged."""
    return dict(read_as(self.facts, Facts))

  def read_scores(self) -> dict[str, Any]:
    """What `scores.json` says; raises RunDirError naming the field that is damaged."""
    return dict(read_as(self.scores, Scores, again(self)))

  @property
  def finished(self) -> bool:
    """Whether all stages are done."""
    return self.scores.is_file()

  def check_models(self, fingerprints: Mapping[str, str]) -> None:
    """Notes what the models of a run are, when it begins; raises if a folder holds another model since.

    Raises:
      RunDirError: naming the folder.
    """
    facts = self.read_facts()
    known = facts.setdefault("models", dict(fingerprints))
    for folder, own in fingerprints.items():
      if known.get(folder) != own:
        raise RunDirError(f"{folder}: is not the model with which {self.path} began")
    write_json(self.facts, facts)

  def check_problem(self, fingerprints: Mapping[str, str]) -> None:
    """Notes what scores depend on, by split, when a run begins; raises if it is another since.

    Raises:
      RunDirError: naming the task, or what else changed.
    """
    facts = self.read_facts()
    known = facts.setdefault("problem", dict(fingerprints))
    for split, now in fingerprints.items():
      if changed := changed_parts(known.get(split, ""), now):
        raise RunDirError(
          f"{self.path}: {', '.join(changed)} changed since the run began ({split} split: questions, grader, or how "
          "answers are made); its scores would be of two kinds. Change it back, or begin another run"
        )
    write_json(self.facts, facts)

  def describe(self, **record: Any) -> None:
    """Notes what the report says of a run beside what the history has."""
    facts = self.read_facts()
    if facts.get("record") != (record := json.loads(json.dumps(record))):
      write_json(self.facts, {**facts, "record": record})

  def record_seconds(self, stage: str, seconds: float) -> None:
    """Adds to the seconds that a stage took."""
    facts = self.read_facts()
    facts["seconds"][stage] = facts["seconds"].get(stage, 0.0) + seconds
    write_json(self.facts, facts)


def check_place(path: Path, where: str) -> None:
  """Checks that a folder can be written, or made where it is not there.

  Raises:
    ConfigError: naming `where`.
  """
  for place in (path.absolute(), *path.absolute().parents):
    try:
      exists = place.exists()
    except OSError as error:
      raise ConfigError(f"{where}: {path} cannot be used ({error.strerror})") from error
    if exists:
      if not place.is_dir():
        raise ConfigError(f"{where}: expected a folder, got {path}: {place} is none")
      if not os.access(place, os.W_OK | os.X_OK):
        raise ConfigError(f"{where}: expected a folder that can be written, got {path}: {place} cannot be")
      return


def check_places(settings: ExperimentSettings) -> None:
  """Checks where an experiment is going to write; raises as `check_place`."""
  check_place(settings.cache_dir, "cache_dir")
  if settings.run_dir is None:
    check_place(settings.runs_dir, "runs_dir")
  else:
    check_place(settings.run_dir.parent, "run_dir")


def again(files: RunFiles) -> str:
  """How results are made again."""
  return f"delete it and make it again with: cqd resume {files.path}"


def create_run(settings: ExperimentSettings) -> RunFiles:
  """Makes the run directory of an experiment, that was not there before: `settings.run_dir`, or the next free name in
  `settings.runs_dir`. It appears with its settings, whole or not at all.

  Raises:
    RunDirError: if the directory that was asked for exists.
  """
  settings = dataclasses.replace(
    settings,
    cache_dir=settings.cache_dir.absolute(),
    base=settings.base and settings.base.absolute(),
    experts=tuple(folder.absolute() for folder in settings.experts),
  )
  named = dataclasses.replace(settings, run_dir=None)  # so that config.yaml can begin another run
  place = settings.run_dir or settings.runs_dir / f"{settings.name}-seed-{settings.seed}"
  return make_run_dir(
    place, EXPERIMENT, settings_as_json(named), dump_settings(named), numbered=settings.run_dir is None
  )


def make_run_dir(place: Path, kind: str, settings: Mapping[str, Any], text: str, *, numbered: bool = False) -> RunFiles:
  """Makes a run directory that was not there before, whole or not at all.

  Args:
    place: where.
    kind: what may go on with it.
    settings: with which it begins, in JSON's types.
    text: the same as YAML, for config.yaml.
    numbered: whether a number is put behind a name that is taken.

  Raises:
    RunDirError: if the directory exists.
  """
  begun = {
    "format": FORMAT,
    "kind": kind,
    "created": _now(),
    "settings": dict(settings),
    "sessions": [_session()],
    "seconds": {},
  }
  unfinished = place.parent / f".run.{os.getpid()}"
  unfinished.mkdir(parents=True)
  try:
    made = RunFiles(unfinished)
    write_text(made.settings, text)
    write_json(made.facts, begun)
    return RunFiles(_give_name(unfinished, place, numbered))
  finally:
    shutil.rmtree(unfinished, ignore_errors=True)


def open_run(path: Path) -> RunFiles:
  """A run directory that is there.

  Raises:
    RunDirError: naming the directory, if it is none, or of another format.
  """
  files = RunFiles(path)
  if not path.is_dir():
    raise RunDirError(f"{path}: no such run directory")
  if not files.facts.is_file():
    raise RunDirError(f"{path}: not a run directory (it has no {files.facts.name})")
  read_as(files.facts, Facts)
  return files


def read_settings(files: RunFiles) -> ExperimentSettings:
  """The settings of a run that is to go on.

  Raises:
    ConfigError: if config.yaml was changed since in what the results depend on, naming what.
  """
  begun = parse_settings(files.read_facts()["settings"], str(files.facts))
  if not files.settings.is_file():
    warnings.warn(f"{files.settings}: is missing; the settings with which the run began are used", stacklevel=2)
    return begun
  now = load_settings(files.settings)
  if now.mesh != begun.mesh:
    warnings.warn(
      f"{files.settings}: the mesh was {begun.mesh.population} x {begun.mesh.model} and is {now.mesh.population} x "
      f"{now.mesh.model}; results may differ by rounding",
      stacklevel=2,
    )
  if changed := changed_settings(begun, now):
    listed = ", ".join(f"{name} is {value!r} and was {before!r}" for name, (before, value) in changed.items())
    raise ConfigError(
      f"{files.settings}: changed since the run began: {listed}. Change it back to go on with this run, or begin "
      f"another: cqd evolve {files.settings}"
    )
  return now


def begin_session(files: RunFiles) -> None:
  """Notes a further session of a run; warns where versions or devices differ from the one before."""
  facts = files.read_facts()
  now, before = _session(), facts["sessions"][-1]
  for what in ("versions", "devices"):
    if before[what] != now[what]:
      warnings.warn(
        f"{files.path}: {what} were {before[what]} and are {now[what]}; results may differ by rounding", stacklevel=2
      )
  facts["sessions"].append(now)
  write_json(files.facts, facts)


def _give_name(unfinished: Path, place: Path, numbered: bool) -> Path:
  """Renames a directory to a name that is free; what is there is never replaced."""
  if not numbered:
    if place.exists():
      raise RunDirError(f"{place}: already exists; nothing was overwritten (to go on with a run: cqd resume RUN_DIR)")
    unfinished.rename(place)
    return place
  for number in range(1, 10_000):
    path = place if number == 1 else place.with_name(f"{place.name}-{number}")
    if path.exists():
      continue
    try:
      unfinished.rename(path)
    except OSError as error:  # another process was faster
      if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
        raise
      continue
    return path
  raise RunDirError(f"{place.parent}: already holds 9,999 runs named {place.name}")


def _session() -> dict[str, Any]:
  return {
    "began": _now(),
    "versions": {"python": platform.python_version(), **{name: metadata.version(name) for name in PACKAGES}},
    "devices": [f"{device.platform} {device.device_kind}" for device in jax.devices()],
  }


def _now() -> str:
  return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
