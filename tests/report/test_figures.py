"""Figures of a run show what its record holds: every value is worked out again from the individuals."""

import dataclasses
import itertools
import xml.etree.ElementTree

import matplotlib.image
import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from record_cases import NAMES, make_record

from cqd_jax.report.archive_plot import save_figure
from cqd_jax.report.family_tree import FEWER_LABELS, MOST_LABELS
from cqd_jax.report.figures import (
  all_figures,
  archives_figure,
  curves_figure,
  family_tree_figure,
  scores_figure,
  timeline_figure,
)

EDGES = np.linspace(0, 1, 6).astype(np.float32)


def record_of(scores, parents, born, **changes):
  """A record of given individuals, all in one grid; each archive took those that are the best of their cell so far."""
  scores, parents, born = np.asarray(scores, float), np.asarray(parents), np.asarray(born)
  size, num_tasks = scores.shape
  bins = np.clip(np.digitize(np.float32(scores), EDGES, right=True) - 1, 0, 4)
  taken = np.zeros((size, num_tasks), bool)
  for archive in range(num_tasks):
    best = {}
    for one in np.flatnonzero(np.isfinite(scores).all(axis=1)):
      cell = tuple(np.delete(bins[one], archive))
      if scores[one, archive] > best.get(cell, -1):
        best[cell], taken[one, archive] = scores[one, archive], True
  individuals = dataclasses.replace(
    make_record(num_tasks, children=0).individuals,
    born=born,
    archive=np.where(born > 0, 0, -1),
    parents=parents,
    notes=[{}] * size,
    mutation=[""] * size,
    scores=scores,
    taken=taken,
    seconds=np.ones(size),
  )
  best = int(np.nanargmax(scores.mean(axis=1))) if taken.any() else None
  made = {"individuals": individuals, "edges": [EDGES] * num_tasks, "bins": bins, "best": best}
  return dataclasses.replace(make_record(num_tasks, children=0), **made | {"rows": []} | changes)


def panels_of(figure):
  return [ax for ax in figure.axes if ax.get_label() != "<colorbar>"]


def best_in_cells(record, archive, pair, batch):
  """The panel as an image, from nothing but who was taken when."""
  individuals = record.individuals
  holders = {}
  for one in range(len(individuals)):
    if individuals.taken[one, archive] and individuals.born[one] <= batch:
      holders[tuple(np.delete(record.bins[one], archive))] = one
  columns, *rows = (len(record.edges[task]) - 1 for task in pair)
  image = np.full((*(rows or [1]), columns), np.nan)
  for one in holders.values():
    row, column = record.bins[one, pair[1]] if len(pair) == 2 else 0, record.bins[one, pair[0]]
    image[row, column] = np.fmax(image[row, column], individuals.scores[one, archive])
  return image


def pairs(archive, num_tasks):
  others = [task for task in range(num_tasks) if task != archive]
  return list(itertools.combinations(others, 2)) or [tuple(others)]


def assert_shows(ax, image):
  np.testing.assert_array_equal(np.ma.filled(ax.collections[0].get_array(), np.nan), image)


@pytest.mark.parametrize("batch", [None, 2])
@pytest.mark.parametrize(("num_tasks", "num_panels"), [(2, 2), (3, 3), (4, 12)])
def test_archives_show_the_best_elite_of_each_cell(num_tasks, num_panels, batch):
  record = make_record(num_tasks)
  figure = archives_figure(record, batch)
  panels = iter(panels_of(figure))
  for archive in range(num_tasks):
    for pair in pairs(archive, num_tasks):
      ax = next(panels)
      assert_shows(ax, best_in_cells(record, archive, pair, 99 if batch is None else batch))
      assert ax.get_xlabel() == f"{NAMES[pair[0]]} score"
      assert ax.get_ylabel() == (f"{NAMES[pair[1]]} score" if len(pair) == 2 else "")
      assert len(ax.patches) == num_tasks
      for box, scores in zip(ax.patches, np.float32(record.individuals.scores), strict=False):
        assert box.get_edgecolor() == (1, 0, 0, 1)
        assert box.get_x() < scores[pair[0]] <= box.get_x() + box.get_width()
        if len(pair) == 2:
          assert box.get_y() < scores[pair[1]] <= box.get_y() + box.get_height()
  assert next(panels, None) is None
  titles = [ax.get_title() for ax in panels_of(figure) if ax.get_title()]
  assert len(panels_of(figure)) == num_panels
  assert titles == [f"archive {NAMES[k]}: {len(record.elites(k, batch))} elites" for k in range(num_tasks)]
  assert (figure.get_suptitle() == "after batch 2") == (batch == 2)


