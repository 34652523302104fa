"""What the smaller commands hold and count."""

import dataclasses

import jax.numpy as jnp
from experiment_cases import cma_es, task_arithmetic, tiny_evolution, tiny_settings
from rich.console import Console

from cqd_jax.run.commands import _as_population_of_one
from cqd_jax.run.plan import dry_run


def test_a_model_that_is_scored_is_held_once():
  params = {"a": jnp.arange(6.0).reshape(2, 3), "b": {"c": jnp.ones(4)}}
  leaves = [params["a"], params["b"]["c"]]
  population = _as_population_of_one(params)
  assert population["a"].shape == (1, 2, 3)
  assert population["a"].tolist() == [[[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]]
  assert all(leaf.is_deleted() for leaf in leaves)


def planned(tmp_path, swarm_sizes):
  settings = tiny_settings(
    tmp_path,
    evolution=tiny_evolution(),
    methods=(task_arithmetic(0.5, 1.0), cma_es("model", batch_size=4)),
    swarm_sizes=swarm_sizes,
  )
  with (tmp_path / "log").open("w") as log:
    dry_run(dataclasses.replace(settings, run_dir=None), Console(file=log, width=160))
  lines = (tmp_path / "log").read_text().splitlines()
  return {name: line for line in lines for name in ("evolving", "comparing", "final table", "models ") if name in line}


def test_the_plan_counts_the_largest_swarm_wherever_it_stands(tmp_path):
  one, other = planned(tmp_path, (3, 8)), planned(tmp_path, (8, 3))
  assert one == other
  # 3 experts and 6 children; 2 scales and 6 candidates; 5 plain rows, 2 methods, elite and aggregate, and swarms of 8
  # at the most: the experts, of both methods, the elites
  for name, models in (("evolving", 9), ("comparing", 8), ("final table", 5 + 2 + 2 + 4 * 8)):
    assert one[name].split("│")[2].strip() == str(models)
