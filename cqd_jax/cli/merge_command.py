"""`cqd merge RECIPE.yml OUT`."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

EPILOG = """\
RECIPE.yml is what mergekit-yaml and mergekit-multi read, as it is:

  merge_method: ties                       any method of mergekit
  base_model: models/base                  folders, relative to the current one; nothing is downloaded
  models:
    - model: models/math
      parameters: {weight: 0.6, density: 0.5}
    - model: models/base+adapters/code     a LoRA adapter on top of a model
      parameters:
        weight: [0.2, 0.8]                 a gradient: from the first layer to the last
        density:
          - {filter: mlp, value: 0.3}      tensors with mlp in their names
          - value: 0.7                     all others
  dtype: bfloat16

Methods: linear, slerp, nuslerp, multislerp, karcher, passthrough, model_stock, arcee_fusion, task_arithmetic, ties,
dare_linear, dare_ties, breadcrumbs, breadcrumbs_ties, della, della_linear, nearswap, sce, ram, ramplus_tl; and magmax,
consensus_merge, tsv, iso_c.

Any folder of safetensors merges, by its tensors' names. A mistake, or what is not supported, is one line that names its
place, and nothing is written. OUT appears once it is whole; a merge that was killed goes on by the same command.

  cqd merge recipe.yml merged --dry-run
  cqd merge recipe.yml merged
"""


def add_merge(commands: Any, console: Callable[[], Console]) -> None:
  """Adds the command to the parsers of `cqd`."""
  command = commands.add_parser(
    "merge",
    help="merge models by a recipe in mergekit's YAML",
    description="Merge models by a recipe in mergekit's YAML, tensor by tensor.",
    epilog=EPILOG,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  command.add_argument("recipe", type=Path, metavar="RECIPE.yml", help="the recipe")
  command.add_argument("out", type=Path, metavar="OUT", help="folder to write; must not exist")
  command.add_argument("--seed", type=int, default=0, help="of methods that draw, as dare_ties (default: 0)")
  command.add_argument(
    "--missing",
    choices=("refuse", "keep"),
    default="refuse",
    help="tensors that not all models have: refuse, or keep them as the base, or the first that has them, has them",
  )
  command.add_argument("--shard-mb", type=int, default=2000, help="megabytes in a file of weights (default: 2000)")
  command.add_argument("--dry-run", action="store_true", help="check recipe, folders and shapes, and end")
  command.set_defaults(run=lambda arguments: _merge(arguments, console()))


def _merge(arguments: argparse.Namespace, console: Console) -> None:
  from cqd_jax.hub.merge_recipe import MergeOptions, merge_recipe

  options = MergeOptions(arguments.seed, arguments.missing == "keep", arguments.shard_mb * 1_000_000, arguments.dry_run)
  merge_recipe(arguments.recipe, arguments.out, console, options)
