"""How much of experts' task vectors low-rank approximations hold, as a figure for a paper."""

from collections.abc import Mapping

import matplotlib
import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from cqd_jax.report.figures import LINE_COLORS, LINE_STYLES, MARKERS, STYLE

WIDTH = 5.0
"""Inches."""

LEVELS = (0.9, 0.99)
"""Shares that are marked by a line."""


@matplotlib.rc_context(STYLE)
def energy_figure(curves: Mapping[str, Float[np.ndarray, " R"]]) -> Figure:
  """One line per expert: the share of its energy, in [0, 1], that is held by rank 1, 2, ... R.

  Args:
    curves: by the name of the expert; of one R, at least 1.

  Raises:
    ValueError: if there is no curve.
  """
  if not curves:
    raise ValueError("curves: expected at least one expert that changes a matrix, got none")
  figure = Figure(figsize=(WIDTH, 3.2), layout="constrained")
  ax = figure.subplots()
  size = max(map(len, curves.values()))
  ticks = [rank for rank in doublings(size) if rank == size or 1.4 * rank <= size]  # or labels would meet
  for level in LEVELS:
    ax.axhline(level, color="0.6", linewidth=0.6, zorder=0)
    ax.annotate(
      f"{level:.0%}", (1.01, level), xycoords=ax.get_yaxis_transform(), va="center", color="0.4", annotation_clip=False
    )
  for number, (name, energy) in enumerate(curves.items()):
    ax.plot(
      np.arange(1, len(energy) + 1),
      energy,
      color=LINE_COLORS[number % len(LINE_COLORS)],
      linestyle=LINE_STYLES[number % len(LINE_STYLES)],
      marker=MARKERS[number % len(MARKERS)],
      markersize=4,
      markevery=[rank - 1 for rank in doublings(len(energy))],
      label=name,
    )
  ax.set_xscale("log", base=2)
  ax.set_xticks(ticks, [str(rank) for rank in ticks])
  ax.set_ylim(0, 1.03)
  ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
  ax.set_xlabel("rank of the approximation of each matrix")
  ax.set_ylabel("energy held (share of the squared norm)")
  ax.grid(color="0.9", linewidth=0.5)
  ax.spines[["top", "right"]].set_visible(False)
  # The ticks are made when drawn, when the style is no longer in force.
  ax.tick_params(which="major", labelsize=8, length=2.5, width=0.6, pad=2)
  ax.tick_params(which="minor", length=0)
  figure.legend(loc="outside upper center", ncols=min(4, len(curves)), frameon=False)
  return figure


def doublings(most: int) -> list[int]:
  """1, 2, 4, ... and `most`."""
  return [*(2**power for power in range((most - 1).bit_length())), most]
