"""A run directory as the `RunRecord` that reports and figures are made from; needs no models and no sandbox."""

from typing import Any

import numpy as np

from cqd_jax.archive import Grid
from cqd_jax.config import ExperimentSettings, dump_settings, parse_settings
from cqd_jax.experiment.run_files import RunFiles
from cqd_jax.io.history import History
from cqd_jax.io.record import Individuals, RunRecord, Sample
from cqd_jax.io.run_dir import read_json


def read_record(files: RunFiles) -> RunRecord:
  """Reads a run, finished or not, also while another process is at it.

  Raises:
    ValueError: naming the file that is missing or damaged.
  """
  begun = read_json(files.facts)
  settings = parse_settings(begun["settings"], str(files.facts))
  with History(files.history) as history:
    names, individuals, metrics = history.task_names, history.individuals(), history.metrics()
  results: dict[str, Any] = read_json(files.scores) if files.finished else {}
  grid = _grid(settings, individuals)
  best, aggregated = _best(individuals, grid)
  return RunRecord(
    name=files.path.resolve().name,
    finished=files.finished,
    task_names=names,
    num_planned=settings.evolution.children,
    facts=_facts(begun, settings, metrics),
    settings=dump_settings(settings),
    edges=None if grid is None else [grid.edges(task) for task in range(len(names))],
    bins=None if grid is None else _bins(grid, individuals.scores),
    individuals=individuals,
    metrics=metrics,
    rows=results.get("test", []),
    swarm_sizes=settings.swarm_sizes,
    samples=[Sample(**sample) for sample in results.get("samples", [])],
    best=results.get("best", best),
    aggregated=results.get("aggregated", aggregated),
  )


def _grid(settings: ExperimentSettings, individuals: Individuals) -> Grid | None:
  """The cells, which follow from the experts' scores."""
  experts = individuals.scores[individuals.born == 0]
  return Grid.from_experts(experts, shape=settings.evolution.cells) if len(experts) else None


def _bins(grid: Grid, scores: np.ndarray) -> np.ndarray:
  return np.asarray(grid.bins(np.nan_to_num(scores)))


def _best(individuals: Individuals, grid: Grid | None) -> tuple[int | None, list[int]]:
  """Of the living the one with the best mean, and the fittest of each archive; the first of equals."""
  if grid is None:
    return None, []
  bins = _bins(grid, individuals.scores)
  num_tasks = individuals.scores.shape[1]
  living: set[int] = set()
  for archive in range(num_tasks):
    cells = np.delete(bins, archive, axis=1)
    held = {tuple(cells[identity]): int(identity) for identity in np.flatnonzero(individuals.taken[:, archive])}
    living |= set(held.values())
  if not living:
    return None, []
  elites = np.array(sorted(living))
  scores = individuals.scores[elites]
  fittest = [int(elites[scores[:, archive].argmax()]) for archive in range(num_tasks)]
  return int(elites[scores.mean(axis=1).argmax()]), fittest


def _facts(begun: dict[str, Any], settings: ExperimentSettings, metrics: dict[str, np.ndarray]) -> dict[str, str]:
  last = begun["sessions"][-1]
  evolution = settings.evolution
  seconds = ", ".join(f"{stage} {value:.0f} s" for stage, value in begun["seconds"].items())
  facts = {
    "began": begun["created"].replace("T", " "),
    "seed": str(settings.seed),
    "search": f"{evolution.children} children in batches of {evolution.batch_size}, schedule {evolution.schedule}, "
    f"selection {evolution.selection}, mutation {evolution.mutation} {evolution.mutation_size:g}",
    "scored on": f"{settings.tasks.validation} validation questions a task; the table: {settings.tasks.test} test "
    "questions a task",
    "device": ", ".join(last["devices"]),
    "versions": ", ".join(f"{name} {last['versions'][name]}" for name in ("cqd_jax", "jax", "flax", "qdax")),
  }
  if len(begun["sessions"]) > 1:
    facts["sessions"] = str(len(begun["sessions"]))
  if seconds:
    facts["time"] = seconds
  if len(metrics):
    rate = evolution.batch_size * len(metrics["seconds"]) / max(float(metrics["seconds"].sum()), 1e-9)
    facts["speed"] = f"{rate:.1f} children scored a second"
  return facts
