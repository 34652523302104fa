"""One run of the skills experiment: `run_experiment(settings, console)` makes a run directory."""

import contextlib
import dataclasses
import os
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from cqd_jax.config import ExperimentSettings, dump_settings
from cqd_jax.experiment.comparison import plain_methods, searched_methods
from cqd_jax.experiment.evolution import Evolved, aggregated, best_elite, evolve
from cqd_jax.experiment.lab import Lab
from cqd_jax.experiment.models import load_or_train
from cqd_jax.experiment.results import Row, make_table, markdown_table, score_on_test, write_json
from cqd_jax.io.checkpoint import save_checkpoint
from cqd_jax.io.plots import plot_archives, save_figure
from cqd_jax.io.sandbox import Sandbox
from cqd_jax.tasks.evaluation import Evaluation
from cqd_jax.tasks.skills import skills
from cqd_jax.tasks.skills.training import MINIATURE, prompt_tokens
from cqd_jax.tasks.skills.vocabulary import END, PAD, decode
from cqd_jax.tasks.task import Split


@dataclasses.dataclass(frozen=True)
class Result:
  """What a run gives.

  Attributes:
    run_dir: the run directory.
    rows: every method on the test split.
    throughput: candidates and answers a second, by stage.
    seconds: by stage.
  """

  run_dir: Path
  rows: list[Row]
  throughput: dict[str, float]
  seconds: dict[str, float]


class Stopwatch:
  """Seconds of named stages."""

  def __init__(self) -> None:
    self.seconds: dict[str, float] = {}

  @contextlib.contextmanager
  def stage(self, name: str) -> Iterator[None]:
    """Times a block."""
    start = time.perf_counter()
    yield
    self.seconds[name] = time.perf_counter() - start


def run_experiment(settings: ExperimentSettings, console: Console) -> Result:
  """Trains or loads the experts, evolves, compares, scores on test, and writes a new run directory.

  Raises:
    SandboxUnavailable: where nothing isolates answers and `settings.unsafe` is not set.
    ValueError: naming the setting that cannot be used.
  """
  watch = Stopwatch()
  started = time.perf_counter()
  sizes: dict[Split, int] = {
    "train": settings.tasks.train,
    "validation": settings.tasks.validation,
    "test": settings.tasks.test,
  }
  suite = skills(sizes=sizes, seed=settings.seed)
  with Sandbox(
    [task.harness for task in suite], workers=settings.workers or os.cpu_count() or 1, unsafe=settings.unsafe
  ) as sandbox:

    def evaluation(split: Split) -> Evaluation:
      return Evaluation(
        suite,
        split,
        encode=prompt_tokens,
        decode=decode,
        config=MINIATURE,
        execute=sandbox.run,
        max_new_tokens=settings.max_new_tokens,
        end_id=END,
        pad_id=PAD,
        group_size=settings.candidates_per_batch,
        num_buckets=settings.prompt_buckets,
      )

    validation, test = evaluation("validation"), evaluation("test")
    train_key, evolve_key, search_key = jax.random.split(jax.random.key(settings.seed), 3)
    with watch.stage("train"):
      base, experts = load_or_train(settings, suite, validation, train_key, console)
    run_dir = _new_run_dir(settings)
    (run_dir / "config.yaml").write_text(dump_settings(settings), encoding="utf-8")
    lab = Lab(settings, console, base, experts, validation, test)
    with watch.stage("evolve"):
      evolved = evolve(lab, evolve_key)
    evolution_clock = dataclasses.replace(lab.clock)
    _write_archives(run_dir, evolved, validation.task_names)
    with watch.stage("compare"):
      methods = [*plain_methods(lab), *searched_methods(lab, search_key), best_elite(evolved), aggregated(evolved)]
    with watch.stage("test"):
      rows = score_on_test(lab, methods)
  watch.seconds["total"] = time.perf_counter() - started
  throughput = {
    "candidates_per_s_evolving": evolution_clock.candidates / watch.seconds["evolve"],
    "candidates_per_s_decoding": lab.clock.candidates / lab.clock.decode_s,
    "answers_per_s_grading": lab.clock.answers / lab.clock.grade_s,
  }
  result = Result(run_dir, rows, throughput, watch.seconds)
  _write_scores(result, settings, evolved, validation.task_names)
  _show(result, settings, validation.task_names, console)
  return result


def _new_run_dir(settings: ExperimentSettings) -> Path:
  """Makes a directory that was not there before."""
  name = f"{settings.name}-seed-{settings.seed}"
  for number in range(1, 10_000):
    path = settings.runs_dir / (name if number == 1 else f"{name}-{number}")
    try:
      path.mkdir(parents=True)
    except FileExistsError:
      continue
    return path
  raise ValueError(f"runs_dir: {settings.runs_dir} already holds 9,999 runs named {name}")


def _write_archives(run_dir: Path, evolved: Evolved, task_names: list[str]) -> None:
  state: dict[str, Any] = {
    "repertoire": evolved.repertoire,
    "emitter_state": evolved.emitter_state,
    "key": evolved.key,
  }
  save_checkpoint(run_dir / "checkpoint", state)
  figure = plot_archives(evolved.repertoire, task_names, experts=evolved.expert_scores)
  save_figure(figure, run_dir / "archives.png")


def _write_scores(result: Result, settings: ExperimentSettings, evolved: Evolved, task_names: list[str]) -> None:
  (result.run_dir / "table.md").write_text(
    markdown_table(result.rows, task_names, settings.swarm_sizes), encoding="utf-8"
  )
  content = {
    "tasks": task_names,
    "seed": settings.seed,
    "test": result.rows,
    "expert_scores_on_validation": evolved.expert_scores,
    "history": evolved.history,
    "throughput": result.throughput,
    "seconds": result.seconds,
    "versions": {name: metadata.version(name) for name in ("cqd_jax", "jax", "flax", "qdax", "numpy")},
    "devices": [device.device_kind for device in jax.devices()],
  }
  write_json(result.run_dir / "scores.json", content)


def _show(result: Result, settings: ExperimentSettings, task_names: list[str], console: Console) -> None:
  title = f"Share of {settings.tasks.test} test questions a task answered right, every answer really executed"
  console.print(make_table(result.rows, task_names, settings.swarm_sizes, title))
  stages = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in result.seconds.items())
  rates = (
    f"{result.throughput['candidates_per_s_evolving']:.1f} candidates/s evolving, "
    f"{result.throughput['answers_per_s_grading']:.0f} answers/s graded"
  )
  console.print(f"{stages}; {rates}", highlight=False)
  console.print(
    f"any {'/'.join(map(str, settings.swarm_sizes))}: share that at least one of so many members solves, chosen on "
    "validation; scored: candidates scored on validation",
    highlight=False,
  )
  console.print(f"Results: {result.run_dir} (table.md, scores.json, archives.png, checkpoint)", highlight=False)
