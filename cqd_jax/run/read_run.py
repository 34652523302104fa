"""A run directory as the `RunRecord` that reports and figures are made from; needs no models and no sandbox."""

import dataclasses
from typing import Any

import numpy as np

from cqd_jax.archive import Grid
from cqd_jax.config.settings import ExperimentSettings, dump_settings, parse_settings
from cqd_jax.report.record import RunRecord, Sample
from cqd_jax.run.files import RunFiles
from cqd_jax.store.history import History
from cqd_jax.store.individuals import Individuals
from cqd_jax.store.run_dir import read_json


def read_record(files: RunFiles) -> RunRecord:
  """Reads a run, finished or not, also while another process is at it.

  Raises:
    ValueError: naming the file that is missing or damaged.
  """
  begun = read_json(files.facts)
  settings = parse_settings(begun["settings"], str(files.facts))
  with History(files.history) as history, history.snapshot():
    names, individuals, metrics = history.task_names, history.individuals(), history.metrics()
  finished = files.finished
  results: dict[str, Any] = read_json(files.scores) if finished else {}
  grid = _grid(settings, individuals, len(names))
  record = RunRecord(
    name=files.path.resolve().name,
    finished=finished,
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
    best=results.get("best"),
    aggregated=results.get("aggregated", []),
  )
  return record if finished else dataclasses.replace(record, best=_best(record))


def _grid(settings: ExperimentSettings, individuals: Individuals, num_experts: int) -> Grid | None:
  """The cells, which follow from the experts' scores."""
  experts = individuals.scores[individuals.born == 0][:num_experts]
  return Grid.from_experts(experts, shape=settings.evolution.cells) if len(experts) else None


def _bins(grid: Grid, scores: np.ndarray) -> np.ndarray:
  return np.asarray(grid.bins(np.nan_to_num(scores)))


def _best(record: RunRecord) -> int | None:
  """Of those that hold a cell now the one with the best mean, the first of equals."""
  living = sorted({holder for archive in range(len(record.task_names)) for holder in record.elites(archive).values()})
  if not living:
    return None
  means = record.individuals.scores[living].mean(axis=1)
  return living[int(means.argmax())]


def _facts(begun: dict[str, Any], settings: ExperimentSettings, metrics: dict[str, np.ndarray]) -> dict[str, str]:
  last = begun["sessions"][-1]
  evolution = settings.evolution
  seconds = ", ".join(f"{stage} {value:.0f} s" for stage, value in begun["seconds"].items())
  facts = {
    "began": begun["created"].replace("T", " "),
    "seed": str(settings.seed),
    "search": f"{evolution.children} children in batches of {evolution.batch_size}, schedule {evolution.schedule}, "
    f"selection {evolution.selection}, mutation {evolution.variation or 'none'}",
    "genotype": evolution.genotype + ("" if evolution.genotype == "dense" else f", rank {evolution.rank or 'full'}"),
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
