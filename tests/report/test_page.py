"""The report is one file that asks for nothing, says exactly what the record says, and takes no text for markup."""

import base64
import dataclasses
import hashlib
import html.parser
import json
import re

import numpy as np
import pytest
from record_cases import make_record

from cqd_jax.report.page import render_report, write_report
from cqd_jax.report.record import Sample
from cqd_jax.store.costs import Cost

HOSTILE = (
  "</script><img src=x onerror=alert(1)> <!-- <script> \u2028 \u2029 \ud800 ${record} $script {{x}} 'q' \"q\" &amp; \\"
)


class Page(html.parser.HTMLParser):
  """Elements in order, and the text inside of scripts and styles."""

  def __init__(self, text):
    super().__init__()
    self.elements, self.texts = [], []
    self.feed(text)
    self.close()

  def handle_starttag(self, tag, attrs):
    self.elements.append((tag, dict(attrs)))
    if tag in ("script", "style", "title"):
      self.texts.append("")

  def handle_data(self, data):
    if self.elements and self.elements[-1][0] in ("script", "style", "title"):
      self.texts[-1] += data

  def handle_endtag(self, tag):
    if tag in ("script", "style", "title"):
      self.elements.append((f"/{tag}", {}))


def embedded(text):
  """The record inside of a page."""
  return json.loads(Page(text).texts[2])


def with_notes(record, notes):
  return dataclasses.replace(record, individuals=dataclasses.replace(record.individuals, notes=notes))