def test_an_expert_without_scores_is_not_boxed():
  scores = np.full((4, 3), 0.5)
  scores[1, 2] = np.nan
  record = record_of(scores, np.full((4, 2), -1), [0, 0, 0, 1])
  for ax in panels_of(archives_figure(record)):
    assert len(ax.patches) == 2
    assert np.ma.count(ax.collections[0].get_array()) == 1


@pytest.mark.parametrize("num_tasks", [2, 3])
def test_without_a_grid_all_that_were_taken_are_points(num_tasks):
  record = make_record(num_tasks, voronoi=True)
  for archive, ax in enumerate(panels_of(archives_figure(record))):
    taken = record.individuals.scores[record.individuals.taken[:, archive]]
    other = pairs(archive, num_tasks)[0]
    want = {(scores[other[0]], scores[other[1]] if len(other) == 2 else 0, scores[archive]) for scores in taken}
    points = ax.collections[0]
    assert {(x, y, fitness) for (x, y), fitness in zip(points.get_offsets(), points.get_array(), strict=True)} == want
    boxes = [line for line in ax.lines if line.get_markeredgecolor() == "red"]
    assert [line.get_xdata()[0] for line in boxes] == record.individuals.scores[:num_tasks, other[0]].tolist()
    assert ax.get_title() == f"archive {NAMES[archive]}: {len(taken)} taken"


@pytest.mark.parametrize("num_tasks", [2, 3, 4])
def test_the_timeline_goes_from_the_experts_to_the_last_batch(num_tasks):
  record = make_record(num_tasks)
  panels = np.reshape(panels_of(timeline_figure(record)), (num_tasks, 5))
  moments = [0, 4, 8, 11, 15]  # quarters of 15 batches, rounded
  assert [ax.get_title() for ax in panels[0]] == ["batch 0 (experts)", *(f"batch {batch}" for batch in moments[1:])]
  for archive, row in enumerate(panels):
    pair = pairs(archive, num_tasks)[0]
    assert [ax.get_xlabel() for ax in row] == ["", "", f"{NAMES[pair[0]]} score", "", ""]
    held = [one for batch in moments for one in record.elites(archive, batch).values()]
    fitness = record.individuals.scores[held, archive]
    for ax, batch in zip(row, moments, strict=True):
      assert_shows(ax, best_in_cells(record, archive, pair, batch))
      assert ax.collections[0].get_clim() == (fitness.min(), fitness.max())
      assert len(ax.patches) == num_tasks


def test_a_short_run_has_fewer_moments():
  record = make_record(children=8)
  titles = [ax.get_title() for ax in panels_of(timeline_figure(record))[:3]]
  assert titles == ["batch 0 (experts)", "batch 1", "batch 2"]
  assert len(panels_of(timeline_figure(record, moments=2))) == 3 * 2
  with pytest.raises(ValueError, match="moments: expected at least 2, got 1"):
    timeline_figure(record, moments=1)


