"""Ways to cut archives into cells, by the names that a configuration gives: from the experts' scores, or as given.

Each is `(scores, key, *, setting) -> Cells` of the experts' scores `[E, K]`. One that has an attribute `check` can say
by `check(num_tasks, **settings)` what cannot work before there are scores.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from cqd_jax.archive.cells import Cells, Centroids, Grid
from cqd_jax.types import PRNGKey


def from_experts(scores: np.ndarray, key: PRNGKey, *, shape: int = 15, low: float = 0.85, high: float = 1.15) -> Grid:
  """The paper's regular grid: between margins around the experts' worst and best scores; see `Grid.from_experts`.

  Args:
    scores: of the experts.
    key: not used.
    shape: cells per dimension.
    low: factor for the worst score, at most 1.
    high: factor for the best score, at least 1.
  """
  del key
  return Grid.from_experts(scores, shape=shape, low=low, high=high)


def grid(
  scores: np.ndarray,
  key: PRNGKey,
  *,
  lower: float | tuple[float, ...] = 0.0,
  upper: float | tuple[float, ...] = 1.0,
  shape: int | tuple[int, ...] = 15,
) -> Grid:
  """A regular grid with bounds of your own, one for all tasks or one for each.

  Args:
    scores: of the experts, which do not matter.
    key: not used.
    lower: lower bounds of the scores.
    upper: upper bounds of the scores.
    shape: cells per dimension.
  """
  del key
  num_tasks = scores.shape[1]
  return Grid(*(_for_each(value, num_tasks) for value in (lower, upper, shape)))


def cvt(scores: np.ndarray, key: PRNGKey, *, num_cells: int = 1024, low: float = 0.85, high: float = 1.15) -> Centroids:
  """Voronoi cells of centroids spread over the box of `from_experts`: for more tasks than a grid can serve.

  Args:
    scores: of the experts.
    key: of the centroids.
    num_cells: cells per archive.
    low: factor for the worst score, at most 1.
    high: factor for the best score, at least 1.
  """
  box = Grid.from_experts(scores, shape=1, low=low, high=high)
  with jax.numpy_rank_promotion("allow"):  # in QDax's k-means
    return Centroids.cvt(key, num_cells=num_cells, lower=box.lower, upper=box.upper)


def _check_cvt(num_tasks: int, *, num_cells: int = 1024, low: float = 0.85, high: float = 1.15) -> None:
  Grid.from_experts(_anyone(num_tasks), shape=1, low=low, high=high)
  if num_cells < 1:
    raise ValueError(f"num_cells: expected at least 1, got {num_cells}")


cvt.check = _check_cvt  # type: ignore[attr-defined]


def check_cells(make: Callable[[np.ndarray, PRNGKey], Cells], num_tasks: int) -> None:
  """Raises the ValueError that making cells for K tasks would end in, whatever the scores."""
  function: Any = make
  settings: dict[str, Any] = {}
  while isinstance(function, functools.partial):
    function, settings = function.func, {**function.keywords, **settings}
  check = getattr(function, "check", None)
  try:
    if check is not None:
      check(num_tasks, **settings)
    else:
      make(_anyone(num_tasks), jax.random.key(0))
  except ValueError as error:
    raise ValueError(f"cells: {error}") from error


def _anyone(num_tasks: int) -> np.ndarray:
  """Scores as two experts may have them."""
  return np.repeat([[0.25], [0.75]], num_tasks, axis=1)


def _for_each(value: Any, num_tasks: int) -> tuple[Any, ...]:
  return tuple(value) if isinstance(value, list | tuple) else (value,) * num_tasks
