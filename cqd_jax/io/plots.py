"""Pictures of archives in the paper's style: axes are descriptors, colour is fitness, red boxes are the experts."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from cqd_jax.archive import CyclingRepertoire, Grid

COLOURS = matplotlib.colormaps["viridis"]


def plot_archives(
  repertoire: CyclingRepertoire,
  task_names: Sequence[str],
  *,
  experts: Float[np.ndarray, "E K"] | None = None,
) -> Figure:
  """Draws all archives: one row an archive, one panel each pair of its descriptors (one descriptor: a strip).

  A panel with further descriptors behind it (K > 3) shows the best elite over these. Voronoi cells are drawn as points
  at their elites' scores.

  Args:
    repertoire: what to draw.
    task_names: K names.
    experts: scores of the initial experts, to be boxed in red.

  Raises:
    ValueError: if there are not K names.
  """
  num_tasks = repertoire.num_tasks
  if len(task_names) != num_tasks:
    raise ValueError(f"task_names: expected {num_tasks}, got {len(task_names)}")
  panels = [_panels_of_archive(archive, num_tasks) for archive in range(num_tasks)]
  # Three small archives stand side by side; many panels an archive make a row each.
  across = num_tasks if len(panels[0]) == 1 else len(panels[0])
  down = -(-sum(map(len, panels)) // across)
  figure = Figure(figsize=(4.1 * across, 3.6 * down), layout="constrained")
  axes = figure.subplots(down, across, squeeze=False).reshape(-1)
  for ax, (archive, pair) in zip(axes, itertools.chain.from_iterable(panels), strict=True):
    _draw_panel(figure, ax, repertoire, archive, pair, task_names, experts)
  return figure


def save_figure(figure: Figure, path: Path) -> None:
  """Writes a figure in the format that the path's ending names (png, svg, pdf)."""
  path.parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(path, dpi=150)


def _panels_of_archive(archive: int, num_tasks: int) -> list[tuple[int, tuple[int, ...]]]:
  others = [task for task in range(num_tasks) if task != archive]
  pairs: list[tuple[int, ...]] = list(itertools.combinations(others, 2)) or [(others[0],)]
  return [(archive, pair) for pair in pairs]


def _draw_panel(
  figure: Figure,
  ax: Any,
  repertoire: CyclingRepertoire,
  archive: int,
  pair: tuple[int, ...],
  task_names: Sequence[str],
  experts: Float[np.ndarray, "E K"] | None,
) -> None:
  slots = np.asarray(repertoire.slots[archive])
  scores = np.asarray(repertoire.scores)[slots[slots >= 0]]
  if isinstance(repertoire.cells, Grid):
    image = _draw_cells(ax, repertoire.cells, archive, pair, scores)
    for expert in experts if experts is not None else ():
      ax.add_patch(_box(repertoire.cells, pair, expert))
  else:
    second = scores[:, pair[1]] if len(pair) == 2 else np.zeros(len(scores))
    image = ax.scatter(scores[:, pair[0]], second, c=scores[:, archive], cmap=COLOURS, s=14)
    for expert in experts if experts is not None else ():
      position = (expert[pair[0]], expert[pair[1]] if len(pair) == 2 else 0)
      ax.plot(*position, marker="s", markersize=11, markerfacecolor="none", markeredgecolor="red")
  ax.set_xlabel(f"{task_names[pair[0]]} score")
  if len(pair) == 2:
    ax.set_ylabel(f"{task_names[pair[1]]} score")
  else:
    ax.set_yticks([])
  ax.set_title(f"archive {task_names[archive]}: {len(scores)} elites", fontsize=10)
  figure.colorbar(image, ax=ax, label=f"{task_names[archive]} score (fitness)")


def _draw_cells(ax: Any, grid: Grid, archive: int, pair: tuple[int, ...], scores: Float[np.ndarray, "E K"]) -> Any:
  """Fills each cell with the best fitness found in it; empty cells stay white."""
  shape = [grid.shape[task] for task in pair] + [1] * (2 - len(pair))
  best = np.full(shape, np.nan)
  for elite in scores:
    cell = _cell(grid, pair, elite)
    best[cell] = np.nanmax([best[cell], elite[archive]])
  edges = [grid.edges(task) for task in pair]
  vertical = edges[1] if len(pair) == 2 else np.array([0.0, 1.0])
  image = ax.pcolormesh(edges[0], vertical, np.ma.masked_invalid(best.T), cmap=COLOURS)
  if not len(scores):
    image.set_clim(0, 1)
  ax.set_xticks(edges[0], minor=True)
  ax.set_yticks(vertical, minor=True)
  ax.grid(which="minor", color="0.88", linewidth=0.4)
  ax.set_axisbelow(False)
  return image


def _cell(grid: Grid, pair: tuple[int, ...], scores: Float[np.ndarray, "K"]) -> tuple[int, int]:
  """Column and row of a panel that scores fall in, by the grid's own rule."""
  bins = [
    int(np.clip(np.searchsorted(grid.edges(task), np.float32(scores[task])) - 1, 0, grid.shape[task] - 1))
    for task in pair
  ]
  return bins[0], bins[1] if len(bins) == 2 else 0


def _box(grid: Grid, pair: tuple[int, ...], expert: Float[np.ndarray, "K"]) -> Rectangle:
  column, row = _cell(grid, pair, expert)
  x = grid.edges(pair[0])
  y = grid.edges(pair[1]) if len(pair) == 2 else np.array([0.0, 1.0])
  return Rectangle(
    (float(x[column]), float(y[row])),
    float(x[column + 1] - x[column]),
    float(y[row + 1] - y[row]),
    fill=False,
    edgecolor="red",
    linewidth=2,
    zorder=3,
  )
