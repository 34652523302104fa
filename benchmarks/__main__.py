"""The command line: finds the benchmark modules, runs them, prints JSON lines and a table."""

import argparse
import contextlib
import importlib
import pkgutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import benchmarks
from benchmarks import memory
from benchmarks.harness import Case, Ceiling, Measurement, machine, measure

PREFIX = "bench_"

WIDTH = 150
"""Columns of the table where it does not go to a terminal."""

EPILOG = """\
Figures go to standard output as one line of JSON a measurement (or to the file named by --json);
progress and the final table go to standard error.

  python -m benchmarks                      everything, full sizes
  python -m benchmarks operators            only the module benchmarks/bench_operators.py
  python -m benchmarks --quick              tiny sizes: does it run? (the figures mean nothing)
  python -m benchmarks --json figures.jsonl operators
  python -m benchmarks memory --help        no timing: the memory of a swarm of any model, from shapes only

Reading the table: `run` is the median of a run, compilation apart. `of ceiling` is the least time that this machine's
own copy bandwidth (or matmul rate), measured in the same rounds, would allow, over the time taken: 1.00 cannot be
beaten by much. `x peer` is how many times faster than the peer, timed alternately on the same arrays. On a shared
machine trust the last two, not the seconds. benchmarks/harness.py says how to write a module.
"""


def discover() -> list[str]:
  """Names of the benchmark modules, without their prefix, sorted."""
  found = (module.name for module in pkgutil.iter_modules(benchmarks.__path__))
  return sorted(name.removeprefix(PREFIX) for name in found if name.startswith(PREFIX))


def main(arguments: Sequence[str] | None = None) -> None:
  """Runs `python -m benchmarks`."""
  given = list(sys.argv[1:] if arguments is None else arguments)
  if given[:1] == ["memory"]:
    memory.main(given[1:])
    return
  options = _parser().parse_args(given)
  known = discover()
  if unknown := [name for name in options.modules if name not in known]:
    _parser().error(f"no benchmark named {', '.join(unknown)}; there are: {', '.join(known)}")
  console = Console(stderr=True)
  if not console.is_terminal:
    console.width = WIDTH
  with _sink(options.json) as sink:
    measurements = []
    for measurement in run(options.modules or known, quick=options.quick, console=console):
      sink.write(measurement.to_json() + "\n")
      sink.flush()
      measurements.append(measurement)
  console.print(table(measurements))


def run(modules: Sequence[str], *, quick: bool, console: Console) -> Iterator[Measurement]:
  """Measures all cases of the named modules, telling on `console` what is under way."""
  cases: list[tuple[str, Case]] = []
  for name in modules:
    module = importlib.import_module(f"benchmarks.{PREFIX}{name}")
    cases += [(name, case) for case in module.cases(quick)]
  ceiling = Ceiling(quick)
  columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
  progress = Progress(*columns, console=console, redirect_stdout=sys.stdout.isatty(), disable=not console.is_terminal)
  with progress:
    total = len(cases)
    task = progress.add_task("compiling", total=total)
    for index in range(1, total + 1):
      name, case = cases.pop(0)  # what its peer holds is freed with it
      progress.update(task, description=f"{name}: {case.name}")
      if not console.is_terminal:
        console.print(f"[{index}/{total}] {name}: {case.name} {_labels(case.labels)}", markup=False)
      yield measure(name, case, ceiling, rounds=3 if quick else 7)
      progress.advance(task)


def table(measurements: Sequence[Measurement]) -> Table:
  """The measurements for people."""
  result = Table(title=", ".join(f"{key} {value}" for key, value in machine().items()))
  for heading in ("case", "labels"):
    result.add_column(heading, overflow="fold")
  for heading in ("compile", "run", "a second", "GB/s", "GFLOP/s", "of ceiling", "x peer"):
    result.add_column(heading, justify="right", no_wrap=True)
  result.add_column("peer", overflow="fold")
  for row in measurements:
    result.add_row(
      f"{row.module}: {row.name}",
      _labels(row.labels),
      _seconds(row.compile_s),
      _seconds(row.run_s),
      f"{row.items_per_s:,.1f} {row.item}" if row.items_per_s else "",
      _figure(row.gb_per_s, ".1f"),
      _figure(row.gflop_per_s, ".1f"),
      _figure(row.fraction, ".2f"),
      _figure(row.ratio, ".2f"),
      row.peer or "",
    )
  return result


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog="python -m benchmarks",
    description="Times the hot paths of cqd_jax against this machine's own limits and against peers.",
    epilog=EPILOG,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("modules", nargs="*", metavar="MODULE", help=f"of: {', '.join(discover())} (default: all)")
  parser.add_argument("--quick", action="store_true", help="tiny sizes and few rounds")
  parser.add_argument("--json", type=Path, metavar="FILE", help="write the JSON lines to FILE")
  return parser


@contextlib.contextmanager
def _sink(path: Path | None) -> Iterator[TextIO]:
  if path is None:
    yield sys.stdout
  else:
    with path.open("w", encoding="utf-8") as file:
      yield file


def _labels(labels: Mapping[str, str | int | float]) -> str:
  """Only texts, numbers with their names."""
  parts = (value if isinstance(value, str) else f"{key}={value:.4g}" for key, value in labels.items())
  return " ".join(parts)


def _seconds(value: float | None) -> str:
  if value is None:
    return ""
  for unit, scale in (("s", 1.0), ("ms", 1e-3)):
    if value >= scale:
      return f"{value / scale:.3g} {unit}"
  return f"{value / 1e-6:.3g} us"


def _figure(value: float | None, form: str) -> str:
  return "" if value is None else format(value, form)


if __name__ == "__main__":
  main()
