"""What a run leaves behind to be used: its individuals as models, in the form that suits what they are models of."""

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cqd_jax.archive import CyclingRepertoire
from cqd_jax.engines.text_interface import TextInterface
from cqd_jax.genotypes import CoreBasis
from cqd_jax.genotypes.space import Space, take
from cqd_jax.hub.model_card import Parent, model_card
from cqd_jax.hub.save import save_pretrained
from cqd_jax.hub.save_adapter import save_adapter
from cqd_jax.run.compare import aggregated
from cqd_jax.run.context import RunContext
from cqd_jax.run.loop import Searched
from cqd_jax.store.checksums import seal
from cqd_jax.store.individuals import Individuals
from cqd_jax.store.params import save_params
from cqd_jax.store.run_dir import write_json
from cqd_jax.terminal.progress import progress
from cqd_jax.trees import Path as TreePath
from cqd_jax.trees import widen
from cqd_jax.types import Genotype, Params


@dataclasses.dataclass(frozen=True)
class HubWriter:
  """Language models as Hugging Face folders.

  Attributes:
    interface: tokenizer, config and what belongs to them.
    base: the base model, as adapters name it.
  """

  interface: TextInterface
  base: str

  def whole(
    self,
    folder: Path,
    leaves: Params | Iterable[tuple[TreePath, jax.Array]],
    about: Mapping[str, Any],
    card: str = "",
  ) -> None:
    """See `ModelWriter`."""
    interface = self.interface
    save_pretrained(
      folder,
      leaves,
      interface.config,
      interface.tokenizer,
      settings=interface.settings,
      generation=interface.generation,
      card=card,
      about=about,
    )
    seal(folder)

  def adapter(self, folder: Path, core: tuple[CoreBasis, Genotype], about: Mapping[str, Any], card: str = "") -> None:
    """See `ModelWriter`: a PEFT LoRA adapter, of the smallest rank that is exact."""
    basis, genotype = core
    save_adapter(folder, basis, genotype, self.interface.config, base_name=self.base, card=card)
    write_json(folder / "model.json", dict(about))
    seal(folder)


@dataclasses.dataclass(frozen=True)
class ParamsWriter:
  """Models of any kind: `params.safetensors`, whose keys are the paths of the leaves, and `model.json`.

  A model that is one bare array has the key "params".
  """

  def whole(
    self, folder: Path, leaves: Iterable[tuple[TreePath, jax.Array]], about: Mapping[str, Any], card: str = ""
  ) -> None:
    """See `ModelWriter`."""
    del card
    tree: dict[str, Any] = {}
    for path, leaf in leaves:
      path = path or ("params",)
      branch = tree
      for name in path[:-1]:
        branch = branch.setdefault(name, {})
      branch[path[-1]] = leaf
    save_params(folder / "params.safetensors", tree)
    write_json(folder / "model.json", dict(about))
    seal(folder)

  def adapter(self, folder: Path, core: tuple[CoreBasis, Genotype], about: Mapping[str, Any], card: str) -> None:
    """There is no such form."""
    raise ValueError("output.form: adapters are of language models; expected whole")


def identity_of_best(repertoire: CyclingRepertoire, archive: int | None = None) -> int:
  """Who is the fittest of an archive, or with None who has the best mean score."""
  return int(repertoire.best(archive).lineage.identity)


def write_models(context: RunContext, searched: Searched) -> None:
  """Writes the best individual, and of a search with archives its elites and their aggregate, as model folders.

  Those that are there already are left as they are.
  """
  folder, repertoire = context.files.models, searched.repertoire
  if repertoire is None:
    write_best(context, searched, folder / "best")
    return
  people = context.history.individuals(searched.method.name)
  best = identity_of_best(repertoire)
  slots = chosen_slots(repertoire, context.output.elites)
  with progress(context.console, "writing models", 1 + len(slots)) as advance:
    for slot in slots:
      about = about_elite(context, repertoire, slot)
      genotype = repertoire.individual(slot).genotype
      for name in [elite_name(about["identity"])] + ["best"] * (about["identity"] == best):
        write_individual(context, folder / name, searched.space, genotype, about, people)
      advance()
    write_aggregate(context, searched, folder / "aggregate")
    advance()


