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
from cqd_jax.operators.sparsify import check_density, check_drop_rate
from cqd_jax.search import vector_search
from cqd_jax.search.algorithm import Algorithm, SearchContext
from cqd_jax.search.archive_search import ArchiveSearch, MakeCells
from cqd_jax.search.cma_variants import with_restarts, within_bounds
from cqd_jax.search.dominated_novelty import DominatedNovelty
from cqd_jax.search.emitters import Crossover, CycleQDEmitter, Mutation
from cqd_jax.search.particle_swarm import ParticleSwarm, Pull
from cqd_jax.search.schedules import Schedule, cycle
from cqd_jax.search.succession import Rates, Succession
from cqd_jax.search.tuned_merge import Trial, TunedMerge, scaled_dare, scaled_sum, scaled_ties
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
  restarts: bool = False,
) -> Algorithm:
  """CMA-ES over merge coefficients, maximizing the mean of the task scores (Hansen 2016, arXiv:1604.00772).

  Args:
    context: of the run.
    genotype: whose numbers are searched.
    batch_size: candidates per iteration, at least 4.
    start: where every coefficient begins.
    step_size: initial step size.
    restarts: whether it begins again elsewhere where its steps or the differences in score have become tiny.
  """

  def make(dimension: int) -> VectorSearch:
    search = vector_search.cma_es(jnp.full(dimension, start), batch_size=batch_size, step_size=step_size)
    return with_restarts(search) if restarts else search

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


def lorahub(
  context: SearchContext,
  *,
  genotype: MakeSpace = per_model,
  batch_size: int = 8,
  step_size: float = 0.5,
  penalty: float = 0.05,
  bound: float = 1.5,
) -> Algorithm:
  """LoraHub: merge coefficients by CMA-ES from 0, with a price on their size (Huang et al. 2024, arXiv:2307.13269).

  Args:
    context: of the run.
    genotype: whose numbers are searched.
    batch_size: candidates per iteration, at least 4.
    step_size: initial step size.
    penalty: what the mean magnitude of the coefficients costs; off the scores only where candidates are compared.
    bound: the largest magnitude.
  """

  def make(dimension: int) -> VectorSearch:
    search = vector_search.cma_es(jnp.zeros(dimension), batch_size=batch_size, step_size=step_size)
    return within_bounds(search, penalty=penalty, bound=bound)

  return _over_vectors(context, genotype, make, batch_size)


def task_arithmetic(
  context: SearchContext, *, scales: tuple[float, ...] = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
) -> Algorithm:
  """The experts' sum, scaled by the number that does best (Ilharco et al. 2023, arXiv:2212.04089).

  Args:
    context: of the run.
    scales: what is tried.
  """
  return TunedMerge([Trial({}, scaled_sum)], scales, space=context.root, variation="the experts' sum, scaled")


def ties(
  context: SearchContext,
  *,
  densities: tuple[float, ...] = (0.2, 0.5, 0.8),
  scales: tuple[float, ...] = (0.8, 1.2, 1.6),
) -> Algorithm:
  """TIES of the experts with the density and the scale that do best (Yadav et al. 2023, arXiv:2306.01708).

  Args:
    context: of the run.
    densities: shares of entries that each expert keeps, of which each is tried with each scale.
    scales: what the merge is multiplied by, the paper's lambda.
  """
  for density in densities:
    check_density(density)
  trials = [Trial({"density": each}, functools.partial(scaled_ties, density=each)) for each in densities]
  return TunedMerge(trials, scales, space=context.root, variation="the experts by TIES, scaled")


def dare(
  context: SearchContext,
  *,
  drop_rates: tuple[float, ...] = (0.5, 0.7, 0.9),
  scales: tuple[float, ...] = (0.3, 0.5, 0.7),
) -> Algorithm:
  """The experts' sum after DARE, with the drop rate and the scale that do best (Yu et al. 2024, arXiv:2311.03099).

  Args:
    context: of the run.
    drop_rates: probabilities of zeroing an entry of an expert, of which each is tried with each scale.
    scales: what the sum is multiplied by.
  """
  for drop_rate in drop_rates:
    check_drop_rate(drop_rate)
  trials = [Trial({"drop_rate": each}, functools.partial(scaled_dare, drop_rate=each)) for each in drop_rates]
  return TunedMerge(trials, scales, space=context.root, variation="the experts' sum after DARE, scaled")


