"""Pictures of archives in the paper's style: axes are descriptors, color is fitness, red boxes are the experts."""

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from jaxtyping import Float, Int
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from cqd_jax.archive import CyclingRepertoire, Grid

COLORS = matplotlib.colormaps["viridis"]


@dataclasses.dataclass(frozen=True)
class ArchiveView:
  """One archive as it is drawn.

  Attributes:
    archive: its number, which is that of the task whose score is its fitness.
    scores: of its elites.
    experts: scores of the experts, to be boxed in red.
    edges: of the grid cells by task, K arrays; None where cells are Voronoi cells.
    bins: cell of each elite along each task; None as `edges`.
    expert_bins: cell of each expert along each task; None as `edges`.
  """

  archive: int
  scores: Float[np.ndarray, "N K"]
  experts: Float[np.ndarray, "E K"]
  edges: Sequence[np.ndarray] | None = None
  bins: Int[np.ndarray, "N K"] | None = None
  expert_bins: Int[np.ndarray, "E K"] | None = None


def plot_archives(
  repertoire: CyclingRepertoire,
  task_names: Sequence[str],
  *,
  experts: Float[np.ndarray, "E K"] | None = None,
) -> Figure:
  """Draws all archives: one row per archive, one panel for each pair of its descriptors (one descriptor: a strip).

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
  pairs = [pairs_of_axes(archive, num_tasks) for archive in range(num_tasks)]
  down, across = panel_grid(num_tasks)
  figure = Figure(figsize=(4.1 * across, 3.6 * down), layout="constrained")
  axes = iter(figure.subplots(down, across, squeeze=False).reshape(-1))
  for archive, view in enumerate(_views(repertoire, experts)):
    for pair in pairs[archive]:
      ax = next(axes)
      image = draw_panel(ax, view, pair)
      label_panel(ax, pair, task_names)
      ax.set_title(f"archive {task_names[archive]}: {len(view.scores)} elites", fontsize=10)
      figure.colorbar(image, ax=ax, label=f"{task_names[archive]} score (fitness)")
  return figure


def save_figure(figure: Figure, path: Path) -> None:
  """Writes a figure in the format that the path's ending names (png, svg, pdf).

  Text stays text in SVG and PDF, and the same figure gives the same bytes: nothing in it says when it was written.
  """
  path.parent.mkdir(parents=True, exist_ok=True)
  undated: dict[str, dict[str, Any]] = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
  with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "cqd_jax", "pdf.fonttype": 42}):
    figure.savefig(path, dpi=150, metadata=undated.get(path.suffix.lower()))


def pairs_of_axes(archive: int, num_tasks: int) -> list[tuple[int, ...]]:
  """The panels of an archive: each pair of the other tasks, or the one other task."""
  others = [task for task in range(num_tasks) if task != archive]
  return list(itertools.combinations(others, 2)) or [(others[0],)]


def panel_grid(num_tasks: int) -> tuple[int, int]:
  """Rows and columns of all archives' panels: small archives stand side by side, many panels an archive make a row."""
  panels = len(pairs_of_axes(0, num_tasks))
  return (1, num_tasks) if panels == 1 else (num_tasks, panels)


def draw_panel(
  ax: Any,
  view: ArchiveView,
  pair: tuple[int, ...],
  *,
  limits: tuple[float, float] | None = None,
  size: float = 1.0,
) -> Any:
  """Draws an archive along one or two descriptors, experts boxed.

  Args:
    ax: matplotlib axes.
    view: what to draw.
    pair: task along x, and task along y; without the latter the panel is a strip.
    limits: fitness at both ends of the color scale; None: those of what is drawn.
    size: factor for points and for the lines of boxes, for panels smaller than usual.

  Returns:
    What a color bar is made from.
  """
  image = _draw_points(ax, view, pair, size) if view.edges is None else _draw_cells(ax, view, view.edges, pair, size)
  if limits is not None:
    image.set_clim(*limits)
  elif not len(view.scores):
    image.set_clim(0, 1)
  return image


def label_panel(ax: Any, pair: tuple[int, ...], task_names: Sequence[str]) -> None:
  """Names the descriptors at the axes."""
  ax.set_xlabel(f"{task_names[pair[0]]} score")
  if len(pair) == 2:
    ax.set_ylabel(f"{task_names[pair[1]]} score")
  else:
    ax.set_yticks([])


def _views(repertoire: CyclingRepertoire, experts: Float[np.ndarray, "E K"] | None) -> list[ArchiveView]:
  scores = np.asarray(repertoire.scores)
  if experts is None:
    experts = np.zeros((0, repertoire.num_tasks), np.float32)
  cells = repertoire.cells
  edges = bins = expert_bins = None
  if isinstance(cells, Grid):
    edges = [cells.edges(task) for task in range(repertoire.num_tasks)]
    bins, expert_bins = np.asarray(cells.bins(scores)), np.asarray(cells.bins(experts))
  views = []
  for archive in range(repertoire.num_tasks):
    slots = np.asarray(repertoire.slots[archive])
    held = slots[slots >= 0]
    own = None if bins is None else bins[held]
    views.append(ArchiveView(archive, scores[held], experts, edges, own, expert_bins))
  return views


def _draw_points(ax: Any, view: ArchiveView, pair: tuple[int, ...], size: float) -> Any:
  """Elites at their scores, the best on top."""
  points = view.scores[np.argsort(view.scores[:, view.archive])]
  second = points[:, pair[1]] if len(pair) == 2 else np.zeros(len(points))
  image = ax.scatter(points[:, pair[0]], second, c=points[:, view.archive], cmap=COLORS, s=14 * size**2)
  for expert in view.experts:
    position = (expert[pair[0]], expert[pair[1]] if len(pair) == 2 else 0)
    ax.plot(*position, marker="s", markersize=11 * size, markerfacecolor="none", markeredgecolor="red")
  return image


def _draw_cells(ax: Any, view: ArchiveView, edges: Sequence[np.ndarray], pair: tuple[int, ...], size: float) -> Any:
  """Fills each cell with the best fitness found in it; empty cells stay white."""
  assert view.bins is not None
  assert view.expert_bins is not None
  x = edges[pair[0]]
  y = edges[pair[1]] if len(pair) == 2 else np.array([0.0, 1.0])
  best = np.full((len(y) - 1, len(x) - 1), np.nan)
  np.fmax.at(best, _rows_and_columns(view.bins, pair), view.scores[:, view.archive])
  image = ax.pcolormesh(x, y, np.ma.masked_invalid(best), cmap=COLORS)
  ax.set_xticks(x, minor=True)
  ax.set_yticks(y, minor=True)
  ax.grid(which="minor", color="0.88", linewidth=0.4)
  ax.set_axisbelow(False)
  for row, column in zip(*_rows_and_columns(view.expert_bins, pair), strict=True):
    corner, width, height = (float(x[column]), float(y[row])), x[column + 1] - x[column], y[row + 1] - y[row]
    box = Rectangle(corner, float(width), float(height), fill=False, edgecolor="red", linewidth=2 * size, zorder=3)
    ax.add_patch(box)
  return image


def _rows_and_columns(bins: Int[np.ndarray, "N K"], pair: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
  """Where in a panel, which is an image, cells lie."""
  rows = bins[:, pair[1]] if len(pair) == 2 else np.zeros(len(bins), int)
  return rows, bins[:, pair[0]]
