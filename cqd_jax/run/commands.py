"""What `cqd train`, `evaluate`, `aggregate`, `report` and `plot` do; `run.py` has evolve and resume."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from cqd_jax.config.settings import ConfigError, ExperimentSettings, MeshSettings
from cqd_jax.hub.load import load_pretrained
from cqd_jax.report.archive_plot import save_figure
from cqd_jax.report.figures import all_figures
from cqd_jax.report.page import write_report
from cqd_jax.run.artifacts import write_aggregate
from cqd_jax.run.context import open_suite
from cqd_jax.run.experiment import open_lab, run_keys
from cqd_jax.run.files import RunFiles, open_run, read_settings
from cqd_jax.run.loop import Evolution
from cqd_jax.run.miniature import load_or_train
from cqd_jax.run.read_run import read_record
from cqd_jax.store.run_dir import RunDirError, locked
from cqd_jax.tasks.task import Split
from cqd_jax.terminal.interrupt import Interrupt, interruptible
from cqd_jax.terminal.progress import progress


def train(settings: ExperimentSettings, console: Console) -> None:
  """Trains the base and the experts into the cache, and shows how they score on validation."""
  with open_suite(settings) as suite, interruptible(console.print) as interrupt:
    if settings.base is not None:
      raise ConfigError(f"base: nothing to train, the models are those of {settings.base}")
    base, experts = load_or_train(settings, suite, run_keys(settings).train, console, interrupt)
    names = suite.validation.task_names
    models = jax.tree.map(lambda *leaves: jnp.stack(leaves), base, *experts.values())
    scores = suite.validation(models).mean(axis=-1)
  title = f"Share of {settings.tasks.validation} validation questions answered right"
  console.print(_score_table(title, ["base", *(f"expert {name}" for name in names)], names, scores))


def evaluate(run_dir: Path, model: str, split: Split, console: Console) -> dict[str, float]:
  """Scores a model folder on one split of the run's questions, every answer really executed.

  Args:
    run_dir: whose tasks and settings are used.
    model: a name in RUN_DIR/models, as "best", "aggregate", "expert-os", "elite-000012"; or the path of a model folder.
    split: which questions.
    console: where the scores go.

  Returns:
    The scores by task.

  Raises:
    ValueError: naming the run directory or the model, with the models that there are.
  """
  files = open_run(run_dir)
  settings = read_settings(files)
  folder = files.models / model if (files.models / model).is_dir() else Path(model)
  if not folder.is_dir():
    raise RunDirError(f"model: no {model!r} in {files.models}, which has {_list_models(files)}")
  with open_suite(settings) as suite:
    model_read = load_pretrained(folder)
    if model_read.config != suite.language.config:
      raise RunDirError(f"{folder}: is a model of another shape than those of {run_dir}")
    evaluation = suite.test if split == "test" else suite.validation
    with progress(console, f"scoring {folder.name}", 1) as advance:
      scores = evaluation(jax.tree.map(lambda leaf: leaf[None], model_read.params)).mean(axis=-1)
      advance()
  console.print(
    _score_table(f"Share of {split} questions answered right", [folder.name], evaluation.task_names, scores)
  )
  return dict(zip(evaluation.task_names, scores[0].tolist(), strict=True))


def aggregate(run_dir: Path, out: Path | None, console: Console) -> Path:
  """Makes one model of the archives' best elites, of the newest checkpoint of a run, finished or not.

  Raises:
    ValueError: naming the run directory, or the folder if it exists.
  """
  files = open_run(run_dir)
  settings = dataclasses.replace(read_settings(files), mesh=MeshSettings())  # one device is enough for a sum
  with (
    locked(run_dir),
    open_suite(settings) as suite,
    open_lab(files, settings, suite, console, Interrupt()) as lab,
  ):
    evolved = Evolution(lab, files.path, run_keys(settings).evolve).restore()
    # A run that goes on will have an aggregate of its own at its end.
    name = "aggregate" if files.finished else f"aggregate-after-{evolved.evaluations}-children"
    folder = out or files.models / name
    if folder.exists():
      raise RunDirError(f"{folder}: already exists; nothing was overwritten (another place: --out FOLDER)")
    write_aggregate(lab, evolved, folder)
  console.print(f"aggregate of the best elites after {evolved.evaluations} children: {folder}", highlight=False)
  return folder


def report(run_dir: Path, out: Path | None, console: Console) -> Path:
  """Writes the report of a run, finished or not."""
  files = open_run(run_dir)
  path = out or files.report
  write_report(read_record(files), path)
  console.print(f"Report: {path} ({path.stat().st_size / 1e3:.0f} kB; open it in a browser)", highlight=False)
  return path


def plot(run_dir: Path, out: Path | None, formats: Sequence[str], console: Console) -> list[Path]:
  """Writes every picture of the report as files for a paper."""
  files = open_run(run_dir)
  folder = out or run_dir / "figures"
  figures = all_figures(read_record(files))
  paths = []
  with progress(console, "drawing", len(figures) * len(formats)) as advance:
    for name, figure in figures.items():
      for ending in formats:
        paths.append(folder / f"{name}.{ending}")
        save_figure(figure, paths[-1])
        advance(note=paths[-1].name)
  console.print(f"{len(paths)} figures in {folder}: {', '.join(path.name for path in paths)}", highlight=False)
  return paths


def _list_models(files: RunFiles) -> str:
  """The model folders of a run in words; the many elites by their first and last."""
  there = sorted(path.name for path in files.models.glob("[!.]*")) if files.models.is_dir() else []
  elites = [name for name in there if name.startswith("elite-")]
  if len(elites) > 2:
    there = [name for name in there if name not in elites] + [f"{elites[0]} to {elites[-1]} ({len(elites)} elites)"]
  return ", ".join(there) or f"none yet (cqd resume {files.path}, or cqd aggregate {files.path})"


def _score_table(title: str, models: Sequence[str], task_names: Sequence[str], scores: np.ndarray) -> Table:
  table = Table(title=title)
  table.add_column("model")
  for name in (*task_names, "mean", "min"):
    table.add_column(name, justify="right")
  for model, row in zip(models, scores, strict=True):
    table.add_row(model, *(f"{value:.3f}" for value in (*row, row.mean(), row.min())))
  return table