def model_swarms(
  context: SearchContext,
  *,
  genotype: MakeSpace = dense,
  batch_size: int = 8,
  inertia: float = 0.4,
  own: float = 0.3,
  best: float = 0.3,
  worst: float = 0.3,
  step: float = 1.0,
  decay: float = 0.95,
  least_step: float = 0.1,
  restart_after: int = 4,
) -> Algorithm:
  """Model Swarms: particle swarm optimization of the weights (Feng et al. 2024, arXiv:2410.11163).

  Args:
    context: of the run.
    genotype: what a particle is stored as.
    batch_size: particles, each of which moves in every iteration.
    inertia: how strongly a particle keeps its velocity; of the four pulls only the proportions matter.
    own: pull to the best position that it has had.
    best: pull to the best position that any has had.
    worst: push away from the worst position that any has had.
    step: length of the first step in units of the velocity.
    decay: what the length is multiplied by after each iteration.
    least_step: the length below which it never falls.
    restart_after: iterations without a better position until a particle restarts from its best one; 0 is never.
  """
  return ParticleSwarm(
    space=genotype(context.root, context.keep),
    num_particles=batch_size,
    pull=Pull(inertia, own, best, worst),
    step=step,
    decay=decay,
    least_step=least_step,
    restart_after=restart_after,
  )


def genome(
  context: SearchContext,
  *,
  genotype: MakeSpace = dense,
  batch_size: int = 8,
  population_size: int = 10,
  crossover_rate: float = 0.8,
  mutation_rate: float = 0.3,
  gene_rate: float = 0.1,
  sigma: float = 0.5,
  step: float = 0.5,
  decay: float = 0.95,
  own: float = 0.2,
  best: float = 0.2,
  worst: float = 0.1,
) -> Algorithm:
  """GENOME: crossover, mutation, succession and selection on weights (Zhang et al. 2025, arXiv:2503.01155).

  Args:
    context: of the run.
    genotype: what an individual is stored as.
    batch_size: children per iteration.
    population_size: individuals that survive an iteration.
    crossover_rate: probability that a child is a merge and not a copy.
    mutation_rate: probability that it is mutated.
    gene_rate: share of its weights that a mutation changes.
    sigma: size of the change, in units of the root mean square of the weights of a leaf.
    step: length of the first step of succession.
    decay: what the length is multiplied by after each iteration.
    own: pull to the fitter parent; of the three only the proportions matter.
    best: pull to the best individual so far.
    worst: push away from the worst individual so far.
  """
  rates = Rates(crossover_rate, mutation_rate, gene_rate, sigma, step, decay, own, best, worst)
  space = genotype(context.root, context.keep)
  return Succession(space=space, batch_size=batch_size, size=population_size, rates=rates)


def dns(
  context: SearchContext,
  *,
  genotype: MakeSpace = dense,
  batch_size: int = 8,
  population_size: int = 16,
  neighbors: int = 3,
  rotating: bool = False,
  crossover: Crossover | None = None,
  mutation: Mutation | None = None,
) -> Algorithm:
  """Dominated Novelty Search on what each model solves (Bahlous-Boldi et al. 2025, arXiv:2502.00593), as in AC/DC.

  Args:
    context: of the run.
    genotype: what an individual is stored as.
    batch_size: children per iteration.
    population_size: individuals that survive an iteration.
    neighbors: fitter individuals, the nearest, from which one has to differ.
    rotating: whether fitness is the score of one task after another instead of the mean.
    crossover: how two parents become a child, as for cycleqd.
    mutation: what happens to a child then, as for cycleqd.
  """
  space = genotype(context.root, context.keep)
  return DominatedNovelty(
    variation_of(space, context.num_tasks, crossover, mutation),
    space=space,
    batch_size=batch_size,
    size=population_size,
    neighbors=neighbors,
    rotating=rotating,
  )


def _over_vectors(
  context: SearchContext, genotype: MakeSpace, make: Callable[[int], VectorSearch], batch_size: int
) -> Algorithm:
  """A search that begins where it says, so that of the space's initial population only the experts are scored."""
  space = genotype(context.root, context.keep)
  space = dataclasses.replace(space, initial=space.experts, others=())
  return VectorAlgorithm(make, space=space, batch_size=batch_size, budget=context.budget)
