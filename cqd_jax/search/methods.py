"""The methods of this package, by the names that a configuration gives: functions that make an `Algorithm`.

Each takes the context of a run and keyword settings. A setting that is itself a plug (genotype, crossover, mutation,
selection, cells, emitter) is given here as the function that it names, its own settings bound.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax.numpy as jnp
from qdax.core.emitters.emitter import Emitter

from cqd_jax.archive.make_cells import check_cells, from_experts
from cqd_jax.archive.selectors import Rule, elite_sampling
from cqd_jax.genotypes.space import MakeSpace, Space, coefficients, dense
from cqd_jax.search import vector_search
from cqd_jax.search.algorithm import Algorithm, SearchContext
from cqd_jax.search.archive_search import ArchiveSearch, MakeCells
from cqd_jax.search.emitters import Crossover, CycleQDEmitter, Mutation
from cqd_jax.search.schedules import Schedule, cycle
from cqd_jax.search.task_arithmetic import TunedScale
from cqd_jax.search.variation import variation_of
from cqd_jax.search.vector_algorithm import VectorAlgorithm
from cqd_jax.search.vector_search import VectorSearch

per_model = functools.partial(coefficients, granularity="model")


def cycleqd(
  context: SearchContext,
  *,
  batch_size: int = 4,
  genotype: MakeSpace = dense,
  cells: MakeCells = from_experts,
  selection: Rule = elite_sampling,
  schedule: Schedule = cycle,
  flip_interval: int = 1,
  crossover: Crossover | None = None,
  mutation: Mutation | None = None,
) -> Algorithm:
  """CycleQD (Kuroki et al. 2025, arXiv:2410.14735): one archive per task, elites merged in pairs, children mutated.

  Args:
    context: of the run.
    batch_size: children per iteration.
    genotype: what an individual is stored as: dense, core, coefficients.
    cells: how archives are cut into cells: from_experts (the paper's grid), grid, cvt.
    selection: how parents are sampled: elite (the paper), reference_elite (its code), uniform.
    schedule: where parents come from: the paper's cycle, round_robin as the reference's workers, or fixed.
    flip_interval: iterations until the schedule moves on.
    crossover: how two parents become a child: linear (the paper), slerp, ties, dare, line. Not given: linear, or line
      where individuals are coefficients.
    mutation: what happens to a child then: expert_svd (the reference code), svd (the paper), gaussian, none. Not given:
      expert_svd, or svd where there is not one expert a task, or none where individuals are coefficients.

  Raises:
    ValueError: naming the setting: an operator that is not valid in the space of the genotypes.
  """
  space = genotype(context.root, context.keep)
  check_cells(cells, context.num_tasks)
  variation = variation_of(space, context.num_tasks, crossover, mutation)
  emitter = CycleQDEmitter(
    batch_size=batch_size,
    crossover=variation.crossover,
    mutation=variation.mutation,
    task_context=variation.task_context,
    rule=selection,
    schedule=schedule,
    flip_interval=flip_interval,
  )
  return ArchiveSearch(emitter, space=space, cells=cells, budget=context.budget, variation=variation.words)


def emitter(
  context: SearchContext,
  *,
  emitter: Callable[[SearchContext, Space], Emitter],
  genotype: MakeSpace = dense,
  cells: MakeCells = from_experts,
) -> Algorithm:
  """Any QDax emitter on the K archives.

  Args:
    context: of the run.
    emitter: your function `(context, space, *, setting) -> Emitter`, as package.module:function.
    genotype: what an individual is stored as.
    cells: how archives are cut into cells.
  """
  space = genotype(context.root, context.keep)
  check_cells(cells, context.num_tasks)
  return ArchiveSearch(emitter(context, space), space=space, cells=cells, budget=context.budget)


def random_search(
  context: SearchContext, *, genotype: MakeSpace = per_model, batch_size: int = 8, low: float = 0.0, high: float = 1.0
) -> Algorithm:
  """Random merge coefficients, uniform between `low` and `high`.

  Args:
    context: of the run.
    genotype: whose numbers are drawn.
    batch_size: candidates per iteration.
    low: the least coefficient.
    high: the largest.
  """

  def make(dimension: int) -> VectorSearch:
    return vector_search.random_search(dimension, batch_size=batch_size, low=low, high=high)

  return _over_vectors(context, genotype, make, batch_size)


def cma_es(
  context: SearchContext,
  *,
  genotype: MakeSpace = per_model,
  batch_size: int = 8,
  start: float = 0.5,
  step_size: float = 0.15,
) -> Algorithm:
  """CMA-ES over merge coefficients, maximizing the mean of the task scores (Hansen 2016, arXiv:1604.00772).

  Args:
    context: of the run.
    genotype: whose numbers are searched.
    batch_size: candidates per iteration, at least 4.
    start: where every coefficient begins.
    step_size: initial step size.
  """

  def make(dimension: int) -> VectorSearch:
    return vector_search.cma_es(jnp.full(dimension, start), batch_size=batch_size, step_size=step_size)

  return _over_vectors(context, genotype, make, batch_size)


def nsga2(
  context: SearchContext,
  *,
  genotype: MakeSpace = per_model,
  batch_size: int = 8,
  population_size: int = 24,
  low: float = 0.0,
  high: float = 1.0,
) -> Algorithm:
  """NSGA-II over merge coefficients, each task an objective of its own (Deb et al. 2002).

  Args:
    context: of the run.
    genotype: whose numbers are searched.
    batch_size: candidates per iteration.
    population_size: individuals that survive an iteration.
    low: the least coefficient.
    high: the largest.
  """

  def make(dimension: int) -> VectorSearch:
    return vector_search.nsga2(
      dimension,
      batch_size=batch_size,
      num_tasks=context.num_tasks,
      population_size=population_size,
      low=low,
      high=high,
    )

  return _over_vectors(context, genotype, make, batch_size)


def task_arithmetic(
  context: SearchContext, *, scales: tuple[float, ...] = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
) -> Algorithm:
  """The experts' sum, scaled by the number that does best (Ilharco et al. 2023, arXiv:2212.04089).

  Args:
    context: of the run.
    scales: what is tried.
  """
  return TunedScale(scales, space=context.root)


def _over_vectors(
  context: SearchContext, genotype: MakeSpace, make: Callable[[int], VectorSearch], batch_size: int
) -> Algorithm:
  """A search that begins where it says, so that of the space's initial population only the experts are scored."""
  space = genotype(context.root, context.keep)
  space = dataclasses.replace(space, initial=space.experts, others=())
  return VectorAlgorithm(make, space=space, batch_size=batch_size, budget=context.budget)
