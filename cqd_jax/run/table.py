"""The table: every method on the test split, for a terminal and for a README."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from rich import box
from rich.table import Table

from cqd_jax.run.context import Method, RunContext, population_of_one
from cqd_jax.run.seeds import markdown
from cqd_jax.search.swarm import choose_members, share_solved
from cqd_jax.terminal.progress import progress


@dataclasses.dataclass(frozen=True)
class Row:
  """A method's figures on the test split.

  Attributes:
    name: of the method.
    scores: share of questions that its one model answers right, by task; empty for a swarm alone.
    mean: over tasks; None for a swarm alone.
    minimum: over tasks; None for a swarm alone.
    evaluations: candidates that the method scored on validation.
    solved: by number of members, the share of questions that at least one of them answers right.
    chosen: settings that the method chose on validation, by name.
  """

  name: str
  scores: dict[str, float]
  mean: float | None
  minimum: float | None
  evaluations: int
  solved: dict[int, float] = dataclasses.field(default_factory=dict)
  chosen: dict[str, float] = dataclasses.field(default_factory=dict)


def score_on_test(lab: RunContext, methods: Sequence[Method]) -> list[Row]:
  """Scores each method's model, and its most complementary members, on the test split."""
  rows = []
  with progress(lab.console, "scoring on test", len(methods)) as advance:
    for method in methods:
      lab.interrupt.check()
      rows.append(_score_row(lab, method))
      advance(note=f"{method.name}: {rows[-1].mean:.3f}" if rows[-1].scores else method.name)
  return rows


def _score_row(lab: RunContext, method: Method) -> Row:
  solved = _solved_by_members(lab, method)
  if method.model is None:
    return Row(method.name, {}, None, None, method.evaluations, solved, method.chosen)
  scores = lab.score(lab.suite.test, population_of_one(method.model)).passed[0].mean(axis=-1)
  by_task = dict(zip(lab.suite.test.task_names, scores.tolist(), strict=True))
  mean, minimum = float(scores.mean()), float(scores.min())
  return Row(method.name, by_task, mean, minimum, method.evaluations, solved, method.chosen)


def _solved_by_members(lab: RunContext, method: Method) -> dict[int, float]:
  """Members are chosen on validation, greedily, so a smaller swarm is the beginning of a larger one."""
  sizes = [size for size in lab.settings.swarm_sizes if method.passed is not None and size <= len(method.passed)]
  if not sizes or method.members is None or method.passed is None:
    return {}
  chosen = choose_members(method.passed.reshape(len(method.passed), -1), max(sizes))
  members = [method.members(index) for index in chosen]
  passed = lab.score(lab.suite.test, jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)).passed
  flat = passed.reshape(len(passed), -1)
  return {size: share_solved(flat[:size]) for size in sizes}


def make_table(rows: Sequence[Row], task_names: Sequence[str], swarm_sizes: Sequence[int], title: str) -> Table:
  """The rows for a terminal; the best of each column is bold."""
  values = [_values(row, task_names, swarm_sizes) for row in rows]
  best = [max((value for value in column if value is not None), default=None) for column in zip(*values, strict=True)]
  table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
  table.add_column("model", no_wrap=True)
  for column in (*_columns(task_names, swarm_sizes), "scored"):
    table.add_column(column, justify="right", no_wrap=True)
  for row, entries in zip(rows, values, strict=True):
    cells = [
      "" if entry is None else f"[bold]{entry:.3f}[/bold]" if entry == top else f"{entry:.3f}"
      for entry, top in zip(entries, best, strict=True)
    ]
    table.add_row(row.name, *cells, str(row.evaluations or ""))
  return table


def markdown_table(rows: Sequence[Row], task_names: Sequence[str], swarm_sizes: Sequence[int]) -> str:
  """The rows as a Markdown table."""
  cells = [
    [row.name, *("" if value is None else f"{value:.3f}" for value in _values(row, task_names, swarm_sizes))]
    for row in rows
  ]
  evaluations = [str(row.evaluations or "") for row in rows]
  header = ["model", *_columns(task_names, swarm_sizes), "scored"]
  return markdown(header, [[*entries, scored] for entries, scored in zip(cells, evaluations, strict=True)])


def _columns(task_names: Sequence[str], swarm_sizes: Sequence[int]) -> list[str]:
  return [*task_names, "mean", "min", *(f"any {size}" for size in swarm_sizes)]


def _values(row: Row, task_names: Sequence[str], swarm_sizes: Sequence[int]) -> list[float | None]:
  scores = [row.scores.get(name) for name in task_names]
  return [*scores, row.mean, row.minimum, *(row.solved.get(size) for size in swarm_sizes)]
