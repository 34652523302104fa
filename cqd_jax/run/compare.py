"""What each method offers, and how that does on the test split."""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from cqd_jax.genotypes.space import Space, population_of_one, take
from cqd_jax.operators import aggregate, uniform_average
from cqd_jax.run.context import RunContext
from cqd_jax.run.loop import Searched
from cqd_jax.search.swarm import choose_members, share_solved
from cqd_jax.terminal.progress import progress
from cqd_jax.types import Genotype


@dataclasses.dataclass(frozen=True)
class Offer:
  """One row of the table before it is scored on test.

  Attributes:
    name: as shown.
    space: of its individuals.
    model: its one model, leaves `[...]`; None if it is a swarm only.
    evaluations: individuals that its method scored on validation.
    answers: to questions of any split but test, that its method asked for.
    members: its individuals, leaves `[M, ...]`; None if it has no population.
    values: `[M, K, B]` validation values of the members.
    chosen: settings that were chosen on validation, by name.
  """

  name: str
  space: Space
  model: Genotype | None
  evaluations: int
  members: Genotype | None = None
  values: np.ndarray | None = None
  chosen: Mapping[str, float] = dataclasses.field(default_factory=dict)
  answers: int = 0


@dataclasses.dataclass(frozen=True)
class Row:
  """A row of the table: figures on the test split.

  Attributes:
    name: of the offer.
    scores: of its one model, by task; empty for a swarm only.
    mean: over tasks; None for a swarm only.
    minimum: over tasks; None for a swarm only.
    evaluations: individuals that its method scored on validation.
    answers: to questions of any split but test, that its method asked for: what it cost.
    solved: by number of members, what they solve together: the mean over questions of the best of them.
    chosen: settings that the method chose on validation, by name.
  """

  name: str
  scores: dict[str, float]
  mean: float | None
  minimum: float | None
  evaluations: int
  solved: dict[int, float] = dataclasses.field(default_factory=dict)
  chosen: dict[str, float] = dataclasses.field(default_factory=dict)
  answers: int = 0


def plain_offers(context: RunContext) -> list[Offer]:
  """Base, experts, the experts together, and their uniform average."""
  root = context.root
  experts = root.experts
  values = context.scorer.score("validation", experts, root).values
  zero = jax.tree.map(lambda leaf: jnp.zeros_like(leaf[0]), experts)
  return [
    Offer("base", root, zero, 0),
    *(Offer(f"expert {name}", root, take(experts, index), 0) for index, name in enumerate(context.expert_names)),
    Offer("the experts together", root, None, 0, members=experts, values=values),
    Offer("uniform average", root, uniform_average(experts), 0),
  ]


def offers_of(context: RunContext, searched: Searched) -> list[Offer]:
  """What a method offers: its best individual, and the aggregate of the archives where it has any."""
  population = searched.population()
  best = searched.best(population)
  has_archives = searched.repertoire is not None
  name, answers = searched.method.name, _num_answers(context, searched, np.asarray(population.values))
  offer = Offer(
    name=f"{name}, best elite" if has_archives else name,
    space=searched.space,
    model=take(population.genotypes, best),
    evaluations=searched.evaluations,
    members=population.genotypes if len(population.values) > 1 else None,
    values=np.asarray(population.values),
    chosen=dict(population.chosen),
    answers=answers,
  )
  if not has_archives:
    return [offer]
  total = Offer(f"{name}, aggregate", searched.space, aggregated(searched), searched.evaluations, answers=answers)
  return [offer, total]


def _num_answers(context: RunContext, searched: Searched, values: np.ndarray) -> int:
  """Of its candidates to all validation questions, and of those that it learns from to the training questions."""
  answers = searched.evaluations * int((~np.isnan(values[:1])).sum())
  if teachers := int(getattr(searched.algorithm, "num_teachers", 0)):
    answers += teachers * sum(questions for _, questions in context.history.num_solved("labels").values())
  return answers


def aggregated(searched: Searched) -> Genotype:
  """The softmax-weighted sum of the K archives' best elites (the paper's final model)."""
  repertoire = searched.repertoire
  assert repertoire is not None
  best = [repertoire.best(archive) for archive in range(repertoire.num_tasks)]
  genotypes = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(elite.genotype for elite in best))
  return aggregate(genotypes, jnp.stack([elite.scores[archive] for archive, elite in enumerate(best)]))


def score_on_test(context: RunContext, offers: Sequence[Offer]) -> list[Row]:
  """Scores each offer's model, and its most complementary members, on the test split."""
  rows = []
  with progress(context.console, "scoring on test", len(offers)) as advance:
    for offer in offers:
      context.interrupt.check()
      rows.append(_score_row(context, offer))
      advance(note=f"{offer.name}: {rows[-1].mean:.3f}" if rows[-1].scores else offer.name)
  return rows


def _score_row(context: RunContext, offer: Offer) -> Row:
  solved = _solved_by_members(context, offer)
  chosen = dict(offer.chosen)
  if offer.model is None:
    return Row(offer.name, {}, None, None, offer.evaluations, solved, chosen, offer.answers)
  scores = context.scorer.score("test", population_of_one(offer.model), offer.space).scores[0]
  by_task = dict(zip(context.task_names, scores.tolist(), strict=True))
  mean, minimum = float(scores.mean()), float(scores.min())
  return Row(offer.name, by_task, mean, minimum, offer.evaluations, solved, chosen, offer.answers)


def _solved_by_members(context: RunContext, offer: Offer) -> dict[int, float]:
  """Members are chosen on validation, greedily, so a smaller swarm is the beginning of a larger one."""
  values = offer.values
  if offer.members is None or values is None:
    return {}
  sizes = [size for size in context.swarm_sizes if size <= len(values)]
  if not sizes:
    return {}
  chosen = choose_members(values.reshape(len(values), -1), max(sizes))
  members = take(offer.members, np.asarray(chosen))
  tested = context.scorer.score("test", members, offer.space).values
  flat = tested.reshape(len(tested), -1)
  return {size: share_solved(flat[:size]) for size in sizes}
