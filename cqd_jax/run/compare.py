"""What CycleQD is compared with: plain merges, and searches over merge coefficients with as many evaluations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from cqd_jax.genotypes.coefficients import apply_coefficients, group_leaves
from cqd_jax.operators import task_arithmetic, uniform_average
from cqd_jax.run.context import Method, RunContext, individual, population_of_one
from cqd_jax.search.baselines import VectorSearch, cma_es, nsga2, random_search
from cqd_jax.terminal.progress import progress
from cqd_jax.types import Genotype, PRNGKey


def plain_methods(lab: RunContext) -> list[Method]:
  """Base, experts, uniform average, and task arithmetic with its scale chosen on validation."""
  passed = lab.score(lab.suite.validation, lab.merges.experts).passed
  names = lab.task_names
  experts = [Method(f"expert {name}", individual(lab.merges.experts, index), 0) for index, name in enumerate(names)]
  swarm = Method(
    "the experts together", None, 0, members=functools.partial(individual, lab.merges.experts), passed=passed
  )
  zero = jax.tree.map(lambda leaf: jnp.zeros_like(leaf[0]), lab.merges.experts)
  return [
    Method("base", zero, 0),
    *experts,
    swarm,
    Method("uniform average", uniform_average(lab.merges.experts), 0),
    *([_tuned_arithmetic(lab)] if lab.settings.baselines.scales else []),
  ]


def _tuned_arithmetic(lab: RunContext) -> Method:
  """Task arithmetic with the scale that does best on validation."""
  scales = lab.settings.baselines.scales
  means = []
  with progress(lab.console, "task arithmetic", len(scales)) as advance:
    for scale in scales:
      lab.interrupt.check()
      merged = task_arithmetic(lab.merges.experts, scale)
      means.append(lab.score(lab.suite.validation, population_of_one(merged)).passed.mean())
      advance(note=f"scale {scale:g}: {means[-1]:.3f}")
  best = scales[int(np.argmax(means))]
  merged = task_arithmetic(lab.merges.experts, best)
  return Method("task arithmetic, tuned scale", merged, len(scales), chosen={"scale": best})


def searched_methods(lab: RunContext, key: PRNGKey) -> list[Method]:
  """Random search, CMA-ES and NSGA-II over merge coefficients, each with as many evaluations as evolution."""
  settings = lab.settings.baselines
  num_experts = len(lab.task_names)
  size = {
    granularity: num_experts * group_leaves(individual(lab.merges.experts, 0), granularity).size
    for granularity in ("model", "kernel")
  }
  start = functools.partial(jnp.full, fill_value=settings.start)
  cma = functools.partial(cma_es, batch_size=settings.batch_size, step_size=settings.step_size)
  planned: list[tuple[str, str, VectorSearch]] = []
  if settings.random_search:
    uniform = random_search(size["model"], batch_size=settings.batch_size, low=0.0, high=1.0)
    planned.append(("random search, per model", "model", uniform))
  if settings.cma_es_model:
    planned.append(("CMA-ES, per model", "model", cma(start((size["model"],)))))
  if settings.cma_es_kernel:
    planned.append(("CMA-ES, per kernel", "kernel", cma(start((size["kernel"],)))))
  if settings.nsga2_model:
    search = nsga2(
      size["model"],
      num_tasks=num_experts,
      batch_size=settings.batch_size,
      population_size=settings.nsga2_population,
      low=0.0,
      high=1.0,
    )
    planned.append(("NSGA-II, per model", "model", search))
  keys = jax.random.split(key, max(len(planned), 1))
  return [
    _search(lab, name, granularity, search, search_key)
    for (name, granularity, search), search_key in zip(planned, keys, strict=False)
  ]


def _search(lab: RunContext, name: str, granularity: str, search: VectorSearch, key: PRNGKey) -> Method:
  """Runs one search over merge coefficients, maximizing the mean validation score."""
  groups = group_leaves(individual(lab.merges.experts, 0), granularity)
  num_experts = len(lab.task_names)
  budget = lab.settings.evolution.children

  @jax.jit
  def merge_all(candidates: jax.Array, experts: Genotype) -> Genotype:
    coefficients = candidates.reshape(-1, num_experts, groups.size)
    return jax.vmap(lambda one: apply_coefficients(one, experts, groups))(coefficients)

  state = search.state
  candidates_so_far: list[np.ndarray] = []
  passed_so_far: list[np.ndarray] = []
  with progress(lab.console, name, budget) as advance:
    done = 0
    while done < budget:
      lab.interrupt.check()
      key, ask_key = jax.random.split(key)
      candidates = search.ask(state, ask_key)
      passed = lab.score(lab.suite.validation, merge_all(candidates, lab.merges.experts)).passed[: budget - done]
      if len(passed) == len(candidates):  # the last batch may be cut to keep the budgets equal
        state = search.tell(state, candidates, jnp.asarray(passed.mean(axis=-1), jnp.float32))
      candidates_so_far.append(np.asarray(candidates)[: len(passed)])
      passed_so_far.append(passed)
      done += len(passed)
      best = max(batch.mean(axis=(1, 2)).max() for batch in passed_so_far)
      advance(len(passed), note=f"best mean {best:.3f}")
  candidates_of_all, passed_of_all = np.concatenate(candidates_so_far), np.concatenate(passed_so_far)

  def member(index: int) -> Genotype:
    return individual(merge_all(jnp.asarray(candidates_of_all[index][None]), lab.merges.experts), 0)

  winner = int(passed_of_all.mean(axis=(1, 2)).argmax())
  return Method(name, member(winner), budget, member, passed_of_all)
