"""How the K-1 descriptors of an archive are cut into cells: a regular grid, or the Voronoi cells of centroids.

Archive k files an individual under its scores on the other K-1 tasks, in ascending order of task. Both kinds of
cells answer the same three questions (`index`, `centroids`, `num_cells`), so a repertoire knows nothing of them.
"""

import dataclasses
import functools
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Num
from qdax.core.containers.mapelites_repertoire import compute_cvt_centroids

from cqd_jax.types import ArrayField, PRNGKey

Numbers: TypeAlias = Sequence[float | int] | np.ndarray | jax.Array

MIN_TASKS, MAX_TASKS = 2, 8
MAX_GRID_CELLS = 2**24


def other_tasks(num_tasks: int) -> Int[np.ndarray, "K D"]:
  """Row k: the tasks whose scores are the descriptors of archive k, ascending."""
  return np.array([[j for j in range(num_tasks) if j != k] for k in range(num_tasks)])


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Grid:
  """A regular grid over the K scores; archive k uses its K-1 dimensions other than k.

  Dimension i is cut by the `shape[i] + 1` edges `float32(linspace(lower[i], upper[i], shape[i] + 1))`, computed in
  float64. A score that lies on an inner edge belongs to the lower cell, and a score outside the bounds to the end
  cell: `numpy.digitize(score, edges, right=True) - 1`, clamped, as in the reference code of CycleQD
  (arXiv:2410.14735). Cells are numbered in row-major order.

  Attributes:
    lower: K finite lower bounds, in the unit of the scores.
    upper: K finite upper bounds, above `lower` (still so in float32).
    shape: K numbers of cells, each at least 1.

  Raises:
    ValueError: naming the attribute, where lengths differ, K is not in 2..8, a bound is not finite, a range is empty
      or an archive would have more than 2**24 cells (use `Centroids` there).
  """

  lower: tuple[float, ...]
  upper: tuple[float, ...]
  shape: tuple[int, ...]

  def __init__(self, lower: Numbers, upper: Numbers, shape: Sequence[int] | np.ndarray):
    for name, value, kind in (
      ("lower", lower, float),
      ("upper", upper, float),
      ("shape", shape, int),
    ):
      object.__setattr__(self, name, tuple(kind(entry) for entry in value))
    self._check()

  def _check(self) -> None:
    check_num_tasks(len(self.shape), "shape")
    for name in ("lower", "upper"):
      bounds = getattr(self, name)
      if len(bounds) != len(self.shape):
        raise ValueError(f"{name}: expected {len(self.shape)} bounds as in shape, got {len(bounds)}")
      if not (np.abs(bounds) <= np.finfo(np.float32).max).all():
        raise ValueError(f"{name}: expected bounds that are finite in float32, got {bounds}")
    if min(self.shape) < 1:
      raise ValueError(f"shape: expected at least one cell a dimension, got {self.shape}")
    for task, (low, high) in enumerate(zip(self.lower, self.upper, strict=True)):
      if not np.float32(low) < np.float32(high):
        raise ValueError(f"upper[{task}]: expected more than lower[{task}] = {low} in float32, got {high}")
    if max(self.num_cells) > MAX_GRID_CELLS:
      raise ValueError(
        f"shape: an archive of {max(self.num_cells)} cells is over {MAX_GRID_CELLS}; use Centroids.cvt (cells: cvt)"
      )

  @classmethod
  def from_experts(
    cls,
    scores: Num[Array, "E K"] | Num[np.ndarray, "E K"],
    *,
    shape: int | np.integer | Sequence[int] | np.ndarray = 15,
    low: float | int = 0.85,
    high: float | int = 1.15,
  ) -> "Grid":
    """The paper's bounds: from `low` times the worst to `high` times the best expert's score, for each task.

    Below zero the margins point outwards as well (`worst - (1 - low) |worst|`). Where that range is empty, which
    happens when all experts score 0, it is set to one unit above the worst score, and a warning says so.

    Args:
      scores: finite scores of E experts on K tasks.
      shape: cells per dimension, one number for all or K of them.
      low: factor for the worst score, at most 1.
      high: factor for the best score, at least 1.

    Raises:
      ValueError: naming the expert and task, where a score is not finite.
    """
    table = np.asarray(scores, np.float64)
    if table.ndim != 2 or table.shape[0] < 1:
      raise ValueError(f"scores: expected [E experts, K tasks], got shape {table.shape}")
    if not (low <= 1 <= high):
      raise ValueError(f"low, high: expected low <= 1 <= high, got {low}, {high}")
    for expert, task in np.argwhere(~np.isfinite(table)):
      raise ValueError(f"scores: expert {expert} has {table[expert, task]} on task {task}")
    worst, best = table.min(axis=0), table.max(axis=0)
    lower = worst - (1 - low) * np.abs(worst)
    upper = best + (high - 1) * np.abs(best)
    for task in np.flatnonzero(~(lower + 1e-6 < upper)):
      warnings.warn(
        f"task {task}: all experts score {worst[task]:g}, which gives no range of descriptors; "
        f"using [{lower[task]:g}, {lower[task] + 1:g}]",
        stacklevel=2,
      )
      upper[task] = lower[task] + 1
    num_tasks = table.shape[1]
    return cls(lower, upper, (int(shape),) * num_tasks if isinstance(shape, int | np.integer) else shape)

  @property
  def num_tasks(self) -> int:
    """K."""
    return len(self.shape)

  @property
  def num_cells(self) -> tuple[int, ...]:
    """Number of cells of each of the K archives."""
    return tuple(math.prod(self.shape) // cells for cells in self.shape)

  def edges(self, task: int) -> Float[np.ndarray, "E"]:
    """The float32 edges of one dimension, ascending."""
    return np.linspace(self.lower[task], self.upper[task], self.shape[task] + 1).astype(np.float32)

  def bins(self, scores: Num[Array, "*P K"] | Num[np.ndarray, "*P K"]) -> Int[Array, "*P K"]:
    """The cell of each score along its own dimension, compared in float32; anything for NaN."""
    ranks = _float_order(jnp.asarray(scores, jnp.float32))

    def bins_of_task(task: int) -> Int[Array, "*P"]:
      # The number of edges below the score, as digitize(right=True) counts: a few compares, no search over cells.
      edges = _float_order(jnp.asarray(self.edges(task)))
      below = jnp.searchsorted(edges, ranks[..., task], side="left", method="compare_all")
      return jnp.clip(below.astype(jnp.int32) - 1, 0, self.shape[task] - 1)

    return jnp.stack([bins_of_task(task) for task in range(self.num_tasks)], axis=-1)

  def index(self, scores: Num[Array, "P K"] | Num[np.ndarray, "P K"]) -> Int[Array, "P K"]:
    """The cell of each individual in each archive; anything for NaN."""
    bins = self.bins(scores)

    def index_in_archive(archive: int) -> Int[Array, "P"]:
      index = jnp.zeros(bins.shape[:1], jnp.int32)
      for task in other_tasks(self.num_tasks)[archive]:
        index = index * self.shape[task] + bins[:, task]
      return index

    return jnp.stack([index_in_archive(archive) for archive in range(self.num_tasks)], axis=-1)

  def coordinates(self, archive: int) -> Int[np.ndarray, "N D"]:
    """The bins of each cell of an archive along its descriptors, in the order of `index`."""
    shape = [self.shape[task] for task in other_tasks(self.num_tasks)[archive]]
    return np.stack(np.unravel_index(np.arange(math.prod(shape)), shape), axis=-1)

  def centroids(self, archive: int) -> Float[np.ndarray, "N D"]:
    """The middles of the cells of an archive, float32, in the order of `index`."""
    tasks = other_tasks(self.num_tasks)[archive]
    low, high = np.array(self.lower)[tasks], np.array(self.upper)[tasks]
    shape = np.array(self.shape)[tasks]
    return (low + (self.coordinates(archive) + 0.5) * (high - low) / shape).astype(np.float32)


class Centroids(flax.struct.PyTreeNode):
  """Voronoi cells: an individual belongs to the nearest centroid, the first of equals. For K above 4.

  Attributes:
    points: `[K, N, K-1]` float32 centroids of the K archives, in the unit of the scores.
  """

  points: ArrayField

  @classmethod
  def cvt(
    cls,
    key: PRNGKey,
    *,
    num_cells: int,
    lower: Numbers,
    upper: Numbers,
    num_samples: int | None = None,
  ) -> "Centroids":
    """Centroidal Voronoi tessellation of the box of scores, by QDax's k-means (Vassiliades et al. 2018).

    Args:
      key: typed PRNG key; consumed.
      num_cells: N, cells per archive.
      lower: K lower bounds.
      upper: K upper bounds.
      num_samples: points given to k-means; 50 a cell by default.

    Raises:
      ValueError: for fewer than one cell, or bounds that are no K finite ranges with K in 2..8.
    """
    Grid(lower, upper, (1,) * len(lower))  # has the checks of bounds
    if num_cells < 1:
      raise ValueError(f"num_cells: expected at least 1, got {num_cells}")
    num_descriptors = len(lower) - 1
    unit = compute_cvt_centroids(
      num_descriptors, max(num_samples or 50 * num_cells, num_cells), num_cells, 0.0, 1.0, key
    )
    low, high = np.asarray(lower), np.asarray(upper)
    tasks = other_tasks(len(lower))
    points = np.asarray(unit)[None] * (high - low)[tasks][:, None] + low[tasks][:, None]
    return cls(points=jnp.asarray(points, jnp.float32))

  @property
  def num_tasks(self) -> int:
    """K."""
    return self.points.shape[0]

  @property
  def num_cells(self) -> tuple[int, ...]:
    """Number of cells of each of the K archives."""
    return (self.points.shape[1],) * self.num_tasks

  def index(self, scores: Num[Array, "P K"] | Num[np.ndarray, "P K"]) -> Int[Array, "P K"]:
    """The cell of each individual in each archive; anything for NaN."""
    descriptors = jnp.asarray(scores, jnp.float32)[:, other_tasks(self.num_tasks)]
    squares = jnp.square(descriptors[:, :, None] - self.points[None])
    return jnp.argmin(squares.sum(axis=-1), axis=-1).astype(jnp.int32)

  def centroids(self, archive: int) -> Float[Array, "N D"]:
    """The centroids of an archive."""
    return self.points[archive]


Cells = Grid | Centroids


def cells_to_json(cells: Cells) -> dict[str, Any]:
  """What `cells_from_json` reads, in JSON's types."""
  if isinstance(cells, Grid):
    return {"kind": "grid", "lower": cells.lower, "upper": cells.upper, "shape": cells.shape}
  return {"kind": "centroids", "points": np.asarray(cells.points).tolist()}


def cells_from_json(content: Mapping[str, Any]) -> Cells:
  """Cells as `cells_to_json` wrote them. Raises ValueError, KeyError or TypeError where they are damaged."""
  if content["kind"] == "grid":
    return Grid(content["lower"], content["upper"], content["shape"])
  return Centroids(points=jnp.asarray(content["points"], jnp.float32))


@functools.cache
def grid_coordinates(grid: Grid) -> Int[np.ndarray, "K N D"]:
  """`Grid.coordinates` of all archives, padded with zeros to the largest."""
  padded = np.zeros((grid.num_tasks, max(grid.num_cells), grid.num_tasks - 1), np.int32)
  for archive, num_cells in enumerate(grid.num_cells):
    padded[archive, :num_cells] = grid.coordinates(archive)
  return padded


def stacked_centroids(cells: Cells) -> Float[Array, "K N D"]:
  """The centroids of all archives; a smaller archive is padded with infinitely far ones."""
  largest = max(cells.num_cells)
  padded = [
    jnp.pad(
      jnp.asarray(cells.centroids(archive)),
      ((0, largest - num_cells), (0, 0)),
      constant_values=jnp.inf,
    )
    for archive, num_cells in enumerate(cells.num_cells)
  ]
  return jnp.stack(padded)


def _float_order(values: Float[Array, "*N"]) -> Int[Array, "*N"]:
  """float32 as int32 in the same order, the two zeros alike."""
  # XLA takes subnormal floats for zero, so the number next to an edge at 0 would fall on the edge.
  bits = jax.lax.bitcast_convert_type(values, jnp.int32)
  return jnp.where(bits < 0, -(bits & jnp.int32(0x7FFFFFFF)), bits)


def check_num_tasks(num_tasks: int, name: str) -> None:
  """Raises unless K is in 2..8."""
  if not MIN_TASKS <= num_tasks <= MAX_TASKS:
    raise ValueError(f"{name}: expected {MIN_TASKS} to {MAX_TASKS} tasks, got {num_tasks}")
