"""Params, pictures and progress: what is written is read back, and what is damaged is named."""

import io

import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest
from rich.console import Console

from cqd_jax.archive import Centroids, CyclingRepertoire, Grid
from cqd_jax.report.archive_plot import plot_archives, save_figure
from cqd_jax.store.params import load_params, save_params
from cqd_jax.terminal.progress import progress


def test_params_come_back_as_they_were(tmp_path):
  params = {
    "layers": {"mlp": {"kernel": jax.random.normal(jax.random.key(0), (2, 3, 4))}},
    "norm": {"scale": jnp.arange(3, dtype=jnp.bfloat16)},
  }
  path = tmp_path / "deep" / "model.safetensors"
  save_params(path, params)
  save_params(path, params)  # replaces
  back = load_params(path)
  jax.tree.map(np.testing.assert_array_equal, params, back)
  assert back["norm"]["scale"].dtype == jnp.bfloat16
  assert [file.name for file in path.parent.iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize("keep", [0, 5, 60, -1])
def test_a_truncated_params_file_is_named(tmp_path, keep):
  path = tmp_path / "model.safetensors"
  save_params(path, {"w": jnp.ones(100)})
  path.write_bytes(path.read_bytes()[:keep])
  with pytest.raises(ValueError, match=r"model\.safetensors"):
    load_params(path)


def test_a_missing_params_file_is_named(tmp_path):
  with pytest.raises(FileNotFoundError, match=r"none\.safetensors"):
    load_params(tmp_path / "none.safetensors")


def red_pixels(path):
  image = matplotlib.image.imread(path)[..., :3]
  return int(((image[..., 0] > 0.95) & (image[..., 1] < 0.05) & (image[..., 2] < 0.05)).sum())


@pytest.mark.parametrize(("num_tasks", "panels"), [(2, 2), (3, 3), (4, 12), (5, 30)])
def test_every_archive_is_drawn_with_every_pair_of_axes(tmp_path, num_tasks, panels):
  grid = Grid(lower=[0.0] * num_tasks, upper=[1.0] * num_tasks, shape=(5,) * num_tasks)
  scores = np.random.default_rng(0).uniform(size=(40, num_tasks))
  repertoire = CyclingRepertoire.init({"w": jnp.zeros(40)}, scores, grid)
  names = [f"task {k}" for k in range(num_tasks)]
  figure = plot_archives(repertoire, names, experts=scores[:2])
  drawn = [ax for ax in figure.axes if ax.get_title()]
  assert len(drawn) == panels
  boxes = [patch for ax in drawn for patch in ax.patches]
  assert len(boxes) == 2 * panels
  for ax in drawn[:1]:  # archive 0 against tasks 1 and 2: a cell shows the best fitness found there
    edges = np.linspace(0, 1, 6)
    image = np.ma.filled(ax.collections[0].get_array(), np.nan)
    bins = np.clip(np.digitize(np.float32(scores), np.float32(edges), right=True) - 1, 0, 4)
    for column in range(5):
      rows = range(5) if num_tasks > 2 else [None]
      for row in rows:
        here = bins[:, 1] == column
        if row is not None:
          here &= bins[:, 2] == row
        shown = image[row or 0, column]
        if here.any():
          np.testing.assert_allclose(shown, scores[here, 0].max(), rtol=1e-6)
        else:
          assert np.isnan(shown)
  if num_tasks <= 3:
    save_figure(figure, tmp_path / "with.png")
    save_figure(plot_archives(repertoire, names), tmp_path / "without.png")
    assert red_pixels(tmp_path / "with.png") > 100
    assert red_pixels(tmp_path / "without.png") == 0


def test_voronoi_archives_are_drawn_as_points(tmp_path):
  cells = Centroids.cvt(jax.random.key(0), num_cells=8, lower=[0.0] * 3, upper=[1.0] * 3)
  scores = np.random.default_rng(0).uniform(size=(20, 3))
  repertoire = CyclingRepertoire.init({"w": jnp.zeros(20)}, scores, cells)
  figure = plot_archives(repertoire, ["a", "b", "c"], experts=scores[:1])
  save_figure(figure, tmp_path / "archives.svg")
  assert "<svg" in (tmp_path / "archives.svg").read_text()
  with pytest.raises(ValueError, match="task_names: expected 3, got 2"):
    plot_archives(repertoire, ["a", "b"])


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_tells_how_far_it_is(terminal):
  output = io.StringIO()
  console = Console(file=output, force_terminal=terminal, width=120)
  with progress(console, "evolving", 3) as advance:
    for _ in range(3):
      advance(note="best 0.5")
  assert "evolving" in output.getvalue()
  assert "3/3" in output.getvalue()
  assert "best 0.5" in output.getvalue()
  assert ("\x1b[" in output.getvalue()) == terminal
