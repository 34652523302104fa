"""A run from its first stage to its report; each stage finds what an earlier session has done, so a run can be resumed.

Train, evolve, compare, test, write: trained models are kept in the cache and in the run, scores in the history,
evolution in checkpoints, and `scores.json` is written when everything else is there.
"""

import contextlib
import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path

import jax
from rich.console import Console

from cqd_jax.config.settings import ExperimentSettings
from cqd_jax.genotypes.placement import place_basis
from cqd_jax.hub.load import load_pretrained
from cqd_jax.report.archive_plot import plot_archives, save_figure
from cqd_jax.report.page import write_report
from cqd_jax.run.artifacts import (
  identity_of_best,
  sample_answers,
  write_model,
  write_models,
)
from cqd_jax.run.compare import plain_methods, searched_methods
from cqd_jax.run.context import RunContext, Suite, open_suite
from cqd_jax.run.files import EXPERIMENT, RunFiles, begin_session, create_run, open_run, read_settings
from cqd_jax.run.folders import Folders, core_experts, dense_experts, load_base, open_folders
from cqd_jax.run.loop import BASIS, Evolution, Evolved, aggregated, best_elite, mesh_of
from cqd_jax.run.miniature import load_or_train, stack_task_vectors
from cqd_jax.run.read_run import read_record
from cqd_jax.run.space import MergeSpace, keep_basis
from cqd_jax.run.table import Row, make_table, markdown_table, score_on_test
from cqd_jax.store.checkpoints import Checkpoints
from cqd_jax.store.history import History
from cqd_jax.store.run_dir import RunDirError, is_disk_full, locked, read_json, write_json, write_text
from cqd_jax.terminal.interrupt import Interrupt, Stopped, interruptible
from cqd_jax.types import PRNGKey


@dataclasses.dataclass(frozen=True)
class Result:
  """What a run gives.

  Attributes:
    run_dir: the run directory.
    rows: every method on the test split.
    throughput: candidates and answers a second in the last session, by stage, and the share of evolution's time that
      went into recording it.
    seconds: by stage, all sessions together.
  """

  run_dir: Path
  rows: list[Row]
  throughput: dict[str, float]
  seconds: dict[str, float]


def run_experiment(settings: ExperimentSettings, console: Console) -> Result:
  """Trains or loads the experts, evolves, compares, scores on test, and writes a new run directory.

  Raises:
    SandboxUnavailable: where nothing isolates answers and `settings.unsafe` is not set.
    ValueError: naming the setting that cannot be used, or the run directory that exists.
    Stopped: if somebody asked for it; the message says how to go on.
  """
  with open_suite(settings) as suite:
    open_folders(settings)  # what is wrong with them, or the mesh, is told before there is a run directory
    mesh_of(settings.mesh)
    files = create_run(settings)
    with locked(files.path), explained(files.path, f"cqd resume {files.path}"):
      return _run(files, settings, suite, console)


def resume_experiment(run_dir: Path, console: Console) -> Result:
  """Goes on with a run, wherever it was ended; a finished one is only shown again.

  Raises:
    ValueError: naming the run directory, where it is none, is in use, or its settings were changed.
    Stopped, SandboxUnavailable: as `run_experiment`.
  """
  files = open_run(run_dir)
  kind = read_json(files.facts)["kind"]
  if kind != EXPERIMENT:
    raise RunDirError(f"{run_dir}: is a {kind}; go on with it by the command that began it")
  settings = read_settings(files)
  with locked(run_dir), explained(run_dir, f"cqd resume {run_dir}"):
    if files.finished:
      console.print(f"{run_dir}: is finished", highlight=False)
      result = _read_result(files)
      _write_report(files)  # the session that finished it may have been killed before
      _show(result, settings, list(result.rows[0].scores), console)
      return result
    with open_suite(settings) as suite:
      begin_session(files)
      return _run(files, settings, suite, console)


@contextlib.contextmanager
def open_lab(
  files: RunFiles, settings: ExperimentSettings, suite: Suite, console: Console, interrupt: Interrupt
) -> Iterator[RunContext]:
  """Models and history of a run."""
  names = [task.name for task in suite.tasks]
  folders = open_folders(settings)
  if folders is None:
    merges = _trained(files, settings, suite, console, interrupt)
  else:
    files.check_models(folders.fingerprints())
    merges = _from_folders(files, settings, folders, console)
  with History(files.history, names) as history:
    yield RunContext(settings, console, merges, suite, history, interrupt)


def _trained(
  files: RunFiles, settings: ExperimentSettings, suite: Suite, console: Console, interrupt: Interrupt
) -> MergeSpace:
  """The miniature base and its experts. They are the run's own, in `models`, from the first session on."""
  names = [task.name for task in suite.tasks]
  places = {"base": files.models / "base", **{name: files.models / f"expert-{name}" for name in names}}
  if not all(place.is_dir() for place in places.values()):
    base, experts = load_or_train(settings, suite, run_keys(settings).train, console, interrupt)
    for name, place in places.items():
      if not place.is_dir():
        about = {"kind": "base"} if name == "base" else {"kind": "expert", "task": name, "identity": names.index(name)}
        write_model(suite.language, place, base if name == "base" else experts[name], about)
  base = load_pretrained(places["base"]).params
  return MergeSpace(base, stack_task_vectors(base, {name: load_pretrained(places[name]).params for name in names}))


