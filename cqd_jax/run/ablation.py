"""The paper's ladder: CycleQD put together piece by piece, and searches that know nothing of archives, seed by seed.

Every method scores equally many children of the same experts on the same questions. Each has a run directory, so that
an ablation that is stopped or killed goes on where it was.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from cqd_jax.config.settings import BaselineSettings, ConfigError, ExperimentSettings, changed_settings
from cqd_jax.run.compare import searched_methods
from cqd_jax.run.context import Method, RunContext, Suite, open_suite
from cqd_jax.run.experiment import explained, run_keys
from cqd_jax.run.files import RUNG, RunFiles, create_run, open_run, read_settings
from cqd_jax.run.loop import Evolution, aggregated, best_elite
from cqd_jax.run.miniature import load_or_train, stack_task_vectors
from cqd_jax.run.space import MergeSpace
from cqd_jax.run.table import score_on_test
from cqd_jax.store.checkpoints import Checkpoints
from cqd_jax.store.history import History
from cqd_jax.store.run_dir import locked, read_json, write_json
from cqd_jax.terminal.interrupt import Interrupt, interruptible

FULL = "CycleQD: elite sampling, reference's SVD"

LADDER: Mapping[str, Mapping[str, Any]] = {
  "QD, fixed axes": {"schedule": "fixed", "selection": "uniform", "mutation": "none"},
  "+ cycling": {"schedule": "cycle", "selection": "uniform", "mutation": "none"},
  "+ Gaussian mutation": {"selection": "uniform", "mutation": "gaussian", "mutation_size": 0.001},
  "+ paper's SVD mutation": {"selection": "uniform", "mutation": "svd", "mutation_size": 2.0},
  "+ reference's SVD mutation": {"selection": "uniform", "mutation": "expert_svd", "mutation_size": 0.3},
  "CycleQD: elite sampling, paper's SVD": {"selection": "elite", "mutation": "svd", "mutation_size": 2.0},
  FULL: {"selection": "elite", "mutation": "expert_svd", "mutation_size": 0.3},
  "CycleQD on coefficients, per kernel": {"genotype": "coefficients", "rank": 0},
}
"""What differs from the settings of the experiment, by the name of a rung; each mutation is added to cycling alone."""

SEARCHES = "searches"


def run_seed(settings: ExperimentSettings, folder: Path, console: Console) -> list[dict[str, Any]]:
  """Runs what is missing of one seed: the ladder, then the searches.

  Args:
    settings: of the experiment; `settings.seed` is the seed.
    folder: of this seed; each method has a run directory in it.
    console: where progress goes.

  Returns:
    Rows as in `scores.json`, in the order of the ladder: of each rung its best elite under the rung's name, with the
    mean of its aggregate as "aggregate"; and one row a search.

  Raises:
    ConfigError: if a run directory is of other settings.
    Stopped: if somebody asked for it.
  """
  quiet = dataclasses.replace(settings.output, elites="none", tensorboard=False)
  rows: list[dict[str, Any]] = []
  with explained(folder, "the same command"), open_suite(settings) as suite, interruptible(console.print) as interrupt:
    base, experts = load_or_train(settings, suite, run_keys(settings).train, console, interrupt)
    models = MergeSpace(base, stack_task_vectors(base, experts))
    for name, changes in LADDER.items():
      evolution = dataclasses.replace(settings.evolution, **{"schedule": "cycle", **changes})
      rung = dataclasses.replace(settings, evolution=evolution, output=quiet, run_dir=folder / _slug(name))
      best, merged = _run_methods(rung, name, suite, models, console, interrupt, _evolved_methods)
      rows.append({**best, "name": name, "aggregate": merged["mean"]})
    every_search = BaselineSettings(scales=(), nsga2_model=True)
    searches = dataclasses.replace(settings, baselines=every_search, output=quiet, run_dir=folder / SEARCHES)
    rows += _run_methods(searches, SEARCHES, suite, models, console, interrupt, _searched_methods)
  return rows


def _run_methods(
  settings: ExperimentSettings,
  name: str,
  suite: Suite,
  models: MergeSpace,
  console: Console,
  interrupt: Interrupt,
  make_methods: Callable[[RunContext, RunFiles], list[Method]],
) -> list[dict[str, Any]]:
  """The rows of the methods of one run directory, run or read."""
  files = _open_or_create(settings)
  with locked(files.path), History(files.history, suite.validation.task_names) as history:
    if not files.finished:
      console.print(f"seed {settings.seed}, {name}", highlight=False)
      lab = RunContext(settings, console, models, suite, history, interrupt)
      rows = [dataclasses.asdict(row) for row in score_on_test(lab, make_methods(lab, files))]
      Checkpoints(files.path / "checkpoints").prune(keep=0)
      write_json(files.scores, {"tasks": lab.task_names, "seed": settings.seed, "test": rows})
  # As read, also what was just written: JSON makes texts of the numbers that are keys.
  done: list[dict[str, Any]] = read_json(files.scores)["test"]
  return done


def _evolved_methods(lab: RunContext, files: RunFiles) -> list[Method]:
  evolved = Evolution(lab, files.path, run_keys(lab.settings).evolve).run()
  return [best_elite(evolved), aggregated(evolved)]


def _searched_methods(lab: RunContext, files: RunFiles) -> list[Method]:
  del files
  return searched_methods(lab, run_keys(lab.settings).search)


def _open_or_create(settings: ExperimentSettings) -> RunFiles:
  assert settings.run_dir is not None
  if not settings.run_dir.exists():
    return create_run(settings, RUNG)
  files = open_run(settings.run_dir)
  if changed := changed_settings(read_settings(files), settings):
    raise ConfigError(f"{files.path}: was run with other settings ({', '.join(changed)}); name another --out")
  return files


def _slug(name: str) -> str:
  return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())
