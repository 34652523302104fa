"""What evolution leaves behind to be used: model folders, and answers to be read."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cqd_jax.archive import CyclingRepertoire
from cqd_jax.hub.model_card import Parent, model_card, parent_of
from cqd_jax.hub.save import save_pretrained
from cqd_jax.report.record import Sample
from cqd_jax.run.context import RunContext, population_of_one
from cqd_jax.run.loop import Evolved, aggregated
from cqd_jax.run.text_interface import TextInterface
from cqd_jax.store.individuals import Individuals
from cqd_jax.terminal.progress import progress
from cqd_jax.trees import Path as TreePath
from cqd_jax.types import Genotype, Params


def identity_of_best(repertoire: CyclingRepertoire, archive: int | None = None) -> int:
  """Who is the fittest of an archive, or with None who has the best mean score."""
  return int(repertoire.best(archive).lineage.identity)


def write_models(lab: RunContext, evolved: Evolved, folder: Path) -> None:
  """Writes the elites, the best of them and the aggregate as model folders, beside the base and the experts.

  Those that are there already are left as they are.
  """
  repertoire = evolved.repertoire
  best = identity_of_best(repertoire)
  individuals = lab.history.individuals()
  slots = chosen_slots(repertoire, lab.settings.output.elites)
  with progress(lab.console, "writing models", 1 + len(slots)) as advance:
    for slot in slots:
      about = about_elite(lab, repertoire, slot)
      for name in [elite_name(about["identity"])] + ["best"] * (about["identity"] == best):
        write_merge(lab, folder / name, evolved.merged(slot), about, individuals)
      advance()
    write_aggregate(lab, evolved, folder / "aggregate")
    advance()


def write_aggregate(lab: RunContext, evolved: Evolved, folder: Path) -> None:
  """Writes the aggregate of the archives' best elites as a model folder, unless it is there."""
  write_merge(lab, folder, aggregated(evolved).model, about_aggregate(lab, evolved), lab.history.individuals())


def write_merge(
  lab: RunContext, folder: Path, merged: Genotype, about: dict[str, Any], individuals: Individuals
) -> None:
  """Writes an individual of the merge space as a model folder, unless it is there."""
  if folder.exists():
    return
  card = card_of(lab, about, folder.name, individuals)
  write_model(lab.suite.language, folder, lab.merges.leaves(merged), {**about, "seed": lab.settings.seed}, card)


def write_model(
  language: TextInterface,
  folder: Path,
  params: Params | Iterable[tuple[TreePath, jax.Array]],
  about: Mapping[str, Any],
  card: str = "",
) -> None:
  """Writes a model of an experiment as a Hugging Face folder."""
  save_pretrained(
    folder,
    params,
    language.config,
    language.tokenizer,
    settings=language.settings,
    generation=language.generation,
    card=card,
    about=about,
  )


def card_of(lab: RunContext, about: Mapping[str, Any], name: str, individuals: Individuals, **more: Any) -> str:
  """The model card of an individual."""
  settings = lab.settings
  folders = dict(zip(lab.task_names, settings.experts, strict=True)) if settings.base is not None else {}
  base = Parent("the miniature base of the run", None) if settings.base is None else parent_of(settings.base)
  experts = {
    task: parent_of(folders[task]) if folders else Parent(f"the run's expert {task}", None) for task in lab.task_names
  }
  return model_card(about, name=name, base=base, experts=experts, individuals=individuals, **more)


def sample_answers(lab: RunContext, merged: Genotype, size: int) -> list[Sample]:
  """Some test questions of each task as a model answers them: first some that it fails."""
  model = population_of_one(merged)
  passed = lab.score(lab.suite.test, model).passed[0]
  answers = lab.suite.test.answer(lab.merges.models(model))[0]
  samples = []
  for name, examples, given, right in zip(lab.task_names, lab.suite.test.examples, answers, passed, strict=True):
    failed, solved = np.flatnonzero(~right), np.flatnonzero(right)
    num_failed = min(len(failed), max(size // 2, size - len(solved)))
    for index in (*failed[:num_failed], *solved[: size - num_failed]):
      example = examples[index]
      samples.append(Sample(name, example.prompt, example.answer, given[index], bool(right[index])))
  return samples


def elite_name(identity: int) -> str:
  """The name of an elite's folder."""
  return f"elite-{identity:06d}"


def chosen_slots(repertoire: CyclingRepertoire, which: str) -> list[int]:
  """The slots of "all" elites, of the "best" one of each archive, or ("none") of the best of all alone."""
  alive = np.flatnonzero(np.asarray(repertoire.alive))
  identity = np.asarray(repertoire.lineage.identity)
  wanted = {identity_of_best(repertoire)}
  if which == "best":
    wanted |= {identity_of_best(repertoire, archive) for archive in range(repertoire.num_tasks)}
  return [int(slot) for slot in alive if which == "all" or int(identity[slot]) in wanted]


def about_elite(lab: RunContext, repertoire: CyclingRepertoire, slot: int) -> dict[str, Any]:
  """What `model.json` tells of an elite."""
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


def about_aggregate(lab: RunContext, evolved: Evolved) -> dict[str, Any]:
  """What `model.json` tells of the aggregate."""
  elites = {name: identity_of_best(evolved.repertoire, archive) for archive, name in enumerate(lab.task_names)}
  return {"kind": "aggregate", "of": elites, "children": evolved.evaluations}
