"""The cell rule against numpy.digitize, bounds from experts, and Voronoi cells against brute force."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cqd_jax.archive import Centroids, Grid
from cqd_jax.archive.cells import grid_coordinates, other_tasks, stacked_centroids


def digitize(scores: np.ndarray, grid: Grid) -> np.ndarray:
  """The reference's rule, one archive and individual at a time."""
  num_tasks = len(grid.shape)
  bins = np.zeros(scores.shape, int)
  for task in range(num_tasks):
    edges = np.float32(np.linspace(grid.lower[task], grid.upper[task], grid.shape[task] + 1))
    bins[:, task] = np.clip(np.digitize(scores[:, task], edges, right=True) - 1, 0, grid.shape[task] - 1)
  index = np.zeros(scores.shape, int)
  for archive in range(num_tasks):
    others = [task for task in range(num_tasks) if task != archive]
    shape = [grid.shape[task] for task in others]
    index[:, archive] = np.ravel_multi_index([bins[:, task] for task in others], shape)
  return index


@pytest.mark.parametrize(
  ("lower", "upper", "shape"),
  [
    ([0.0, 0.0, 0.0], [0.75, 0.45, 0.45], (15, 15, 15)),
    ([0.1, -3.0], [0.7, 11.0], (7, 13)),
    ([0.0] * 4, [1.0, 0.3, 1e-3, 1e4], (2, 5, 1, 3)),
    ([-1.0] * 8, [1.0 / 3] * 8, (3,) * 8),
  ],
)
def test_scores_on_and_beside_every_edge_fall_where_digitize_puts_them(lower, upper, shape):
  grid = Grid(lower=lower, upper=upper, shape=shape)
  points = []
  for task in range(len(shape)):
    edges = np.linspace(lower[task], upper[task], shape[task] + 1).astype(np.float32)
    beside = [np.nextafter(edges, np.float32(-np.inf)), edges, np.nextafter(edges, np.float32(np.inf))]
    outside = np.float32([lower[task] - 5, upper[task] + 5])
    points.append(np.concatenate([*beside, outside]))
  generator = np.random.default_rng(7)
  columns = [generator.permutation(np.resize(column, 400)) for column in points]
  scores = np.stack(columns, axis=1).astype(np.float32)
  np.testing.assert_array_equal(jax.jit(grid.index)(jnp.asarray(scores)), digitize(scores, grid))


def test_a_score_on_an_inner_edge_belongs_to_the_lower_cell():
  grid = Grid(lower=[0.0, 0.0], upper=[1.0, 1.0], shape=(4, 4))
  scores = jnp.array([[0.25, 0.5], [0.25001, 0.50001], [0.0, 0.0], [-1.0, 2.0]], jnp.float32)
  np.testing.assert_array_equal(grid.bins(scores), [[0, 1], [1, 2], [0, 0], [0, 3]])


def test_centroids_lie_in_their_own_cell():
  grid = Grid(lower=[0.0, -1.0, 2.0], upper=[1.0, 1.0, 5.0], shape=(3, 4, 5))
  for archive in range(3):
    scores = np.zeros((grid.num_cells[archive], 3), np.float32)
    scores[:, other_tasks(3)[archive]] = grid.centroids(archive)
    np.testing.assert_array_equal(grid.index(jnp.asarray(scores))[:, archive], np.arange(len(scores)))


def test_archives_of_different_size_are_padded_without_touching_the_real_cells():
  grid = Grid(lower=[0.0] * 3, upper=[1.0] * 3, shape=(2, 3, 4))
  assert grid.num_cells == (12, 8, 6)
  stacked = stacked_centroids(grid)
  assert stacked.shape == (3, 12, 2)
  np.testing.assert_array_equal(stacked[2, :6], grid.centroids(2))
  assert np.isinf(np.asarray(stacked[2, 6:])).all()
  np.testing.assert_array_equal(grid_coordinates(grid)[1, :8], grid.coordinates(1))


def test_bounds_from_experts_are_the_papers():
  scores = np.array([[0.7, 0.1, 0.3], [0.5, 0.4, 0.2], [0.6, 0.2, 0.4]])
  grid = Grid.from_experts(scores, shape=15)
  np.testing.assert_allclose(grid.lower, [0.85 * 0.5, 0.85 * 0.1, 0.85 * 0.2])
  np.testing.assert_allclose(grid.upper, [1.15 * 0.7, 1.15 * 0.4, 1.15 * 0.4])
  assert grid.shape == (15, 15, 15)


