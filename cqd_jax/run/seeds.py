"""Runs and tables over seeds: means, standard errors, and paired differences."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cqd_jax.config.settings import ExperimentSettings, changed_settings, parse_settings
from cqd_jax.run.experiment import resume_experiment, run_experiment
from cqd_jax.run.stages import Result


def run_or_resume(settings: ExperimentSettings, console: Console) -> Result:
  """A run of these settings: one that is there goes on, or is only read if it is finished."""
  begun = find_run(settings)
  return resume_experiment(begun, console) if begun else run_experiment(settings, console)


def find_run(settings: ExperimentSettings) -> Path | None:
  """A run directory of the same settings, a finished one if there is one."""
  found = []
  for facts in sorted(settings.runs_dir.glob(f"{settings.name}-seed-{settings.seed}*/run.json")):
    begun = parse_settings(json.loads(facts.read_text(encoding="utf-8"))["settings"], str(facts))
    if not changed_settings(begun, settings):
      found.append(facts.parent)
  finished = [path for path in found if (path / "scores.json").is_file()]
  return next(iter(finished or found), None)


def with_error(values: Sequence[float], *, signed: bool = False) -> str:
  """Mean and standard error of the mean over seeds, as ".597 ±.012"; "" without values."""
  if not values:
    return ""
  center = f"{mean(values):+.3f}" if signed else f"{mean(values):.3f}"
  error = f" ±{stdev(values) / math.sqrt(len(values)):.3f}" if len(values) > 1 else ""
  return (center.replace("0.", ".", 1) if abs(mean(values)) < 1 else center) + error.replace("±0.", "±.")


def paired(values: Mapping[int, float], reference: Mapping[int, float]) -> list[float]:
  """The differences to a reference of the same seed, for the seeds that both have."""
  return [values[seed] - reference[seed] for seed in values if seed in reference]


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
  """The same for a terminal."""
  shown = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
  for number, column in enumerate(header):
    shown.add_column(escape(column), justify="right" if number else "left", no_wrap=True)
  for row in rows:
    shown.add_row(*map(escape, row))
  return shown
