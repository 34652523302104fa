"""The family tree of an individual as a figure: who its ancestors are, when they were born and how well they score."""

from collections import Counter
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from matplotlib.path import Path

from cqd_jax.report.archive_plot import COLORS
from cqd_jax.report.record import RunRecord

MOST_LABELS = 100
"""Up to so many individuals each bears its number."""

FEWER_LABELS = 40
"""How many bear one where there are more individuals than that."""

DOT = 6.0
"""Diameter of an individual without a number, in points."""

POINTS_A_DIGIT = 4.2
"""Width of a digit in the numbers' size of type."""


def draw_family_tree(record: RunRecord, identity: int, width: float) -> Figure:
  """Draws an individual and all its ancestors: one column per batch born, a curve from each parent to its child.

  Columns are evenly spaced; batches in which no ancestor was born have none. Individuals stand in lanes, near their
  parents' and apart from each other. Color is the mean score; experts are boxed red and named; a black ring marks the
  individual itself. Numbers are identities; in large trees only the experts, the individual and those with most
  children bear one, and the title says how many do.

  Args:
    record: of a run.
    identity: of an individual in it.
    width: of the figure in inches; its height follows from the number of lanes.
  """
  family = np.array(record.ancestors(identity))
  born = record.individuals.born[family]
  batches, columns = np.unique(born, return_inverse=True)
  edges = _edges(record, family)
  labeled = _labeled(edges, family, born)
  diameters = np.where(labeled, POINTS_A_DIGIT * len(str(family.max())) + 6, DOT)
  names = {int(one): _founder_name(record, int(one)) for one in family[born == 0]}
  # What remains of the width beside the experts' names and the color bar.
  room = max(72.0, 72 * width - 75 - 5 * max((len(name) for name in names.values()), default=0))
  step = room / max(len(batches) - 1, 1)
  pitch = float(diameters.min()) + 5
  lanes = _lanes(columns * step, edges, family, diameters, pitch)
  height = max(2.0, (np.ptp(lanes) * pitch + 2 * diameters.max()) / 72 + 0.75)
  figure = Figure(figsize=(width, height), layout="constrained")
  ax = figure.subplots()
  _draw_edges(ax, edges, dict(zip(family.tolist(), zip(columns.tolist(), lanes.tolist(), strict=True), strict=True)))
  nodes = _draw_nodes(ax, record, family, columns, lanes, diameters)
  _draw_labels(ax, nodes, family, columns, lanes, labeled)
  for expert, name in names.items():
    where = (0, lanes[family == expert][0])
    ax.annotate(name, where, (-diameters.max() / 2 - 6, 0), textcoords="offset points", ha="right", va="center")
  _draw_frame(ax, batches, lanes, step, pitch, float(diameters.max()))
  ax.set_title(_title(identity, len(family), int(labeled.sum())))
  bar = figure.colorbar(nodes, ax=ax, label="mean score over tasks", pad=0.02, shrink=min(1, 3 / height), aspect=25)
  bar.outline.set_linewidth(0.6)
  return figure


def _edges(record: RunRecord, family: np.ndarray) -> list[tuple[int, int]]:
  """Each parent and child of the family once, also where both parents are one."""
  pairs = {(int(parent), int(child)) for child in family for parent in record.individuals.parents[child] if parent >= 0}
  return sorted(pairs)


def _labeled(edges: list[tuple[int, int]], family: np.ndarray, born: np.ndarray) -> np.ndarray:
  """Who of the family bears its number."""
  if len(family) <= MOST_LABELS:
    return np.ones(len(family), bool)
  counts = Counter(parent for parent, _ in edges)
  children = np.array([counts[int(one)] for one in family])
  first = (born == 0) | (family == family.max())
  order = np.lexsort((family, -children, ~first))
  labeled = np.zeros(len(family), bool)
  labeled[order[: max(FEWER_LABELS, int(first.sum()))]] = True
  return labeled


def _lanes(
  x: np.ndarray, edges: list[tuple[int, int]], family: np.ndarray, diameters: np.ndarray, pitch: float
) -> np.ndarray:
  """A whole number for each of the family, so that no two discs touch.

  Parents stand before their children in `family`, so each takes the free lane that is nearest to its parents' mean.

  Args:
    x: `[F]` position in points.
    edges: parent and child.
    family: `[F]` identities, ascending.
    diameters: `[F]` in points.
    pitch: points from one lane to the next.
  """
  place = {int(one): index for index, one in enumerate(family)}
  parents: list[list[int]] = [[] for _ in family]
  for parent, child in edges:
    parents[place[child]].append(place[parent])
  founders = [index for index, above in enumerate(parents) if not above]
  # As many lanes as would hold all, shared out among those without parents.
  fair = 1.5 * float(((diameters + 3) ** 2).sum()) / (float(np.ptp(x)) + float(diameters.max())) / pitch
  apart = max(float(diameters.max() + 5) / pitch, fair / max(len(founders), 1))
  middle = apart * (len(founders) - 1) / 2
  band = middle + fair
  lanes = np.zeros(len(family), int)
  for index, above in enumerate(parents):
    # A little towards the middle, and first of all in the band: each being pushed aside by the last, long lines of
    # descent would drift away.
    wish = 0.85 * float(np.mean(lanes[above])) + 0.15 * middle if above else apart * founders.index(index)
    clearance = (diameters[:index] + diameters[index]) / 2 + 3
    near = np.abs(x[:index] - x[index]) < clearance
    # More lanes than those nearby can take up.
    reach = int((2 * clearance[near] / pitch + 1).sum() + 2 * band) + 2
    choice = np.arange(int(wish) - reach, int(wish) + reach + 1)
    off = np.abs(choice - middle)
    choice = choice[np.lexsort((off, np.abs(choice - wish), off > band))]
    free = (np.abs(choice[:, None] - lanes[:index][near]) * pitch >= clearance[near]).all(axis=1)
    lanes[index] = choice[np.argmax(free)]
  return lanes