@pytest.mark.parametrize("children", [60, 1])
def test_curves_are_the_metrics(children):
  record = make_record(children=children)
  figure = curves_figure(record)
  for ax, name in zip(figure.axes, ("coverage", "qd_score", "max_fitness", "best_mean"), strict=True):
    values = record.metrics[name]
    curves = np.array([line.get_ydata() for line in ax.lines])
    np.testing.assert_array_equal(curves, values.T if values.ndim == 2 else values[None])
    for line in ax.lines:
      assert list(line.get_xdata()) == list(range(1, len(values) + 1))
  assert [text.get_text() for text in figure.legends[0].get_texts()] == [f"archive {name}" for name in NAMES[:3]]


def nodes_of(figure):
  """Identities at the discs' places, from the numbers in them, and the discs."""
  ax = figure.axes[0]
  numbers = {tuple(text.get_position()): int(text.get_text()) for text in ax.texts if text.get_text().isdigit()}
  discs = next(collection for collection in ax.collections if collection.get_gid() == "individuals")
  return [numbers.get(tuple(place)) for place in discs.get_offsets()], discs


def edges_of(figure):
  gids = [patch.get_gid().split("-") for patch in figure.axes[0].patches]
  return sorted((int(parent), int(child)) for _, parent, child in gids)


def test_the_family_tree_has_the_ancestors_and_no_one_else():
  # 0, 1, 2 are experts; 3 and 4 of the first batch, 5 and 6 of the second; 7, of the fifth, descends from 3, 5, 0, 1.
  parents = [[-1, -1]] * 3 + [[0, 1], [1, 2], [3, 3], [3, 4], [5, 0]]
  scores = np.random.default_rng(1).uniform(size=(8, 3))
  record = record_of(scores, parents, [0, 0, 0, 1, 1, 2, 2, 5], best=7)
  figure = family_tree_figure(record)
  identities, discs = nodes_of(figure)
  assert identities == [0, 1, 3, 5, 7]
  assert edges_of(figure) == [(0, 3), (0, 7), (1, 3), (3, 5), (5, 7)]
  np.testing.assert_array_equal(discs.get_array(), scores[[0, 1, 3, 5, 7]].mean(axis=1))
  ax = figure.axes[0]
  # Columns are the batches 0, 1, 2 and 5.
  assert [x for x, _ in discs.get_offsets()] == [0, 0, 1, 2, 3]
  assert [tick.get_text() for tick in ax.get_xticklabels()] == ["0", "1", "2", "5"]
  boxes = next(collection for collection in ax.collections if collection.get_gid() == "experts")
  np.testing.assert_array_equal(boxes.get_offsets(), discs.get_offsets()[:2])
  np.testing.assert_array_equal(boxes.get_edgecolors(), [[1, 0, 0, 1]])
  assert {text.get_text() for text in ax.texts if not text.get_text().isdigit()} == {"expert coding", "expert database"}
  assert ax.get_title() == "individual 7 and its 4 ancestors"
  other = family_tree_figure(record, 6)
  assert nodes_of(other)[0] == [0, 1, 2, 3, 4, 6]
  assert other.axes[0].get_title() == "individual 6 and its 5 ancestors"


def test_an_expert_is_a_tree_of_its_own_and_more_experts_than_tasks_are_numbered():
  record = record_of(np.full((4, 3), 0.5), np.full((4, 2), -1), [0, 0, 0, 0])
  figure = family_tree_figure(record, 3)
  assert nodes_of(figure)[0] == [3]
  assert not edges_of(figure)
  assert {text.get_text() for text in figure.axes[0].texts} == {"3", "expert 3"}
  unscored = record_of(np.full((3, 3), np.nan), np.full((3, 2), -1), [0, 0, 0])
  figure = family_tree_figure(unscored, 1)
  figure.draw_without_rendering()
  assert nodes_of(figure)[0] == [1]