def test_bounds_of_negative_scores_enclose_them():
  grid = Grid.from_experts(np.array([[-2.0, 1.0], [-1.0, 3.0]]), shape=(4, 5))
  np.testing.assert_allclose(grid.lower, [-2.3, 0.85])
  np.testing.assert_allclose(grid.upper, [-0.85, 3.45])


def test_experts_that_all_score_zero_get_a_range_and_a_warning():
  with pytest.warns(UserWarning, match="task 1: all experts score 0"):
    grid = Grid.from_experts(np.array([[0.5, 0.0], [0.3, 0.0]]))
  assert (grid.lower[1], grid.upper[1]) == (0.0, 1.0)


@pytest.mark.parametrize(
  ("kwargs", "message"),
  [
    ({"lower": [0.0], "upper": [1.0], "shape": [3]}, "shape: expected 2 to 8 tasks, got 1"),
    ({"lower": [0.0] * 9, "upper": [1.0] * 9, "shape": [3] * 9}, "got 9"),
    ({"lower": [0.0], "upper": [1.0, 1.0], "shape": [3, 3]}, "lower: expected 2 bounds"),
    ({"lower": [0.0, 1.0], "upper": [1.0, 1.0], "shape": [3, 3]}, r"upper\[1\]"),
    ({"lower": [0.0, float("nan")], "upper": [1.0, 1.0], "shape": [3, 3]}, "lower: expected bounds that are finite"),
    ({"lower": [0.0, 0.0], "upper": [1.0, 1.0], "shape": [3, 0]}, "shape: expected at least one"),
    ({"lower": [0.0] * 8, "upper": [1.0] * 8, "shape": [15] * 8}, "use Centroids.cvt"),
  ],
)
def test_a_bad_grid_is_refused_by_name(kwargs, message):
  with pytest.raises(ValueError, match=message):
    Grid(**kwargs)


def test_a_nan_score_of_an_expert_is_refused_by_name():
  with pytest.raises(ValueError, match="expert 1 has nan on task 0"):
    Grid.from_experts(np.array([[0.5, 0.1], [float("nan"), 0.1]]))


@pytest.mark.parametrize("num_tasks", [2, 5, 8])
def test_voronoi_cells_are_those_of_the_nearest_centroid(num_tasks):
  lower, upper = [0.0] * num_tasks, [1.0 + task for task in range(num_tasks)]
  cells = Centroids.cvt(jax.random.key(0), num_cells=12, lower=lower, upper=upper)
  assert cells.num_cells == (12,) * num_tasks
  scores = np.random.default_rng(1).uniform(size=(50, num_tasks)).astype(np.float32) * np.float32(upper)
  found = np.asarray(cells.index(jnp.asarray(scores)))
  for archive in range(num_tasks):
    descriptors = np.delete(scores, archive, axis=1).astype(np.float64)
    points = np.asarray(cells.centroids(archive), np.float64)
    distances = ((descriptors[:, None] - points[None]) ** 2).sum(axis=-1)
    chosen = distances[np.arange(50), found[:, archive]]
    np.testing.assert_allclose(chosen, distances.min(axis=1), rtol=1e-4, atol=1e-6)
    low, high = np.delete(lower, archive), np.delete(upper, archive)
    assert ((points >= low) & (points <= high)).all()


def test_the_numbers_next_to_an_inner_edge_at_zero_fall_where_digitize_puts_them():
  # The neighbors of 0 are subnormal.
  zero = np.float32(0)
  scores = np.array([np.nextafter(zero, np.float32(-1)), -zero, zero, np.nextafter(zero, np.float32(1))])
  grid = Grid(lower=[-1, -1.0], upper=[1, 1], shape=np.array([2, 4]))
  np.testing.assert_array_equal(grid.bins(np.stack([scores, scores], axis=-1)), [[0, 1], [0, 1], [0, 1], [1, 2]])


def test_bounds_beyond_float32_are_refused():
  with pytest.raises(ValueError, match="upper: expected bounds that are finite in float32"):
    Grid(lower=[0.0, 0.0], upper=[1.0, 1e39], shape=(3, 3))