def write_best(context: RunContext, searched: Searched, folder: Path) -> None:
  """Writes a method's best individual as a model folder, unless it is there."""
  population = searched.population()
  best = searched.best(population)
  about: dict[str, Any] = {
    "kind": "best",
    "identity": int(population.identities[best]),
    "method": searched.method.name,
    "validation_scores": dict(zip(context.task_names, np.asarray(population.scores)[best].tolist(), strict=True)),
    **{name: float(value) for name, value in population.chosen.items()},
  }
  people = context.history.individuals(searched.method.name)
  write_individual(context, folder, searched.space, take(population.genotypes, best), about, people)


def write_aggregate(context: RunContext, searched: Searched, folder: Path) -> None:
  """Writes the aggregate of the archives' best elites as a model folder, unless it is there."""
  people = context.history.individuals(searched.method.name)
  about = about_aggregate(context, searched)
  write_individual(context, folder, searched.space, aggregated(searched), about, people)


def write_individual(
  context: RunContext, folder: Path, space: Space, genotype: Genotype, about: dict[str, Any], people: Individuals
) -> None:
  """Writes an individual as a model folder, in the form that the run's settings ask for, unless it is there."""
  if folder.exists():
    return
  as_adapter = context.output.form == "adapters"
  card = card_of(context, about, folder.name, people, adapter=as_adapter)
  about = {**about, "seed": context.seed}
  if as_adapter:
    context.writer.adapter(folder, core_of(space, genotype), about, card)
  else:
    context.writer.whole(folder, space.leaves(genotype), about, card)


def core_of(space: Space, genotype: Genotype) -> tuple[CoreBasis, Genotype]:
  """An individual as cores; a dense one spans a core space of its own, with bases that are not rounded."""
  core = space.core_of(genotype)
  if core is not None:
    return core
  dense = take(space.as_scored(jax.tree.map(lambda leaf: leaf[None], genotype)), 0)
  base, change = jax.tree.map(widen, (space.base, dense))
  basis = CoreBasis.from_experts(base, [change])
  return basis, take(basis.experts, 0)


def card_of(context: RunContext, about: Mapping[str, Any], name: str, people: Individuals, **more: Any) -> str:
  """The model card of an individual."""
  parents = context.parents
  base = parents.get("base", Parent("the base of the run", None))
  experts = {each: parents.get(each, Parent(f"the run's expert {each}", None)) for each in context.expert_names}
  return model_card(about, name=name, base=base, experts=experts, individuals=people, **more)


def elite_name(identity: int) -> str:
  """The name of an elite's folder."""
  return f"elite-{identity:06d}"


def chosen_slots(repertoire: CyclingRepertoire, which: str) -> list[int]:
  """The slots of "all" elites, of the "best" one of each archive, or ("none") only of the best of all."""
  alive = np.flatnonzero(np.asarray(repertoire.alive))
  identity = np.asarray(repertoire.lineage.identity)
  wanted = {identity_of_best(repertoire)}
  if which == "best":
    wanted |= {identity_of_best(repertoire, archive) for archive in range(repertoire.num_tasks)}
  return [int(slot) for slot in alive if which == "all" or int(identity[slot]) in wanted]


def about_elite(context: RunContext, repertoire: CyclingRepertoire, slot: int) -> dict[str, Any]:
  """What `model.json` says of an elite."""
  elite = repertoire.individual(slot)
  held = np.asarray(repertoire.held[slot])
  return {
    "kind": "elite",
    "identity": int(elite.lineage.identity),
    "parents": np.asarray(elite.lineage.parents).tolist(),
    "born": int(elite.lineage.born),
    "validation_scores": dict(zip(context.task_names, np.asarray(elite.scores).tolist(), strict=True)),
    "archives": [name for name, holds in zip(context.task_names, held, strict=True) if holds],
  }


def about_aggregate(context: RunContext, searched: Searched) -> dict[str, Any]:
  """What `model.json` says of the aggregate."""
  repertoire = searched.repertoire
  assert repertoire is not None
  elites = {name: identity_of_best(repertoire, archive) for archive, name in enumerate(context.task_names)}
  return {"kind": "aggregate", "of": elites, "children": searched.evaluations}
