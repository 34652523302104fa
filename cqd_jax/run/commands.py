"""What `cqd train`, `evaluate`, `aggregate`, `report` and `plot` do; `experiment.py` has evolve and resume."""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cqd_jax.config.settings import ConfigError, ExperimentSettings, MeshSettings
from cqd_jax.hub.load import load_pretrained
from cqd_jax.report.archive_plot import save_figure
from cqd_jax.report.figures import all_figures
from cqd_jax.report.page import write_report
from cqd_jax.run.artifacts import write_aggregate
from cqd_jax.run.compile_cache import use_compile_cache
from cqd_jax.run.context import RunContext
from cqd_jax.run.experiment import check_isolation
from cqd_jax.run.files import EXPERIMENT, RunFiles, open_run, read_settings
from cqd_jax.run.loop import Loop, Searched
from cqd_jax.run.methods import methods_of
from cqd_jax.run.miniature import load_or_train, whole_models
from cqd_jax.run.read_run import read_record
from cqd_jax.run.text_run import open_context, open_problem
from cqd_jax.store.checksums import verify
from cqd_jax.store.run_dir import RunDirError, locked
from cqd_jax.tasks.problem import task_scores
from cqd_jax.tasks.task import Split
from cqd_jax.terminal.interrupt import Interrupt, interruptible
from cqd_jax.terminal.progress import progress
from cqd_jax.types import Params


def train(settings: ExperimentSettings, console: Console) -> None:
  """Trains the base and the experts into the cache, and shows how they score on validation."""
  with open_problem(settings) as (problem, interface), interruptible(console.print) as interrupt:
    if settings.base is not None:
      raise ConfigError(f"base: nothing to train, the models are those of {settings.base}")
    check_isolation(settings, problem)
    use_compile_cache(settings.cache_dir)
    base, experts = load_or_train(settings, problem, interface, console, interrupt)
    names = list(problem.task_names)
    models = jax.tree.map(lambda *leaves: jnp.stack(leaves), base, *experts.values())
    scores = task_scores(problem.score("validation", models, whole_models(models)).values)
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
  with open_problem(settings) as (problem, interface):
    check_isolation(settings, problem)
    use_compile_cache(settings.cache_dir)
    verify(folder)
    read = load_pretrained(folder)
    if read.config != interface.config:
      raise RunDirError(f"{folder}: is a model of another shape than those of {run_dir}")
    population = _as_population_of_one(read.params)
    with progress(console, f"scoring {folder.name}", 1) as advance:
      scores = task_scores(problem.score(split, population, whole_models(population)).values)
      advance()
  console.print(_score_table(f"Share of {split} questions answered right", [folder.name], problem.task_names, scores))
  return dict(zip(problem.task_names, scores[0].tolist(), strict=True))


def aggregate(run_dir: Path, out: Path | None, console: Console) -> Path:
  """Makes one model of the archives' best elites, of the newest checkpoint of a run, finished or not.

  Raises:
    ValueError: naming the run directory, or the folder if it exists.
  """
  files = open_run(run_dir)
  with locked(run_dir), restored(files, console) as (context, searched):
    # A run that goes on will have an aggregate of its own at its end.
    name = "aggregate" if files.finished else f"aggregate-after-{searched.evaluations}-children"
    folder = out or files.models / name
    if folder.exists():
      raise RunDirError(f"{folder}: already exists; nothing was overwritten (another place: --out FOLDER)")
    write_aggregate(context, searched, folder)
  console.print(f"aggregate of the best elites after {searched.evaluations} children: {folder}", highlight=False)
  return folder


@contextlib.contextmanager
def restored(files: RunFiles, console: Console) -> Iterator[tuple[RunContext, Searched]]:
  """A run's first method as its newest checkpoint has it; no answer is executed and no mesh needed.

  Raises:
    ValueError: naming the run directory that has no checkpoint, or is of another kind.
  """
  kind = files.read_facts()["kind"]
  if kind != EXPERIMENT:
    raise RunDirError(f"{files.path}: is a {kind}; its models are in {files.models}")
  if not files.history.is_file():  # it would be made
    raise RunDirError(f"{files.history}: no such history")
  settings = dataclasses.replace(read_settings(files), mesh=MeshSettings())
  with (
    open_problem(settings) as (problem, interface),
    open_context(files, settings, problem, interface, console, Interrupt()) as context,
  ):
    yield context, Loop(context, methods_of(settings)[0]).restore()


def _as_population_of_one(params: Params) -> Params:
  """A model with a leading axis; each leaf of `params` is let go of as soon as it is copied."""

  def move(leaf: jax.Array) -> jax.Array:
    moved = jax.block_until_ready(leaf[None])
    leaf.delete()
    return moved

  return jax.tree.map(move, params)


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
    table.add_column(escape(name), justify="right")
  for model, row in zip(models, scores, strict=True):
    table.add_row(escape(model), *(f"{value:.3f}" for value in (*row, row.mean(), row.min())))
  return table
