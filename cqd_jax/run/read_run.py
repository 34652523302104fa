"""A run directory as the `RunRecord` that reports and figures are made from; needs no models and no sandbox."""

import dataclasses
from typing import Any

import numpy as np

from cqd_jax.archive import Grid
from cqd_jax.report.record import RunRecord, Sample
from cqd_jax.run.files import EXPERIMENT, RunFiles
from cqd_jax.store.history import History
from cqd_jax.store.run_dir import RunDirError
from cqd_jax.store.yaml_text import write_yaml


def read_record(files: RunFiles) -> RunRecord:
  """Reads a run, finished or not, also while another process is at it.

  Raises:
    ValueError: naming the file that is missing or damaged.
  """
  begun = files.read_facts()
  about = _about(files, begun)
  with History(files.history) as history:
    names, method = history.task_names, about["method"]
    individuals, metrics, cells = history.individuals(method), history.metrics(method), history.cells(method)
    verified, costs = _verified(history), history.costs()
  if begun["kind"] == EXPERIMENT and not _are_shares(individuals.scores):
    raise RunDirError(f"{files.history}: damaged, {method!r} has scores that are no shares of questions answered right")
  finished = files.finished
  results: dict[str, Any] = files.read_scores() if finished else {}
  for name in ("best", "aggregated"):
    identities = np.atleast_1d(results.get(name, []))
    if (identities >= len(individuals)).any():
      raise RunDirError(f"{files.scores}: damaged, {name!r} names an individual that {files.history} does not have")
  grid = cells if isinstance(cells, Grid) else None
  record = RunRecord(
    name=files.path.resolve().name,
    finished=finished,
    task_names=names,
    num_planned=about["planned"],
    facts=_facts(begun, about, metrics, int((individuals.born > 0).sum())) | verified,
    settings=write_yaml(begun["settings"]),
    edges=None if grid is None else [grid.edges(task) for task in range(len(names))],
    bins=None if grid is None else np.asarray(grid.bins(np.nan_to_num(individuals.scores))),
    individuals=individuals,
    metrics=metrics,
    rows=results.get("test", []),
    swarm_sizes=about["swarm_sizes"],
    samples=[
      Sample(**{**sample, **{name: [tuple(each) for each in sample.get(name, [])] for name in ("pictures", "turns")}})
      for sample in results.get("samples", [])
    ],
    best=results.get("best"),
    aggregated=results.get("aggregated", []),
    costs=costs,
  )
  return record if finished else dataclasses.replace(record, best=_best(record))


def _are_shares(scores: np.ndarray) -> bool:
  known = scores[~np.isnan(scores)]
  return bool(((known >= 0) & (known <= 1)).all())


def _about(files: RunFiles, begun: dict[str, Any]) -> dict[str, Any]:
  if "record" not in begun:
    raise RunDirError(f"{files.path}: nothing was scored yet; resume with: cqd resume {files.path}")
  return dict(begun["record"])


def _best(record: RunRecord) -> int | None:
  """Of those that hold a cell now the one with the best mean, the first of equals; without archives, of all."""
  archives = range(len(record.task_names))
  living = sorted({holder for archive in archives for holder in record.elites(archive).values()})
  if not living:
    living = np.flatnonzero(np.isfinite(record.individuals.scores).all(axis=1)).tolist()
  if not living:
    return None
  means = record.individuals.scores[living].mean(axis=1)
  return int(living[int(means.argmax())])


def _verified(history: History) -> dict[str, str]:
  """How many questions somebody answered right: of these there are labels."""
  told = {}
  for what, split in (("validation", "validation"), ("training", "labels")):
    found = history.num_solved(split)
    if any(count for count, _ in found.values()):
      words = [f"{name} {count} of {of}" for name, (count, of) in found.items()]
      told[f"{what} questions answered right by somebody"] = ", ".join(words)
  return told


def _facts(
  begun: dict[str, Any], about: dict[str, Any], metrics: dict[str, np.ndarray], children: int
) -> dict[str, str]:
  last = begun["sessions"][-1]
  seconds = ", ".join(f"{stage} {value:.0f} s" for stage, value in begun["seconds"].items())
  facts = {
    "began": begun["created"].replace("T", " "),
    **about["facts"],
    "device": ", ".join(last["devices"]),
    "versions": ", ".join(
      f"{name} {last['versions'][name]}" for name in ("cqd_jax", "jax", "flax", "qdax") if name in last["versions"]
    ),
  }
  if len(begun["sessions"]) > 1:
    facts["sessions"] = str(len(begun["sessions"]))
  if seconds:
    facts["time"] = seconds
  if len(metrics):
    rate = children / max(float(metrics["seconds"].sum()), 1e-9)
    facts["speed"] = f"{rate:.1f} children scored per second"
  return facts
