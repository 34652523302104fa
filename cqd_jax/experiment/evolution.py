"""CycleQD on the skills: the loop around ask, executed answers and tell, and the models that it gives."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cqd_jax.archive import (
  CyclingRepertoire,
  Grid,
  elite_sampling,
  reference_elite_sampling,
  uniform_sampling,
)
from cqd_jax.config import EvolutionSettings
from cqd_jax.experiment.lab import Lab, Method
from cqd_jax.io.progress import progress
from cqd_jax.operators import (
  aggregate,
  expert_svd_mutation,
  factorise,
  gaussian_mutation,
  linear_merge,
  svd_mutation,
)
from cqd_jax.search import CycleQD, CycleQDEmitter
from cqd_jax.types import Genotype, PRNGKey

RULES = {
  "elite": elite_sampling,
  "reference_elite": reference_elite_sampling,
  "uniform": uniform_sampling,
}


class Evolved(NamedTuple):
  """What evolution ends with: all that its next iteration would depend on, and its figures.

  Attributes:
    repertoire: the archives; extra score "passed" `[M, K, B]`: the validation questions answered right.
    emitter_state: of `CycleQDEmitter`.
    key: for the next iteration.
    history: the metrics after each iteration.
    evaluations: children scored.
    expert_scores: `[K, K]` validation scores of the initial experts.
  """

  repertoire: CyclingRepertoire
  emitter_state: Any
  key: PRNGKey
  history: list[dict[str, Any]]
  evaluations: int
  expert_scores: np.ndarray


def make_emitter(settings: EvolutionSettings, experts: Genotype) -> CycleQDEmitter:
  """The emitter that the settings describe."""
  mutations = {
    "none": None,
    "gaussian": functools.partial(gaussian_mutation, std=settings.mutation_size),
    "svd": functools.partial(svd_mutation, max_scale=settings.mutation_size),
    "expert_svd": functools.partial(expert_svd_mutation, rate=settings.mutation_size),
  }
  return CycleQDEmitter(
    batch_size=settings.batch_size,
    crossover=functools.partial(
      linear_merge,
      mean=settings.merge_mean,
      std=settings.merge_std,
      granularity=settings.merge_granularity,
      normalise=settings.merge_normalise,
    ),
    mutation=mutations[settings.mutation],
    task_context=jax.vmap(factorise)(experts) if settings.mutation == "expert_svd" else None,
    rule=RULES[settings.selection],
    schedule=settings.schedule,
    flip_interval=settings.flip_interval,
  )


def evolve(lab: Lab, key: PRNGKey) -> Evolved:
  """Runs CycleQD from the experts.

  Raises:
    ValueError: if the number of children is no multiple of the batch size.
  """
  settings = lab.settings.evolution
  num_iterations, remainder = divmod(settings.children, settings.batch_size)
  if remainder or not num_iterations:
    raise ValueError(
      f"evolution.children: expected a multiple of evolution.batch_size={settings.batch_size}, got {settings.children}"
    )
  passed = lab.score(lab.validation, lab.experts)
  expert_scores = passed.mean(axis=-1)
  cells = Grid.from_experts(expert_scores, shape=settings.cells)
  cycleqd = CycleQD(None, make_emitter(settings, lab.experts))
  key, init_key = jax.random.split(key)
  repertoire, state, _ = cycleqd.init_ask_tell(
    lab.experts,
    expert_scores,
    cells,
    init_key,
    extra_scores={"passed": jnp.asarray(passed)},
    capacity=len(passed) + settings.children,  # no more individuals will ever be
  )
  ask = jax.jit(cycleqd.ask)
  tell = jax.jit(cycleqd.tell, donate_argnames=("repertoire", "emitter_state"))
  history: list[dict[str, Any]] = []
  with progress(lab.console, "evolving", settings.children) as advance:
    for iteration in range(num_iterations):
      key, ask_key = jax.random.split(key)
      children, extra_info = ask(repertoire, state, ask_key)
      passed = lab.score(lab.validation, children)
      repertoire, state, metrics = tell(
        genotypes=children,
        scores=jnp.asarray(passed.mean(axis=-1), jnp.float32),
        repertoire=repertoire,
        emitter_state=state,
        extra_scores={"passed": jnp.asarray(passed)},
        extra_info=extra_info,
      )
      figures = {name: np.asarray(value).tolist() for name, value in metrics.items()}
      history.append({"iteration": iteration, **figures})
      advance(len(passed), note=f"best mean {figures['best_mean']:.3f}, {figures['num_elites']} elites")
  return Evolved(repertoire, state, key, history, settings.children, expert_scores)


def best_elite(evolved: Evolved) -> Method:
  """CycleQD's elite with the best mean on validation; its members are all elites."""
  repertoire = evolved.repertoire
  alive = np.flatnonzero(np.asarray(repertoire.alive))
  return Method(
    name="CycleQD, best elite",
    model=repertoire.best().genotype,
    evaluations=evolved.evaluations,
    members=lambda index: repertoire.individual(int(alive[index])).genotype,
    passed=np.asarray(repertoire.extra_scores["passed"])[alive],
  )


def aggregated(evolved: Evolved) -> Method:
  """The softmax-weighted sum of the K archives' best elites (the paper's final model)."""
  repertoire = evolved.repertoire
  best = [repertoire.best(archive) for archive in range(repertoire.num_tasks)]
  genotypes = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(elite.genotype for elite in best))
  fitnesses = jnp.stack([elite.scores[archive] for archive, elite in enumerate(best)])
  return Method("CycleQD, aggregate", aggregate(genotypes, fitnesses), evolved.evaluations)