def big_tree(children):
  """Each child of the two that came before it, in batches of 4, so that the last descends from nearly all."""
  born = np.concatenate([np.zeros(3, int), 1 + np.arange(children) // 4])
  parents = [[-1, -1]] * 3 + [[max(0, one - 4 - one % 4), max(0, one - 5 - one % 3)] for one in range(3, 3 + children)]
  return record_of(np.random.default_rng(0).uniform(size=(len(born), 3)), parents, born)


@pytest.mark.parametrize(("children", "thinned"), [(20, False), (100, False), (400, True)])
def test_discs_of_a_tree_lie_apart_and_numbers_are_thinned_in_large_ones(children, thinned):
  record = big_tree(children)
  family = record.ancestors(children + 2)
  assert (len(family) > MOST_LABELS) == thinned
  figure = family_tree_figure(record, children + 2)
  figure.draw_without_rendering()
  identities, discs = nodes_of(figure)
  assert len(identities) == len(family)
  shown = [one for one in identities if one is not None]
  if thinned:
    assert len(shown) == FEWER_LABELS
    assert {family[-1], *(one for one in family if one < 3)} <= set(shown)
    assert f"numbers on {FEWER_LABELS} of {len(family)}" in figure.axes[0].get_title()
  else:
    assert shown == family
  centers = figure.axes[0].transData.transform(discs.get_offsets()) * 72 / figure.dpi
  radii = np.sqrt(np.broadcast_to(discs.get_sizes(), len(centers))) / 2
  gaps = np.linalg.norm(centers[:, None] - centers, axis=-1) - (radii[:, None] + radii)
  assert gaps[~np.eye(len(centers), dtype=bool)].min() > 0
  assert figure.get_size_inches()[1] < 15


def test_a_tree_needs_someone():
  record = dataclasses.replace(make_record(), best=None)
  with pytest.raises(ValueError, match=r"identity: .* no best elite"):
    family_tree_figure(record)
  for identity in (-1, 63):
    with pytest.raises(ValueError, match=f"identity: expected 0 to 62, got {identity}"):
      family_tree_figure(record, identity)


def test_scores_are_dots_by_task_and_method():
  nan = float("nan")
  rows = [
    {"name": "base", "scores": {"coding": 0.2, "database": 0.3}, "mean": 0.25},
    {"name": "the experts together", "scores": {}, "mean": None},
    {"name": "a method of a rather long name, one group a layer", "mean": 0.45},
    {"name": "CycleQD", "scores": {"coding": 0.5, "database": 0.55, "os": 0.6}, "mean": 0.55},
  ]
  rows[2]["scores"] = {"coding": 0.4, "database": nan, "os": 0.5}
  record = dataclasses.replace(make_record(children=0), rows=rows)
  figure = scores_figure(record)
  ax = figure.axes[0]
  methods = [label.get_text().replace("\n", " ") for label in ax.get_yticklabels()]
  assert methods == [record.rows[index]["name"] for index in (0, 2, 3)]
  dots = {line.get_label(): line for line in ax.lines}
  assert list(dots) == ["coding", "database", "os", "mean over tasks"]
  np.testing.assert_allclose(dots["coding"].get_xdata(), [0.2, 0.4, 0.5])
  np.testing.assert_allclose(dots["database"].get_xdata(), [0.3, nan, 0.55])
  np.testing.assert_allclose(dots["os"].get_xdata(), [nan, 0.5, 0.6])
  np.testing.assert_allclose(dots["mean over tasks"].get_xdata(), [0.25, 0.45, 0.55])
  for line in ax.lines:  # each dot in its method's line, the first method on top
    np.testing.assert_array_less(np.abs(line.get_ydata() - [0, 1, 2]), 0.5)
  assert ax.yaxis_inverted()
  weights = {text.get_text(): text.get_weight() for text in ax.texts}
  assert weights == {"mean": "normal", "0.250": "normal", "0.450": "normal", "0.550": "bold"}


def test_what_a_run_does_not_have_yet_is_left_out():
  full = make_record(num_tasks=2, children=4)
  everything = ["archives", "timeline", "curves", "family_tree", "scores"]
  assert list(all_figures(full)) == everything
  assert list(all_figures(make_record(finished=False))) == everything[:4]
  metrics = {name: values[:0] for name, values in full.metrics.items()}
  swarms = [row for row in full.rows if not row["scores"]]
  only_swarm = dataclasses.replace(full, best=None, metrics=metrics, rows=swarms)
  assert list(all_figures(only_swarm)) == ["archives", "timeline"]
  one_elite = record_of(np.full((1, 3), 0.5), [[-1, -1]], [0])
  figures = all_figures(one_elite)
  assert list(figures) == ["archives", "family_tree"]
  for figure in figures.values():
    figure.draw_without_rendering()
  nothing = record_of(np.zeros((0, 3)), np.zeros((0, 2), int), np.zeros(0, int))
  assert all_figures(nothing) == {}
  with pytest.raises(ValueError, match=r"record\.metrics"):
    curves_figure(nothing)
  with pytest.raises(ValueError, match=r"record\.rows"):
    scores_figure(only_swarm)


def test_archives_that_took_no_one_are_drawn_empty():
  record = record_of(np.full((3, 3), np.nan), np.full((3, 2), -1), [0, 0, 1])
  for figure in (archives_figure(record), timeline_figure(record)):
    figure.draw_without_rendering()
    for ax in panels_of(figure):
      assert np.ma.count(ax.collections[0].get_array()) == 0
      assert not ax.patches


def drawn_texts(figure: Figure):
  """Every text that is to be seen, and where it is."""
  unseen = set()
  for ax in figure.axes:
    for axis, span in ((ax.xaxis, ax.get_xlim()), (ax.yaxis, ax.get_ylim())):
      for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()):
        if not min(span) <= tick.get_loc() <= max(span):
          unseen |= {tick.label1, tick.label2}
  texts = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text() and text not in unseen]
  return [(text.get_text(), text.get_window_extent()) for text in texts]