def _from_folders(files: RunFiles, settings: ExperimentSettings, folders: Folders, console: Console) -> MergeSpace:
  """Base and experts of Hugging Face. In core space nothing dense is made of the experts, also not for plain merges."""
  mesh, evolution = mesh_of(settings.mesh), settings.evolution
  base = load_base(folders, mesh, console)
  if evolution.genotype == "dense":
    return MergeSpace(base, dense_experts(folders, base, console))
  rank = evolution.rank or None
  basis = keep_basis(files.path / BASIS, base, lambda: core_experts(folders, base, rank, console))
  basis = basis if mesh is None else place_basis(basis, mesh)
  return MergeSpace(basis.base, basis.experts, basis, evolution.share_base)


@dataclasses.dataclass(frozen=True)
class RunKeys:
  """The keys of a run, one for each stage that draws."""

  train: PRNGKey
  evolve: PRNGKey
  search: PRNGKey


def run_keys(settings: ExperimentSettings) -> RunKeys:
  """The keys that follow from the seed."""
  return RunKeys(*jax.random.split(jax.random.key(settings.seed), 3))


@contextlib.contextmanager
def stage(files: RunFiles, name: str) -> Iterator[None]:
  """Times a block and notes its seconds, also where it is ended."""
  started = time.perf_counter()
  try:
    yield
  finally:
    files.record_seconds(name, time.perf_counter() - started)


@contextlib.contextmanager
def explained(run_dir: Path, resume: str) -> Iterator[None]:
  """Says how to go on, with the command `resume`, where a run is stopped or its disk is full."""
  advice = f"nothing scored is lost; go on with: {resume}"
  try:
    yield
  except Stopped as stopped:
    raise Stopped(f"stopped; {advice}") from stopped
  except Exception as error:
    if is_disk_full(error):
      raise RunDirError(f"{run_dir}: no space left on its disk; free some, {advice}") from error
    raise


def _run(files: RunFiles, settings: ExperimentSettings, suite: Suite, console: Console) -> Result:
  def announce(text: str) -> None:
    console.print(f"cqd: {text}", highlight=False)

  with contextlib.ExitStack() as stack:
    interrupt = stack.enter_context(interruptible(announce))
    with stage(files, "train"):
      lab = stack.enter_context(open_lab(files, settings, suite, console, interrupt))
    keys = run_keys(settings)
    started = time.perf_counter()
    with stage(files, "evolve"):
      evolved = Evolution(lab, files.path, keys.evolve).run()
    throughput = {
      "candidates_per_s_evolving": lab.clock.candidates / (time.perf_counter() - started),
      "recording_share_of_evolving": lab.clock.record_s / (time.perf_counter() - started),
    }
    save_figure(
      plot_archives(evolved.repertoire, lab.task_names, experts=evolved.expert_scores), files.path / "archives.png"
    )
    _write_report(files)  # the archives can be looked at while the rest is computed
    with stage(files, "compare"):
      methods = [*plain_methods(lab), *searched_methods(lab, keys.search), best_elite(evolved), aggregated(evolved)]
    with stage(files, "test"):
      rows = score_on_test(lab, methods)
    with stage(files, "write"):
      write_models(lab, evolved, files.models)
    if lab.clock.candidates:
      throughput["candidates_per_s_decoding"] = lab.clock.candidates / lab.clock.decode_s
      throughput["answers_per_s_grading"] = lab.clock.answers / lab.clock.grade_s
    result = _finish(files, lab, evolved, rows, throughput)
  _show(result, settings, lab.task_names, console)
  return result


def _finish(
  files: RunFiles, lab: RunContext, evolved: Evolved, rows: list[Row], throughput: dict[str, float]
) -> Result:
  """Writes the results; from then on the run is finished."""
  settings, names = lab.settings, lab.task_names
  repertoire = evolved.repertoire
  samples = sample_answers(lab, best_elite(evolved).model, settings.output.samples)
  seconds = read_json(files.facts)["seconds"]
  write_text(files.path / "table.md", markdown_table(rows, names, settings.swarm_sizes))
  with Checkpoints(files.path / "checkpoints") as checkpoints:
    checkpoints.prune(keep=1)
  write_json(  # last but the report, which resuming would write again
    files.scores,
    {
      "tasks": names,
      "seed": settings.seed,
      "test": [dataclasses.asdict(row) for row in rows],
      "best": identity_of_best(repertoire),
      "aggregated": [identity_of_best(repertoire, archive) for archive in range(len(names))],
      "samples": [dataclasses.asdict(sample) for sample in samples],
      "expert_scores_on_validation": evolved.expert_scores.tolist(),
      "throughput": throughput,
      "seconds": seconds,
    },
  )
  _write_report(files)
  return Result(files.path, rows, throughput, seconds)


def _read_result(files: RunFiles) -> Result:
  content = read_json(files.scores)
  try:
    rows = [
      Row(**{**row, "solved": {int(size): share for size, share in row["solved"].items()}}) for row in content["test"]
    ]
    return Result(files.path, rows, content["throughput"], content["seconds"])
  except (KeyError, TypeError, AttributeError) as error:
    raise RunDirError(f"{files.scores}: damaged; deleted, it is made anew by: cqd resume {files.path}") from error


def _write_report(files: RunFiles) -> None:
  write_report(read_record(files), files.report)


def _show(result: Result, settings: ExperimentSettings, task_names: list[str], console: Console) -> None:
  title = f"Share of {settings.tasks.test} test questions a task answered right, every answer really executed"
  console.print(make_table(result.rows, task_names, settings.swarm_sizes, title))
  stages = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in result.seconds.items())
  console.print(f"{stages}; {sum(result.seconds.values()):.0f} s in all", highlight=False)
  console.print(
    f"any {'/'.join(map(str, settings.swarm_sizes))}: share that at least one of so many members solves, chosen on "
    "validation; scored: candidates scored on validation",
    highlight=False,
  )
  console.print(f"Report: {result.run_dir / 'report.html'} (open it in a browser)", highlight=False)
