"""Cells by name: bounds worked out by hand, and what cannot work refused before there is any score."""

import functools

import jax
import numpy as np
import pytest

from cqd_jax.archive import Centroids, Grid
from cqd_jax.archive.make_cells import check_cells, cvt, from_experts, grid

KEY = jax.random.key(0)
SCORES = np.array([[0.2, 0.5, -1.0], [0.4, 0.5, 2.0]])


def test_the_papers_grid_lies_between_margins_around_the_experts():
  cells = from_experts(SCORES[:, [0, 2]], KEY)
  assert cells.shape == (15, 15)
  np.testing.assert_allclose(cells.lower, [0.2 * 0.85, -1.0 * 1.15])  # below zero the margin points outwards as well
  np.testing.assert_allclose(cells.upper, [0.4 * 1.15, 2.0 * 1.15])
  other = from_experts(SCORES[:, [0, 2]], KEY, shape=4, low=0.5, high=2.0)
  assert other.shape == (4, 4)
  np.testing.assert_allclose((other.lower, other.upper), [[0.1, -1.5], [0.8, 4.0]])


@pytest.mark.parametrize(
  ("settings", "lower", "upper", "shape"),
  [
    ({}, (0, 0, 0), (1, 1, 1), (15, 15, 15)),
    ({"lower": -1.0, "upper": 2.0, "shape": 3}, (-1, -1, -1), (2, 2, 2), (3, 3, 3)),
    ({"lower": (0.0, 0.1, 0.2), "upper": 2.0, "shape": (3, 4, 5)}, (0, 0.1, 0.2), (2, 2, 2), (3, 4, 5)),
  ],
)
def test_a_grid_of_your_own_does_not_look_at_the_experts(settings, lower, upper, shape):
  for scores in (SCORES, SCORES * np.nan):
    assert grid(scores, KEY, **settings) == Grid(lower, upper, shape)


BOTH = ((cvt, {"num_cells": 20}), (from_experts, {"shape": 1}))


def test_voronoi_cells_lie_in_the_box_of_the_papers_grid():
  scores = np.random.default_rng(0).uniform(0.2, 0.8, (8, 8))
  cells = cvt(scores, KEY, num_cells=20)
  assert isinstance(cells, Centroids)
  assert cells.num_cells == (20,) * 8
  box = from_experts(scores, KEY, shape=1)
  for archive in range(8):
    others = [task for task in range(8) if task != archive]
    points = np.asarray(cells.centroids(archive))
    assert points.shape == (20, 7)
    assert (points >= np.array(box.lower)[others]).all()
    assert (points <= np.array(box.upper)[others]).all()
    spread = np.ptp(points, axis=0) / (np.array(box.upper) - np.array(box.lower))[others]
    assert (spread > 0.25).all()  # twenty means of 50 points each, over the whole box
  np.testing.assert_array_equal(cvt(scores, KEY, num_cells=20).points, cells.points)
  assert not np.array_equal(cvt(scores, jax.random.key(1), num_cells=20).points, cells.points)
  wider, wider_box = (make(scores, KEY, **settings, low=0.5, high=2.0) for make, settings in BOTH)
  units = [
    (np.asarray(own.centroids(0)) - np.array(bounds.lower)[1:]) / (np.array(bounds.upper) - np.array(bounds.lower))[1:]
    for own, bounds in ((cells, box), (wider, wider_box))
  ]
  np.testing.assert_allclose(*units, atol=1e-5)  # the same points, stretched


def own(scores, key):
  raise ValueError(f"three experts are needed, not {len(scores)}")


def checked(scores, key, *, size: int = 1):
  raise AssertionError("a check does not make cells")


def check_own(num_tasks, *, size=1):
  if size * num_tasks > 4:
    raise ValueError(f"size: expected at most {4 // num_tasks}, got {size}")


checked.check = check_own

bind = functools.partial


@pytest.mark.parametrize(
  ("make", "num_tasks", "message"),
  [
    # 15 cells in each of 7 dimensions
    (from_experts, 8, rf"^cells: shape: an archive of {15**7} cells is over {2**24}; use .*cells: cvt"),
    (bind(from_experts, shape=12), 8, f"^cells: shape: an archive of {12**7} cells"),
    (from_experts, 9, "^cells: shape: expected 2 to 8 tasks, got 9"),
    (bind(from_experts, shape=0), 3, "^cells: shape: expected at least one cell a dimension"),
    (bind(from_experts, low=1.1), 3, "^cells: low, high: expected low <= 1 <= high, got 1.1, 1.15"),
    (bind(bind(from_experts, high=0.9), shape=3), 3, "^cells: low, high: expected low <= 1 <= high, got 0.85, 0.9"),
    (grid, 8, "^cells: shape: an archive of"),
    (bind(grid, lower=(0.0, 0.1)), 3, "^cells: lower: expected 3 bounds as in shape, got 2"),
    (bind(grid, upper=(1.0, 0.0, 1.0)), 3, r"^cells: upper\[1\]: expected more than lower\[1\]"),
    (cvt, 9, "^cells: shape: expected 2 to 8 tasks, got 9"),
    (bind(cvt, num_cells=0), 3, "^cells: num_cells: expected at least 1, got 0"),
    (bind(cvt, low=1.1), 3, "^cells: low, high: expected low <= 1 <= high, got 1.1, 1.15"),
    (own, 3, "^cells: three experts are needed, not 2"),
    (bind(checked, size=2), 3, "^cells: size: expected at most 1, got 2"),
  ],
)
def test_what_cannot_work_is_refused_before_there_are_scores(make, num_tasks, message):
  with pytest.raises(ValueError, match=message):
    check_cells(make, num_tasks)


@pytest.mark.parametrize(
  ("make", "num_tasks"),
  [
    (from_experts, 2),
    (from_experts, 4),
    (bind(from_experts, shape=10), 8),
    (bind(grid, lower=-1.0, shape=(3, 4)), 2),
    (cvt, 8),
    (bind(cvt, num_cells=7, low=0.5), 3),
    (bind(checked, size=1), 3),
  ],
)
def test_what_can_work_passes(make, num_tasks):
  check_cells(make, num_tasks)
