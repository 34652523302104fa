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
from cqd_jax.config.settings import ExperimentSettings, load_settings
from cqd_jax.run.seeds import run_or_resume, table, with_error
from cqd_jax.store.markdown import markdown_table

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
    result = run_or_resume(dataclasses.replace(settings, seed=seed), console)
    results.append(json.loads((result.run_dir / "scores.json").read_text(encoding="utf-8")))
  console.print(seeds_table(results))
  path = settings.runs_dir / f"{settings.name}-{len(results)}-seeds.md"
  path.write_text(seeds_markdown(results), encoding="utf-8")
  console.print(f"Written to {path}", highlight=False)


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
  return markdown_table(["model", *columns], [[name, *map(with_error, values)] for name, values in methods])


if __name__ == "__main__":
  sys.exit(main())
