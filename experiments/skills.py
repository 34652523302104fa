"""The skills experiment over several seeds, as one table with standard errors.

python experiments/skills.py --seeds 0 1 2

Each seed is a run of its own (other experts, other questions, another search). A seed that already has a finished run
of the same settings is not run again, so the command can be stopped and repeated.
"""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from rich.table import Table

from cqd_jax.cli import make_console
from cqd_jax.config import ExperimentSettings, load_settings
from cqd_jax.experiment.run import run_experiment
from cqd_jax.experiment.seeds import markdown, table, with_error

HERE = Path(__file__).parent


def main() -> None:
  """Runs what is missing, prints the table, writes it beside the runs."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
  parser.add_argument("--config", type=Path, default=HERE / "skills.yaml")
  arguments = parser.parse_args()
  console = make_console()
  settings = load_settings(arguments.config)
  results = []
  for seed in arguments.seeds:
    seeded = dataclasses.replace(settings, seed=seed)
    run_dir = find_finished_run(seeded) or run_experiment(seeded, console).run_dir
    results.append(json.loads((run_dir / "scores.json").read_text(encoding="utf-8")))
  console.print(seeds_table(results))
  path = settings.runs_dir / f"{settings.name}-{len(results)}-seeds.md"
  path.write_text(seeds_markdown(results), encoding="utf-8")
  console.print(f"Written to {path}", highlight=False)


def find_finished_run(settings: ExperimentSettings) -> Path | None:
  """A run directory with scores whose settings are the same, if there is one."""
  for scores in sorted(settings.runs_dir.glob(f"{settings.name}-seed-{settings.seed}*/scores.json")):
    if load_settings(scores.parent / "config.yaml") == settings:
      return scores.parent
  return None


def figures(results: list[dict[str, Any]]) -> tuple[list[str], list[tuple[str, list[list[float]]]]]:
  """The columns' names; and for each method its values by column and seed (no values where it has none)."""
  tasks = results[0]["tasks"]
  sizes = sorted({size for row in results[0]["test"] for size in row["solved"]}, key=int)
  columns = [*tasks, "mean", "min", *(f"any {size}" for size in sizes)]
  methods = []
  for name in [row["name"] for row in results[0]["test"]]:
    rows = [row for result in results for row in result["test"] if row["name"] == name]
    values = [[row["scores"][task] for row in rows if task in row["scores"]] for task in tasks]
    values += [[row[name] for row in rows if row[name] is not None] for name in ("mean", "minimum")]
    values += [[row["solved"][size] for row in rows if size in row["solved"]] for size in sizes]
    methods.append((name, values))
  return columns, methods


def seeds_table(results: list[dict[str, Any]]) -> Table:
  """For the terminal."""
  columns, methods = figures(results)
  rows = [[name, *map(with_error, values)] for name, values in methods]
  return table(f"{len(results)} seeds, mean ± standard error", ["model", *columns], rows)


def seeds_markdown(results: list[dict[str, Any]]) -> str:
  """For a README."""
  columns, methods = figures(results)
  return markdown(["model", *columns], [[name, *map(with_error, values)] for name, values in methods])


if __name__ == "__main__":
  main()
