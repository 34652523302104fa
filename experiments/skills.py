"""The skills experiment over several seeds, as one table with standard errors.

python experiments/skills.py --seeds 0 1 2

Each seed is a run of its own (other experts, other questions, another search). A seed that already has a run of the
same settings is gone on with, or only read if it is finished, so the command can be stopped and repeated.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from cqd_jax.cli.main import in_words, make_console
from cqd_jax.config.settings import ExperimentSettings, changed_settings, load_settings, parse_settings
from cqd_jax.run.experiment import resume_experiment, run_experiment
from cqd_jax.run.seeds import markdown, table, with_error

HERE = Path(__file__).parent


def main() -> int:
  """Runs what is missing, prints the table, writes it beside the runs."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
  parser.add_argument("--config", type=Path, default=HERE / "skills.yaml")
  arguments = parser.parse_args()
  return in_words(lambda: run(load_settings(arguments.config), arguments.seeds))


def run(settings: ExperimentSettings, seeds: Sequence[int]) -> None:
  """Runs the seeds, each once."""
  console = make_console()
  results = []
  for seed in seeds:
    seeded = dataclasses.replace(settings, seed=seed)
    begun = find_run(seeded)
    result = resume_experiment(begun, console) if begun else run_experiment(seeded, console)
    results.append(json.loads((result.run_dir / "scores.json").read_text(encoding="utf-8")))
  console.print(seeds_table(results))
  path = settings.runs_dir / f"{settings.name}-{len(results)}-seeds.md"
  path.write_text(seeds_markdown(results), encoding="utf-8")
  console.print(f"Written to {path}", highlight=False)


def find_run(settings: ExperimentSettings) -> Path | None:
  """A run directory of the same settings, a finished one if there is one."""
  found = []
  for facts in sorted(settings.runs_dir.glob(f"{settings.name}-seed-{settings.seed}*/run.json")):
    begun = parse_settings(json.loads(facts.read_text(encoding="utf-8"))["settings"], str(facts))
    if not changed_settings(begun, settings):
      found.append(facts.parent)
  finished = [path for path in found if (path / "scores.json").is_file()]
  return (finished or found or [None])[0]


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
  sys.exit(main())
