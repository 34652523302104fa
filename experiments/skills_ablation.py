"""CycleQD put together piece by piece, against searches without archives, over several seeds.

python experiments/skills_ablation.py --seeds 0 1 2

Every method scores the same number of children of the same experts. Stop it whenever you like: what is finished is
kept, and the same command goes on. The table, with standard errors and each method's paired difference to CycleQD, is
printed after every seed and written to OUT/ablation.md.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cqd_jax.cli.main import in_words, make_console
from cqd_jax.config.settings import load_settings
from cqd_jax.run.ablation import FULL, run_seed
from cqd_jax.run.seeds import markdown, paired, table, with_error
from cqd_jax.store.run_dir import write_text

HERE = Path(__file__).parent


def main() -> int:
  """Runs what is missing, and prints the table after each seed."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
  parser.add_argument("--children", type=int, help="evaluations a method may make (default: the configuration's)")
  parser.add_argument("--config", type=Path, default=HERE / "skills.yaml")
  parser.add_argument("--out", type=Path, default=Path("runs/ablation"))
  arguments = parser.parse_args()
  return in_words(lambda: run(arguments.config, arguments.seeds, arguments.children, arguments.out))


def run(config: Path, seeds: Sequence[int], children: int | None, out: Path) -> None:
  """Runs what is missing, seed by seed, and prints and writes the table after each."""
  console = make_console()
  settings = load_settings(config)
  children = children or settings.evolution.children
  settings = dataclasses.replace(settings, evolution=dataclasses.replace(settings.evolution, children=children))
  rows_by_seed: dict[int, list[dict[str, Any]]] = {}
  for seed in seeds:
    rows_by_seed[seed] = run_seed(dataclasses.replace(settings, seed=seed), out / f"seed-{seed}", console)
    header, rows = ablation_rows(rows_by_seed)
    title = f"{len(rows_by_seed)} seeds, {children} children a method, mean ± standard error"
    console.print(table(title, header, rows))
    write_text(out / "ablation.md", markdown(header, rows))
  console.print(f"Written to {out / 'ablation.md'}", highlight=False)


def ablation_rows(rows_by_seed: dict[int, list[dict[str, Any]]]) -> tuple[list[str], list[list[str]]]:
  """Header and rows: one a method, over the seeds."""
  names = [row["name"] for row in next(iter(rows_by_seed.values()))]
  by_name: dict[str, dict[int, Any]] = {name: {} for name in names}
  for seed, seed_rows in rows_by_seed.items():
    for row in seed_rows:
      by_name[row["name"]][seed] = row
  sizes = sorted({size for rows in by_name.values() for row in rows.values() for size in row["solved"]}, key=int)

  def column(name: str, *path: str) -> dict[int, float]:
    values = by_name[name]
    for key in path:
      values = {seed: value[key] for seed, value in values.items() if key in value}
    return values

  header = ["method", "mean", "min", *(f"any {size}" for size in sizes), "aggregate", "mean less CycleQD's"]
  table_rows = []
  for name in names:
    columns = [("mean",), ("minimum",), *(("solved", size) for size in sizes), ("aggregate",)]
    cells = [with_error(list(column(name, *path).values())) for path in columns]
    difference = paired(column(name, "mean"), column(FULL, "mean"))
    table_rows.append([name, *cells, "" if name == FULL else with_error(difference, signed=True)])
  return header, table_rows


if __name__ == "__main__":
  sys.exit(main())