def _draw_frame(ax: Any, batches: np.ndarray, lanes: np.ndarray, step: float, pitch: float, diameter: float) -> None:
  """Leaves room for discs at the borders and names as many batches as fit."""
  margin = diameter / 2 + 3
  ax.set_xlim(-margin / step, max(len(batches) - 1, 1) + margin / step)
  ax.set_ylim(lanes.max() + (margin + 3) / pitch, lanes.min() - (margin + 3) / pitch)
  ax.set_yticks([])
  ax.spines[["left", "right", "top"]].set_visible(False)
  ax.set_xlabel("batch born")
  every = max(1, int(np.ceil((5 * len(str(batches[-1])) + 5) / step)))
  ax.set_xticks(np.arange(len(batches))[::every], batches[::every].tolist())


def _draw_edges(ax: Any, edges: list[tuple[int, int]], places: dict[int, tuple[int, int]]) -> None:
  for parent, child in edges:
    (x, y), (to_x, to_y) = places[parent], places[child]
    middle = (x + to_x) / 2
    curve = Path(
      [(x, y), (middle, y), (middle, to_y), (to_x, to_y)], [Path.MOVETO, Path.CURVE4, Path.CURVE4, Path.CURVE4]
    )
    ax.add_patch(PathPatch(curve, fill=False, edgecolor="0.6", linewidth=0.7, zorder=1, gid=f"edge-{parent}-{child}"))


def _draw_nodes(
  ax: Any, record: RunRecord, family: np.ndarray, columns: np.ndarray, lanes: np.ndarray, diameters: np.ndarray
) -> Any:
  """Discs, red boxes around the experts and a ring around the youngest, whose tree it is."""
  means = record.individuals.scores[family].mean(axis=1)
  nodes = ax.scatter(
    columns,
    lanes,
    s=diameters**2,
    c=means,
    cmap=COLORS.with_extremes(bad="0.8"),
    plotnonfinite=True,
    edgecolors="white",
    linewidths=0.8,
    zorder=2,
    gid="individuals",
  )
  if not np.isfinite(means).any():
    nodes.set_clim(0, 1)
  ring: dict[str, Any] = {"c": "none", "edgecolors": "black", "linewidths": 1.4, "zorder": 3}
  ax.scatter(columns[-1:], lanes[-1:], s=(diameters[-1:] + 1) ** 2, **ring)
  experts = record.individuals.born[family] == 0
  box: dict[str, Any] = {
    "c": "none",
    "marker": "s",
    "edgecolors": "red",
    "linewidths": 1.2,
    "zorder": 3,
    "gid": "experts",
  }
  ax.scatter(columns[experts], lanes[experts], s=(diameters[experts] + 3) ** 2, **box)
  return nodes


def _draw_labels(
  ax: Any, nodes: Any, family: np.ndarray, columns: np.ndarray, lanes: np.ndarray, labeled: np.ndarray
) -> None:
  """Numbers inside the discs, black or white by which is read more easily."""
  colors = nodes.to_rgba(nodes.get_array())
  for index in np.flatnonzero(labeled):
    dark = colors[index, :3] @ np.array([0.299, 0.587, 0.114]) < 0.5
    place: dict[str, Any] = {"ha": "center", "va": "center_baseline", "size": 6.5, "zorder": 4}
    ax.text(columns[index], lanes[index], str(family[index]), color="white" if dark else "black", **place)


def _founder_name(record: RunRecord, founder: int) -> str:
  """Experts are one per task, in order, unless there are more or fewer."""
  if founder >= record.num_experts:
    return record.individuals.mutation[founder]
  if record.num_experts == len(record.task_names):
    return f"expert {record.task_names[founder]}"
  return f"expert {founder}"


def _title(identity: int, members: int, labels: int) -> str:
  ancestors = members - 1
  title = f"individual {identity} and its {ancestors} ancestor{'' if ancestors == 1 else 's'}"
  if labels < members:
    title += f"\n(numbers on {labels} of {members}: the experts, itself and those with most children)"
  return title
