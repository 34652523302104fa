"""CycleQD put together piece by piece, against searches without archives, over several seeds.

python experiments/skills_ablation.py --seeds 0 1 2

Each seed is one run of skills_ablation.yaml, whose list of methods is the ablation. Stop it whenever you like: what was
scored is kept, and the same command goes on. The table, with standard errors and each method's paired difference to
CycleQD, is printed after every seed and written beside the runs.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cqd_jax.cli.main import in_words, make_console
from cqd_jax.config.settings import load_settings
from cqd_jax.run.methods import FEATURED
from cqd_jax.run.seeds import paired, run_or_resume, table, with_error
from cqd_jax.store.markdown import markdown_table
from cqd_jax.store.run_dir import write_text

HERE = Path(__file__).parent


def main() -> int:
  """Runs what is missing, and prints the table after each seed."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
  parser.add_argument("--children", type=int, help="children that each method may score (default: the configuration's)")
  parser.add_argument("--config", type=Path, default=HERE / "skills_ablation.yaml")
  arguments = parser.parse_args()
  return in_words(lambda: run(arguments.config, arguments.seeds, arguments.children))


def run(config: Path, seeds: Sequence[int], children: int | None) -> None:
  """Runs what is missing, seed by seed, and prints and writes the table after each."""
  console = make_console()
  settings = load_settings(config)
  children = children or settings.evolution.children
  settings = dataclasses.replace(settings, evolution=dataclasses.replace(settings.evolution, children=children))
  path = settings.runs_dir / f"{settings.name}-{len(seeds)}-seeds.md"
  rows_by_seed: dict[int, list[dict[str, Any]]] = {}
  for seed in seeds:
    result = run_or_resume(dataclasses.replace(settings, seed=seed), console)
    rows_by_seed[seed] = json.loads((result.run_dir / "scores.json").read_text(encoding="utf-8"))["test"]
    header, rows = ablation_rows(rows_by_seed)
    title = f"{len(rows_by_seed)} seeds, {children} children per method, mean ± standard error"
    console.print(table(title, header, rows))
    write_text(path, markdown_table(header, rows))
  console.print(f"Written to {path}", highlight=False)


def ablation_rows(rows_by_seed: dict[int, list[dict[str, Any]]]) -> tuple[list[str], list[list[str]]]:
  """Header and rows: one per method, over the seeds; the mean of an archive search's aggregate is a column."""
  by_name: dict[str, dict[int, Any]] = {}
  aggregates: dict[str, dict[int, float]] = {}
  for seed, rows in rows_by_seed.items():
    for row in rows:
      name = row["name"].removesuffix(", best elite")
      if name.endswith(", aggregate"):
        aggregates.setdefault(name.removesuffix(", aggregate"), {})[seed] = row["mean"]
      elif row["evaluations"]:
        by_name.setdefault(name, {})[seed] = row
  sizes = sorted({size for rows in by_name.values() for row in rows.values() for size in row["solved"]}, key=int)

  def column(name: str, *path: str) -> dict[int, float]:
    values = by_name[name]
    for key in path:
      values = {seed: value[key] for seed, value in values.items() if key in value}
    return values

  header = ["method", "mean", "min", *(f"any {size}" for size in sizes), "aggregate", f"mean less {FEATURED}'s"]
  table_rows = []
  for name in by_name:
    columns = [("mean",), ("minimum",), *(("solved", size) for size in sizes)]
    cells = [with_error(list(column(name, *path).values())) for path in columns]
    cells.append(with_error(list(aggregates.get(name, {}).values())))
    difference = paired(column(name, "mean"), column(FEATURED, "mean"))
    table_rows.append([name, *cells, "" if name == FEATURED else with_error(difference, signed=True)])
  return header, table_rows


if __name__ == "__main__":
  sys.exit(main())
