"""What evolution leaves behind to be used: model folders, and answers to be read."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from cqd_jax.archive import CyclingRepertoire
from cqd_jax.config import ExperimentSettings
from cqd_jax.experiment.evolution import Evolved, aggregated
from cqd_jax.experiment.lab import Lab, individual, population_of_one
from cqd_jax.experiment.space import materialise
from cqd_jax.io.model_folder import save_model
from cqd_jax.io.progress import progress
from cqd_jax.io.record import Sample
from cqd_jax.tasks.skills.training import MINIATURE
from cqd_jax.types import Params


def identity_of_best(repertoire: CyclingRepertoire, archive: int | None = None) -> int:
  """Who is the fittest of an archive, or with None who has the best mean score."""
  return int(repertoire.best(archive).lineage.identity)


def write_models(lab: Lab, evolved: Evolved, folder: Path) -> None:
  """Writes the elites, the best of them and the aggregate as model folders, beside the base and the experts.

  Those that are there already are left as they are.
  """
  repertoire = evolved.repertoire
  best = identity_of_best(repertoire)
  slots = _chosen_slots(lab, repertoire)
  with progress(lab.console, "writing models", 1 + len(slots)) as advance:
    for slot in slots:
      about = _about_elite(lab, repertoire, slot)
      for name in [f"elite-{about['identity']:06d}"] + ["best"] * (about["identity"] == best):
        _write(lab, folder / name, _apply(lab, evolved.task_vector(slot)), about)
      advance()
    write_aggregate(lab, evolved, folder / "aggregate")
    advance()


def write_aggregate(lab: Lab, evolved: Evolved, folder: Path) -> None:
  """Writes the aggregate of the archives' best elites as a model folder, unless it is there."""
  elites = {name: identity_of_best(evolved.repertoire, archive) for archive, name in enumerate(lab.task_names)}
  about = {"kind": "aggregate", "of": elites, "children": evolved.evaluations}
  _write(lab, folder, _apply(lab, aggregated(evolved).model), about)


def write_model(settings: ExperimentSettings, folder: Path, params: Params, about: dict[str, Any]) -> None:
  """Writes a model of the experiment's shape as a model folder."""
  save_model(folder, params, {**about, "decoder": dataclasses.asdict(MINIATURE), "seed": settings.seed})


def sample_answers(lab: Lab, task_vector: Params, size: int) -> list[Sample]:
  """Some test questions of each task as a model answers them: first some that it fails."""
  model = population_of_one(task_vector)
  passed = lab.score(lab.suite.test, model).passed[0]
  answers = lab.suite.test.answer(materialise(lab.base, model))[0]
  samples = []
  for name, examples, given, right in zip(lab.task_names, lab.suite.test.examples, answers, passed, strict=True):
    failed, solved = np.flatnonzero(~right), np.flatnonzero(right)
    num_failed = min(len(failed), max(size // 2, size - len(solved)))
    for index in (*failed[:num_failed], *solved[: size - num_failed]):
      example = examples[index]
      samples.append(Sample(name, example.prompt, example.answer, given[index], bool(right[index])))
  return samples


def _chosen_slots(lab: Lab, repertoire: CyclingRepertoire) -> list[int]:
  """The slots of the elites that become model folders."""
  alive = np.flatnonzero(np.asarray(repertoire.alive))
  identity = np.asarray(repertoire.lineage.identity)
  wanted = {identity_of_best(repertoire)}
  if lab.settings.output.elites == "best":
    wanted |= {identity_of_best(repertoire, archive) for archive in range(repertoire.num_tasks)}
  everyone = lab.settings.output.elites == "all"
  return [int(slot) for slot in alive if everyone or int(identity[slot]) in wanted]


def _about_elite(lab: Lab, repertoire: CyclingRepertoire, slot: int) -> dict[str, Any]:
  elite = repertoire.individual(slot)
  held = np.asarray(repertoire.held[slot])
  return {
    "kind": "elite",
    "identity": int(elite.lineage.identity),
    "parents": np.asarray(elite.lineage.parents).tolist(),
    "born": int(elite.lineage.born),
    "validation_scores": dict(zip(lab.task_names, np.asarray(elite.scores).tolist(), strict=True)),
    "archives": [name for name, holds in zip(lab.task_names, held, strict=True) if holds],
  }


def _apply(lab: Lab, task_vector: Params) -> Params:
  return individual(materialise(lab.base, population_of_one(task_vector)), 0)


def _write(lab: Lab, folder: Path, params: Params, about: dict[str, Any]) -> None:
  if not folder.exists():
    write_model(lab.settings, folder, params, about)
