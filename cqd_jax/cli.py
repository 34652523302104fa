"""The console command `cqd`."""

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import tyro
from rich.console import Console

import cqd_jax
from cqd_jax.config import ConfigError, ExperimentSettings, load_settings

EXAMPLES = """\
examples:
  cqd evolve experiments/skills.yaml                     the miniature experiment, a few minutes on 2 cores
  cqd evolve experiments/skills.yaml --seed 1            another seed
  cqd evolve experiments/skills.yaml --evolution.children 400 --evolution.mutation svd
  cqd evolve --help                                      every setting with its default
"""


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs the command; returns the exit code: 0, 2 for a mistake of the user's, 130 for Ctrl-C."""
  given = list(sys.argv[1:] if arguments is None else arguments)
  parser = argparse.ArgumentParser(
    prog="cqd",
    description="Evolve a population of neural networks by model merging.",
    epilog=EXAMPLES,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("--version", action="version", version=f"cqd_jax {cqd_jax.__version__}")
  commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
  commands.add_parser(
    "evolve", help="train or load the experts, evolve, compare, and write a run directory", add_help=False
  )
  command, rest = parser.parse_known_args(given)
  warnings.showwarning = lambda message, *_, **__: print(f"cqd: {message}", file=sys.stderr)
  try:
    return {"evolve": _evolve}[command.command](rest)
  except (ConfigError, ValueError, OSError, RuntimeError) as error:
    if os.environ.get("CQD_TRACEBACK"):
      raise
    print(f"cqd: {error}", file=sys.stderr)
    return 2
  except KeyboardInterrupt:
    print("cqd: stopped", file=sys.stderr)
    return 130


def make_console() -> Console:
  """Standard output; where that is no terminal, lines are wide enough for the table."""
  console = Console()
  return console if console.is_terminal else Console(width=120)


def _evolve(arguments: list[str]) -> int:
  """`cqd evolve [CONFIG.yaml] [--a.b value]`: what is on the command line overrides the file."""
  has_file = bool(arguments) and not arguments[0].startswith("-")
  default = load_settings(Path(arguments[0])) if has_file else ExperimentSettings()
  if not has_file and not {"-h", "--help"} & set(arguments):
    raise ConfigError("evolve: expected a configuration file, as in: cqd evolve experiments/skills.yaml")
  settings = tyro.cli(
    ExperimentSettings,
    default=default,
    args=arguments[1:] if has_file else arguments,
    prog="cqd evolve CONFIG.yaml",
    description="Settings come from CONFIG.yaml; options override them by their dotted names.",
  )
  # Imported here: it loads JAX, and neither --help nor a mistake in the settings needs it.
  from cqd_jax.experiment.run import run_experiment

  run_experiment(settings, make_console())
  return 0


if __name__ == "__main__":
  sys.exit(main())