LONG_NAMES = ("competition programming", "natural language understanding", "databases")


@pytest.mark.parametrize("num_tasks", [2, 3])
def test_no_text_overlaps_another_or_is_cut_off(num_tasks):
  record = make_record(num_tasks)
  names = LONG_NAMES[:num_tasks]
  rows = [row | {"scores": dict(zip(names, row["scores"].values(), strict=False))} for row in record.rows]
  record = dataclasses.replace(record, task_names=names, rows=rows)
  for name, figure in all_figures(record).items():
    figure.draw_without_rendering()
    texts = drawn_texts(figure)
    assert len(texts) > 10
    for text, box in texts:
      inside = box.x0 > -1 and box.y0 > -1 and box.x1 < figure.bbox.x1 + 1 and box.y1 < figure.bbox.y1 + 1
      assert inside, f"{name}: {text} is cut off"
    for (text, box), (other, place) in itertools.combinations(texts, 2):
      assert not box.padded(-1).overlaps(place), f"{name}: {text} overlaps {other}"


def test_saved_figures_open_and_are_the_same_each_time(tmp_path):
  record = make_record(num_tasks=2, children=4)
  for name, figure in all_figures(record).items():
    save_figure(figure, tmp_path / f"{name}.png")
    save_figure(figure, tmp_path / f"{name}.svg")
    image = matplotlib.image.imread(tmp_path / f"{name}.png")
    assert image.shape[1] == 7 * 150
    assert 0.02 < (image[..., :3].min(axis=-1) < 0.9).mean() < 0.9
    text = "".join(xml.etree.ElementTree.parse(tmp_path / f"{name}.svg").getroot().itertext())
    assert any(task in text for task in record.task_names)
    assert "<dc:date>" not in (tmp_path / f"{name}.svg").read_text()
  for ending in ("svg", "pdf", "png"):
    for number in (1, 2):
      save_figure(family_tree_figure(record), tmp_path / f"{number}.{ending}")
    assert (tmp_path / f"1.{ending}").read_bytes() == (tmp_path / f"2.{ending}").read_bytes()
