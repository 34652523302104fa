"""Tables over seeds: means, standard errors, and paired differences."""

import math
from collections.abc import Mapping, Sequence
from statistics import mean, stdev

from rich import box
from rich.table import Table


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


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  """A Markdown table."""
  lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
  return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows]) + "\n"


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
  """The same for a terminal."""
  shown = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
  for number, column in enumerate(header):
    shown.add_column(column, justify="right" if number else "left", no_wrap=True)
  for row in rows:
    shown.add_row(*row)
  return shown
