"""Experiments that a configuration file describes: begun, and resumed wherever they were ended."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from cqd_jax.config.settings import ExperimentSettings
from cqd_jax.engines.text_interface import TextInterface
from cqd_jax.report.page import write_report
from cqd_jax.run.compile_cache import use_compile_cache
from cqd_jax.run.context import Method
from cqd_jax.run.files import (
  EXPERIMENT,
  RunFiles,
  begin_session,
  check_places,
  create_run,
  open_run,
  read_settings,
)
from cqd_jax.run.folders import open_folders
from cqd_jax.run.methods import methods_of
from cqd_jax.run.read_run import read_record
from cqd_jax.run.rehearsal import rehearse
from cqd_jax.run.stages import Result, explained, read_result, run_stages, show, stage
from cqd_jax.run.text_run import needs_sandbox, open_context, open_problem
from cqd_jax.sandbox.sandbox import SandboxUnavailable, probe
from cqd_jax.store.run_dir import RunDirError, is_disk_full, locked
from cqd_jax.tasks.problem import Problem
from cqd_jax.tasks.text import TextProblem
from cqd_jax.terminal.interrupt import interruptible


def run_experiment(settings: ExperimentSettings, console: Console) -> Result:
  """Trains or loads the experts, searches with every method, scores on test, and writes a new run directory.

  Raises:
    SandboxUnavailable: where nothing isolates answers and `settings.unsafe` is not set.
    ValueError: naming the setting that cannot be used, or the run directory that exists.
    Stopped: if somebody asked for it; the message says how to go on.
  """
  with open_problem(settings) as (problem, interface):
    check_places(settings)
    open_folders(settings)  # what is wrong with them, or the methods, is said before there is a run directory
    rehearse(settings, interface, len(problem.task_names))
    methods = methods_of(settings)
    check_isolation(settings, problem)
    use_compile_cache(settings.cache_dir)
    files = create_run(settings)
    with discarded_if_empty(files), locked(files.path), explained(files.path, f"cqd resume {files.path}"):
      return _run(files, settings, problem, interface, methods, console)


@contextlib.contextmanager
def discarded_if_empty(files: RunFiles) -> Iterator[None]:
  """A new run that ends with a mistake before anything was scored, as a damaged expert, leaves nothing behind."""
  try:
    yield
  except ValueError as error:
    if not files.history.exists() and not is_disk_full(error):
      shutil.rmtree(files.path, ignore_errors=True)
    raise


def resume_experiment(run_dir: Path, console: Console) -> Result:
  """Goes on with a run, wherever it was ended; a finished one is only shown again.

  Raises:
    ValueError: naming the run directory, where it is none, is in use, or its settings or tasks were changed.
    Stopped, SandboxUnavailable: as `run_experiment`.
  """
  files = open_run(run_dir)
  kind = files.read_facts()["kind"]
  if kind != EXPERIMENT:
    raise RunDirError(f"{run_dir}: is a {kind}; go on with it by the command that began it")
  settings = read_settings(files)
  with locked(run_dir), explained(run_dir, f"cqd resume {run_dir}"):
    if files.finished:
      console.print(f"{run_dir}: is finished", highlight=False)
      return show_again(files, title_of(settings), console)
    with open_problem(settings) as (problem, interface):
      check_isolation(settings, problem)
      use_compile_cache(settings.cache_dir)
      begin_session(files)
      return _run(files, settings, problem, interface, methods_of(settings), console)


def show_again(files: RunFiles, title: str, console: Console) -> Result:
  """Prints the table of a finished run, and writes its report if the session that finished it could not."""
  result = read_result(files)
  write_report(read_record(files), files.report)
  show(result, files, console, title)
  return result


def check_isolation(settings: ExperimentSettings, problem: Problem) -> None:
  """Raises SandboxUnavailable where answers have to be executed in the sandbox and could not be."""
  executed = isinstance(problem, TextProblem) and needs_sandbox(problem.episodes)
  if executed and not settings.unsafe and (reason := probe()) is not None:
    raise SandboxUnavailable(f"{reason} (To execute answers WITHOUT isolation: --unsafe.)")


def title_of(settings: ExperimentSettings) -> str:
  """Above the table."""
  return f"Share of {settings.tasks.test} test questions per task answered right, every answer really executed"


def _run(
  files: RunFiles,
  settings: ExperimentSettings,
  problem: TextProblem,
  interface: TextInterface,
  methods: tuple[Method, ...],
  console: Console,
) -> Result:
  def announce(text: str) -> None:
    console.print(f"cqd: {text}", highlight=False)

  with contextlib.ExitStack() as stack:
    interrupt = stack.enter_context(interruptible(announce))
    with stage(files, "train"):
      context = stack.enter_context(open_context(files, settings, problem, interface, console, interrupt))
    result = run_stages(context, methods, facts_of(settings))
  show(result, files, console, title_of(settings))
  return result


def facts_of(settings: ExperimentSettings) -> dict[str, str]:
  """Short lines for the report."""
  evolution = settings.evolution
  operators = [
    f"{name} {plug}"
    for name, plug in (("crossover", evolution.crossover), ("mutation", evolution.mutation))
    if plug is not None
  ]
  genotype = evolution.genotype
  return {
    "seed": str(settings.seed),
    "search": ", ".join(
      [
        f"{evolution.children} children in batches of {evolution.batch_size}",
        f"schedule {evolution.schedule}",
        f"selection {evolution.selection}",
        *operators,
      ]
    ),
    "genotype": ", ".join([genotype.use, *(f"{name} {value}" for name, value in genotype.settings.items())]),
    "scored on": f"{settings.tasks.validation} validation questions per task; the table: {settings.tasks.test} test "
    "questions per task",
  }
