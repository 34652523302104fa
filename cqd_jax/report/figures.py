"""Figures for a paper, made from the record of a run: archives, their growth, curves, descent and the score table."""

import dataclasses
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from cqd_jax.report.archive_plot import ArchiveView, draw_panel, label_panel, pairs_of_axes, panel_grid
from cqd_jax.report.family_tree import draw_family_tree
from cqd_jax.report.record import RunRecord

WIDTH = 7.0
"""Inches across a page of two columns."""

STYLE: Any = {
  "font.size": 8,
  "axes.titlesize": 9,
  "axes.labelsize": 8,
  "axes.linewidth": 0.6,
  "legend.fontsize": 8,
  "figure.titlesize": 9,
  "lines.linewidth": 1.3,
}

LINE_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito 2008, told apart whatever one's color vision; without its yellow, which is lost on white."""

LINE_STYLES = ("-", "--", ":", "-.")
MARKERS = ("o", "s", "^", "v", "P", "X", "*", "<")  # one more than colors: no pair comes twice soon


@matplotlib.rc_context(STYLE)
def archives_figure(record: RunRecord, batch: int | None = None) -> Figure:
  """All archives, experts boxed red: strips for two tasks, maps for three, else one panel per pair of axes.

  A panel with further tasks behind it shows the best elite over these. Without a grid every individual that the
  archive took is a point.

  Args:
    record: of a run.
    batch: draws the archives as they were after it; None: after the last.
  """
  num_tasks = len(record.task_names)
  down, across = panel_grid(num_tasks)
  width = max(WIDTH, 1.75 * across + 0.8)
  each = 1.6 if num_tasks == 2 else 2.25 if num_tasks == 3 else 1.75
  height = down * each + 0.3 * (batch is not None)
  figure = Figure(figsize=(width, height), layout="constrained")
  axes = figure.subplots(down, across, squeeze=False).reshape(num_tasks, -1)
  for archive, row in enumerate(axes):
    view = _view(record, archive, batch)
    limits = _limits([view])
    for ax, pair in zip(row, pairs_of_axes(archive, num_tasks), strict=True):
      image = draw_panel(ax, view, pair, limits=limits, size=0.6)
      label_panel(ax, pair, record.task_names)
      ax.xaxis.set_major_locator(_few_ticks())
      ax.set_xlabel(_wrapped(ax.get_xlabel(), width / across - 0.6))
      ax.set_ylabel(_wrapped(ax.get_ylabel(), each - 0.6))
    title = f"archive {record.task_names[archive]}: {_count(record, view)}"
    # A strip has no labels at its left, above which a title could begin.
    room = width if len(row) > 1 else width / across - (1.3 if num_tasks == 2 else 0.4)
    row[(len(row) - 1) // 2].set_title(_wrapped(title, room))
    label = _wrapped(f"{record.task_names[archive]} score (fitness)", each - 0.6)
    bar = figure.colorbar(image, ax=list(row), label=label, pad=0.03 if len(row) > 1 else 0.05)
    bar.outline.set_linewidth(0.6)
  if batch is not None:
    figure.suptitle(f"after batch {batch}")
  return _finished(figure)


@matplotlib.rc_context(STYLE)
def timeline_figure(record: RunRecord, moments: int = 5) -> Figure:
  """A film strip: one row per archive, one column per moment from the start to the last batch, one color scale a row.

  With more than three tasks an archive is seen along the first two of its axes, the best elite over the others.

  Args:
    record: of a run.
    moments: how many; fewer where there were fewer batches.

  Raises:
    ValueError: if `moments` is below 2.
  """
  if moments < 2:
    raise ValueError(f"moments: expected at least 2, got {moments}")
  num_tasks = len(record.task_names)
  batches = np.unique(np.linspace(0, _last_batch(record), moments).round().astype(int)).tolist()
  height = num_tasks * (1.0 if num_tasks == 2 else 1.5) + 0.3
  figure = Figure(figsize=(WIDTH, height), layout="constrained")
  axes = figure.subplots(num_tasks, len(batches), squeeze=False, sharex="row", sharey="row")
  for archive, row in enumerate(axes):
    pair = pairs_of_axes(archive, num_tasks)[0]
    views = [_view(record, archive, batch) for batch in batches]
    limits = _limits(views)
    for ax, view, batch in zip(row, views, batches, strict=True):
      image = draw_panel(ax, view, pair, limits=limits, size=0.5)
      ax.xaxis.set_major_locator(_few_ticks())
      if ax is row[(len(row) - 1) // 2]:  # its tasks are those of the whole row
        ax.set_xlabel(f"{record.task_names[pair[0]]} score")
      if archive == 0:
        ax.set_title("batch 0 (experts)" if batch == 0 else f"batch {batch}")
    room = height / num_tasks - 0.4
    if len(pair) == 2:
      row[0].set_ylabel(_wrapped(f"{record.task_names[pair[1]]} score", room))
    else:
      row[0].set_yticks([])
    label = _wrapped(f"archive {record.task_names[archive]}:\nfitness", room)
    bar = figure.colorbar(image, ax=list(row), label=label, pad=0.03)
    bar.outline.set_linewidth(0.6)
  return _finished(figure)


@matplotlib.rc_context(STYLE)
def curves_figure(record: RunRecord) -> Figure:
  """Coverage, QD score and best fitness by task, and the best mean score, after each batch.

  Raises:
    ValueError: if there are no metrics.
  """
  if not _num_measured(record):
    raise ValueError("record.metrics: expected figures of at least one batch, got none")
  figure = Figure(figsize=(WIDTH, 4.2), layout="constrained")
  axes = figure.subplots(2, 2, sharex=True).reshape(-1)
  named = {
    "coverage": "coverage (share of cells)",
    "qd_score": "QD score",
    "max_fitness": "best fitness",
    "best_mean": "best mean score over tasks",
  }
  for ax, (name, title) in zip(axes, named.items(), strict=True):
    values = np.asarray(record.metrics[name], float)
    batches = np.arange(1, len(values) + 1)
    marker = "o" if len(values) == 1 else ""
    if values.ndim == 1:
      ax.plot(batches, values, color="black", marker=marker)
    for task, curve in enumerate(values.T if values.ndim == 2 else ()):
      ax.plot(batches, curve, marker=marker, label=f"archive {record.task_names[task]}", **_line(task))
    ax.set_title(title)
    ax.xaxis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
    _open_frame(ax)
    ax.grid(color="0.9", linewidth=0.5)
  for ax in axes[2:]:
    ax.set_xlabel("batch")
  _draw_legend(figure, axes[0], "outside lower center")
  return _finished(figure)


@matplotlib.rc_context(STYLE)
def family_tree_figure(record: RunRecord, identity: int | None = None) -> Figure:
  """All ancestors of an individual back to the experts, by batch born; color is the mean score.

  Args:
    record: of a run.
    identity: whose ancestors; None: those of the best elite, `record.best`.

  Raises:
    ValueError: if there is no such individual, or no best elite.
  """
  if identity is None:
    if record.best is None:
      raise ValueError("identity: expected one, since the record has no best elite (record.best is None)")
    identity = record.best
  if not 0 <= identity < len(record.individuals):
    raise ValueError(f"identity: expected 0 to {len(record.individuals) - 1}, got {identity}")
  return _finished(draw_family_tree(record, identity, WIDTH))


@matplotlib.rc_context(STYLE)
def scores_figure(record: RunRecord) -> Figure:
  """The score table as dots: one line per method, one dot a task, a diamond and a number for their mean.

  Methods without scores of one model (only a swarm) are left out.

  Raises:
    ValueError: if no method has scores.
  """
  rows = _scored_rows(record)
  if not rows:
    raise ValueError("record.rows: expected at least one with scores, got none")
  names = [_wrapped(row["name"], 2.0) for row in rows]
  figure = Figure(figsize=(WIDTH, 0.9 + 0.3 * len(rows)), layout="constrained")
  ax = figure.subplots()
  heights = np.arange(len(rows))
  # Equal scores would hide each other: each task has its own level within the line of a method.
  levels = np.linspace(-0.22, 0.22, len(record.task_names))
  for task, name in enumerate(record.task_names):
    values = np.array([_number(row["scores"].get(name)) for row in rows])
    marker = MARKERS[task % len(MARKERS)]
    color = LINE_COLORS[task % len(LINE_COLORS)]
    ax.plot(values, heights + levels[task], marker, color=color, markersize=4.5, label=name)
  means = np.array([_number(row["mean"]) for row in rows])
  ax.plot(means, heights, "D", markerfacecolor="none", markeredgecolor="black", markersize=6, label="mean over tasks")
  ax.set_yticks(heights, names)
  ax.set_ylim(len(rows) - 0.5, -0.5)
  ax.set_xlabel("share of test questions answered right")
  for height in heights[1::2]:
    ax.axhspan(height - 0.5, height + 0.5, color="0.955", linewidth=0, zorder=0)
  place: dict[str, Any] = {"xycoords": ax.get_yaxis_transform(), "va": "center", "ha": "left", "annotation_clip": False}
  ax.annotate("mean", (1.02, -0.75), **place)
  for height, mean in zip(heights, means, strict=True):
    if np.isfinite(mean):
      ax.annotate(f"{mean:.3f}", (1.02, height), weight="bold" if mean == np.nanmax(means) else "normal", **place)
  ax.grid(axis="x", color="0.9", linewidth=0.5)
  _open_frame(ax)
  _draw_legend(figure, ax, "outside upper center")
  return _finished(figure)


def all_figures(record: RunRecord) -> dict[str, Figure]:
  """Every figure that a run, finished or not, has the data for, by name."""
  made: dict[str, tuple[bool, Callable[[RunRecord], Figure]]] = {
    "archives": (len(record.individuals) > 0, archives_figure),
    "timeline": (_last_batch(record) > 0, timeline_figure),
    "curves": (_num_measured(record) > 0, curves_figure),
    "family_tree": (record.best is not None, family_tree_figure),
    "scores": (bool(_scored_rows(record)), scores_figure),
  }
  return {name: figure(record) for name, (has_data, figure) in made.items() if has_data}


def _view(record: RunRecord, archive: int, batch: int | None) -> ArchiveView:
  individuals = record.individuals
  held = np.array(sorted(record.elites(archive, batch).values()), int)
  # An expert whose scoring failed is nowhere.
  experts = np.flatnonzero(np.isfinite(individuals.scores[: record.num_experts]).all(axis=1))
  view = ArchiveView(archive, individuals.scores[held], individuals.scores[experts])
  if record.edges is None or record.bins is None:
    return view
  return dataclasses.replace(view, edges=record.edges, bins=record.bins[held], expert_bins=record.bins[experts])


def _limits(views: Sequence[ArchiveView]) -> tuple[float, float] | None:
  """The range of fitness over views; None if there is none."""
  fitness = np.concatenate([view.scores[:, view.archive] for view in views])
  return (float(fitness.min()), float(fitness.max())) if len(fitness) else None


def _count(record: RunRecord, view: ArchiveView) -> str:
  return f"{len(view.scores)} {'taken' if record.edges is None else 'elites'}"


def _last_batch(record: RunRecord) -> int:
  return int(record.individuals.born.max(initial=0))


def _num_measured(record: RunRecord) -> int:
  return len(record.metrics.get("coverage", ()))


def _scored_rows(record: RunRecord) -> list[Any]:
  return [row for row in record.rows if row["scores"]]


def _number(value: float | None) -> float:
  return np.nan if value is None else float(value)


def _line(task: int) -> dict[str, Any]:
  return {
    "color": LINE_COLORS[task % len(LINE_COLORS)],
    "linestyle": LINE_STYLES[task % len(LINE_STYLES)],
  }


def _few_ticks() -> MaxNLocator:
  """So few that their labels fit below the narrowest panel."""
  return MaxNLocator(3, steps=[1, 2, 4, 5, 10])


def _wrapped(text: str, inches: float) -> str:
  """Breaks lines between words so that text of 8 points does not run beyond a width."""
  width = max(1, int(inches * 72 / 4.6))
  lines = [textwrap.wrap(part, width, break_long_words=False) for part in text.split("\n")]
  return "\n".join(line for part in lines for line in part)


def _draw_legend(figure: Figure, ax: Any, place: Any) -> None:
  """Names the lines of `ax` in as many columns as there is room for."""
  lines, labels = ax.get_legend_handles_labels()
  columns = int(72 * WIDTH / (4.6 * max(map(len, labels)) + 45))
  figure.legend(handles=lines, labels=labels, loc=place, ncols=max(1, min(columns, len(lines))), frameon=False)


def _open_frame(ax: Any) -> None:
  ax.spines[["top", "right"]].set_visible(False)


def _finished(figure: Figure) -> Figure:
  """Sets the ticks' size: they are made when drawn, when the style is no longer in force."""
  for ax in figure.axes:
    ax.tick_params(which="major", labelsize=8, length=2.5, width=0.6, pad=2)
    ax.tick_params(which="minor", length=0)
  return figure
