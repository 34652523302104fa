import numpy as np
import pytest

from cqd_jax.report.archive_plot import save_figure
from cqd_jax.report.energy_figure import doublings, energy_figure


def test_doublings_end_with_the_last():
  assert doublings(1) == [1]
  assert doublings(2) == [1, 2]
  assert doublings(12) == [1, 2, 4, 8, 12]
  assert doublings(64) == [1, 2, 4, 8, 16, 32, 64]


def test_lines_are_the_curves(tmp_path):
  curves = {"coder": np.linspace(0.2, 1, 12), "sql": np.ones(12)}
  figure = energy_figure(curves)
  (ax,) = figure.axes
  lines = {line.get_label(): line for line in ax.get_lines()}
  for name, energy in curves.items():
    assert lines[name].get_xdata().tolist() == list(range(1, 13))
    assert lines[name].get_ydata().tolist() == energy.tolist()
  assert [text.get_text() for text in figure.legends[0].get_texts()] == ["coder", "sql"]
  assert [label.get_text() for label in ax.get_xticklabels()] == ["1", "2", "4", "8", "12"]
  for ending in ("png", "svg"):
    save_figure(figure, tmp_path / f"energy.{ending}")
    assert (tmp_path / f"energy.{ending}").stat().st_size > 5000


def test_one_rank_alone(tmp_path):
  save_figure(energy_figure({"coder": np.array([0.5])}), tmp_path / "energy.png")


def test_nothing_to_draw():
  with pytest.raises(ValueError, match="curves: expected at least one expert"):
    energy_figure({})