CASES = {
  "two tasks": {"num_tasks": 2},
  "three tasks": {},
  "four tasks": {"num_tasks": 4},
  "voronoi": {"num_tasks": 5, "voronoi": True},
  "unfinished": {"finished": False},
  "experts only": {"children": 0, "finished": False},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_page_needs_and_asks_for_nothing_else(case):
  text = render_report(make_record(**case))
  page = Page(text)
  assert not re.search(r"https?:|//[a-z0-9.-]+\.[a-z]{2,}/|@import|url\(", text)
  for tag, attributes in page.elements:
    assert tag not in ("link", "img", "iframe", "object", "embed", "base", "form")
    assert "src" not in attributes
    assert attributes.get("href", "#").startswith("#")
    assert not [name for name in attributes if name.startswith("on")]
  assert "fetch(" not in text
  assert "innerHTML" not in text


def test_the_policy_lets_in_the_one_style_and_the_one_script():
  page = Page(render_report(make_record()))
  (policy,) = [
    attributes["content"]
    for tag, attributes in page.elements
    if tag == "meta" and attributes.get("http-equiv") == "Content-Security-Policy"
  ]
  _, style, _, script = page.texts

  def digest(content):
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"

  assert policy.startswith("default-src 'none';")
  assert re.search("style-src ([^;]*)", policy)[1] == digest(style)
  assert re.search("script-src ([^;]*)", policy)[1] == digest(script)
  assert re.search("img-src ([^;]*)", policy)[1] == "data:"


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_figures_in_the_page_are_those_of_the_record(case):
  record = make_record(**case)
  shown, individuals = embedded(render_report(record)), record.individuals
  scores = np.array(shown["scores"], float).T
  np.testing.assert_allclose(scores, individuals.scores, rtol=0, atol=6e-6)
  assert np.isnan(individuals.scores).any() == (None in shown["scores"][0])
  np.testing.assert_array_equal(np.array(shown["taken"]).T, individuals.taken)
  np.testing.assert_array_equal(np.array(shown["parents"]).T, individuals.parents)
  np.testing.assert_array_equal(shown["born"], individuals.born)
  np.testing.assert_array_equal(shown["archive"], individuals.archive)
  assert [shown["mutations"][i] for i in shown["mutation"]] == list(individuals.mutation)
  for one, mine in enumerate(shown["weights"]):
    theirs = individuals.weights(one)
    assert (mine is None) == (theirs is None)
    if theirs is not None:
      np.testing.assert_allclose(mine, theirs[:, 0], atol=6e-6)
  if record.bins is None:
    assert shown["bins"] is None
    assert shown["edges"] is None
  else:
    np.testing.assert_array_equal(np.array(shown["bins"]).T, record.bins)
    np.testing.assert_allclose(shown["edges"], record.edges, atol=6e-6)
  for name, values in record.metrics.items():
    np.testing.assert_allclose(np.array(shown["metrics"][name]).T, values, atol=6e-6)
  assert (shown["best"], shown["finished"], shown["planned"]) == (record.best, record.finished, record.num_planned)
  assert [row["name"] for row in shown["rows"]] == [row["name"] for row in record.rows]
  assert len(shown["samples"]) == len(record.samples)


def test_weights_of_many_groups_are_told_by_mean_least_largest_and_number():
  record = make_record(children=8)
  notes = list(record.individuals.notes)
  notes[5] = {"weights": [[0.25, 0.5, 0.75, 1.0], [0.75, 0.5, 0.25, 0.0]]}
  assert embedded(render_report(with_notes(record, notes)))["weights"][5] == [
    [0.625, 0.25, 1.0, 4],
    [0.375, 0.0, 0.75, 4],
  ]


def test_other_notes_are_a_few_words_each():
  record = make_record(children=8)
  notes = list(record.individuals.notes)
  notes[5] = {"rate": 0.12345, "weights": [[0.5], [0.5]], "sigmas": [0.1, 0.3], HOSTILE: HOSTILE}
  shown = embedded(render_report(with_notes(record, notes)))
  said = " ".join(HOSTILE.split())[:79] + "\u2026"
  assert shown["notes"][4:6] == [
    [],
    [["rate", "0.123"], ["sigmas", "0.2 on average, 0.1 to 0.3 over 2"], [HOSTILE, said]],
  ]
  assert shown["weights"][5] == [0.5, 0.5]


def test_hostile_text_stays_data():
  record = make_record(children=8)
  plain = Page(render_report(record)).elements
  name = HOSTILE.replace("\ud800", "")  # what a file could be named
  hostile = dataclasses.replace(
    record,
    name=name,
    task_names=[f"{HOSTILE} {k}" for k in range(3)],
    facts={HOSTILE: HOSTILE},
    settings=HOSTILE,
    costs=[Cost(HOSTILE, 1, 2, 0.5)],
    rows=[
      {"name": HOSTILE, "scores": {f"{HOSTILE} 0": 0.5}, "mean": 0.5, "minimum": 0.5, "evaluations": 0, "solved": {}}
    ],
    samples=[
      Sample(HOSTILE, HOSTILE, HOSTILE, HOSTILE, 1.0, [(HOSTILE, "iVBORw0KGgo=")], [(HOSTILE, HOSTILE)], HOSTILE)
    ],
  )
  text = render_report(hostile)
  text.encode("utf-8")
  assert Page(text).elements == plain
  shown = embedded(text)
  assert shown["samples"] == [
    [HOSTILE, HOSTILE, HOSTILE, HOSTILE, 1.0, [[HOSTILE, "iVBORw0KGgo="]], [[HOSTILE, HOSTILE]], HOSTILE]
  ]
  assert shown["settings"] == HOSTILE
  assert (shown["costs"][0]["name"], shown["costs"][0]["turns"]) == (HOSTILE, None)
  assert shown["tasks"][1] == f"{HOSTILE} 1"
  assert Page(text).texts[0] == name


def test_scores_of_samples_are_exact():
  scores = [1.0, 0.0, 0.9999999, -2.5, 3.0, float("nan"), float("-inf")]
  samples = [Sample("coding", "?", "", "", score) for score in scores]
  shown = embedded(render_report(dataclasses.replace(make_record(children=8), samples=samples)))
  assert [sample[4] for sample in shown["samples"]] == [1.0, 0.0, 0.9999999, -2.5, 3.0, None, None]
  assert [sample.passed for sample in samples] == [True, False, False, False, True, False, False]


def test_what_is_not_finite_is_null():
  record = make_record(children=8)
  metrics = {**record.metrics, "max_fitness": np.full((2, 3), -np.inf)}
  rows = [{"name": "x", "scores": {"coding": float("nan")}, "mean": float("inf"), "minimum": None, "evaluations": 0}]
  shown = embedded(render_report(dataclasses.replace(record, metrics=metrics, rows=rows)))
  assert shown["metrics"]["max_fitness"] == [[None, None]] * 3
  assert shown["rows"][0]["scores"] == {"coding": None}
  assert shown["rows"][0]["mean"] is None


def test_a_run_that_has_not_scored_anyone_has_a_page():
  record = make_record(children=0, finished=False)
  nobody = dataclasses.replace(
    record.individuals,
    **{field.name: getattr(record.individuals, field.name)[:0] for field in dataclasses.fields(record.individuals)},
  )
  shown = embedded(
    render_report(
      dataclasses.replace(
        record, individuals=nobody, bins=np.zeros((0, 3), int), metrics={}, best=None, aggregated=[], num_planned=60
      )
    )
  )
  assert shown["scores"] == [[], [], []]
  assert shown["born"] == []
  assert shown["best"] is None


def test_a_long_run_gives_a_small_file():
  assert len(render_report(make_record(children=1200, batch=8))) < 250_000


def test_the_file_is_replaced_whole(tmp_path):
  path = tmp_path / "report.html"
  path.write_text("before")
  record = make_record(children=8)
  write_report(record, path)
  assert path.read_text(encoding="utf-8") == render_report(record)
  assert [file.name for file in tmp_path.iterdir()] == ["report.html"]
