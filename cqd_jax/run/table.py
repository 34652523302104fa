"""The table: every method on the test split, for a terminal and for a README."""

from collections.abc import Callable, Mapping, Sequence

from rich import box
from rich.markup import escape
from rich.table import Table

from cqd_jax.run.compare import Row
from cqd_jax.store.costs import Cost
from cqd_jax.store.markdown import markdown_table

COST = ("scored", "answers")
"""What a method cost: candidates scored on validation, and answers in all, those that it learned from included."""

COSTS: Mapping[str, Callable[[Cost], float | None]] = {
  "models": lambda cost: cost.individuals,
  "questions": lambda cost: cost.samples,
  "turns": lambda cost: cost.turns,
  "tokens read": lambda cost: cost.prompt_tokens or None,
  "tokens decoded": lambda cost: cost.answer_tokens or None,
  "seconds": lambda cost: cost.seconds,
}
"""Columns of `cost_table`; None where nothing is counted."""


def make_table(rows: Sequence[Row], task_names: Sequence[str], swarm_sizes: Sequence[int], title: str) -> Table:
  """The rows for a terminal; the best of each column is bold."""
  values = [_values(row, task_names, swarm_sizes) for row in rows]
  best = [max((value for value in column if value is not None), default=None) for column in zip(*values, strict=True)]
  table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
  table.add_column("model", no_wrap=True)
  for column in (*_columns(task_names, swarm_sizes), *COST):
    table.add_column(escape(column), justify="right", no_wrap=True)
  for row, entries in zip(rows, values, strict=True):
    cells = [
      "" if entry is None else f"[bold]{entry:.3f}[/bold]" if entry == top else f"{entry:.3f}"
      for entry, top in zip(entries, best, strict=True)
    ]
    table.add_row(escape(row.name), *cells, *_cost(row))
  return table


def rows_as_markdown(rows: Sequence[Row], task_names: Sequence[str], swarm_sizes: Sequence[int]) -> str:
  """The rows as a Markdown table."""
  cells = [
    [row.name, *("" if value is None else f"{value:.3f}" for value in _values(row, task_names, swarm_sizes))]
    for row in rows
  ]
  header = ["model", *_columns(task_names, swarm_sizes), *COST]
  return markdown_table(header, [[*entries, *_cost(row)] for entries, row in zip(cells, rows, strict=True)])


def cost_table(costs: Sequence[Cost]) -> Table:
  """What scoring took, by method; tokens and turns where they are counted."""
  table = Table(title="What scoring took", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
  table.add_column("", no_wrap=True)
  columns = [(name, figures) for name, figures in COSTS.items() if any(figures(cost) is not None for cost in costs)]
  for name, _ in columns:
    table.add_column(name, justify="right", no_wrap=True)
  for cost in costs:
    cells = [figures(cost) for _, figures in columns]
    table.add_row(escape(cost.name), *("" if each is None else f"{each:,.0f}" for each in cells))
  return table


def _cost(row: Row) -> list[str]:
  return [str(row.evaluations or ""), f"{row.answers:,}" if row.answers else ""]


def _columns(task_names: Sequence[str], swarm_sizes: Sequence[int]) -> list[str]:
  return [*task_names, "mean", "min", *(f"any {size}" for size in swarm_sizes)]


def _values(row: Row, task_names: Sequence[str], swarm_sizes: Sequence[int]) -> list[float | None]:
  scores = [row.scores.get(name) for name in task_names]
  return [*scores, row.mean, row.minimum, *(row.solved.get(size) for size in swarm_sizes)]
