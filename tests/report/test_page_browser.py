"""The report in a real browser, opened from its file: what the mouse, the slider and the keys do."""

import base64
import dataclasses
import json
import shutil

import numpy as np
import pytest
from record_cases import make_record

from cqd_jax.report.page import write_report
from cqd_jax.report.png import png_bytes
from cqd_jax.report.record import Sample
from cqd_jax.store.costs import Cost

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed (the extra `test` has it)")
WebDriverWait = pytest.importorskip("selenium.webdriver.support.wait").WebDriverWait
BROWSER, DRIVER = (shutil.which(name) for name in ("chromium", "chromedriver"))
pytestmark = pytest.mark.skipif(not (BROWSER and DRIVER), reason="needs chromium and chromedriver on the PATH")

FLAGS = (
  "headless=new",
  "no-sandbox",
  "disable-gpu",
  "disable-quic",
  "no-first-run",
  "disable-background-networking",
  "disable-component-update",
  "disable-sync",
)
RECORD = make_record(children=80)
HOSTILE = "</script><img src=x onerror='document.title=\"broken\"'>"


class Browser:
  """Chromium with a page."""

  def __init__(self, driver, folder):
    self.driver, self.folder = driver, folder

  def open(self, record, width=1280, **media):
    path = self.folder / "report.html"
    write_report(record, path)
    self.command("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600)
    self.command(
      "Emulation.setEmulatedMedia",
      features=[{"name": f"prefers-{name.replace('_', '-')}", "value": value} for name, value in media.items()],
    )
    self.driver.get("about:blank")
    self.driver.get_log("browser")
    self.driver.get_log("performance")
    self.driver.get(path.as_uri())

  def command(self, name, **arguments):
    return self.driver.execute_cdp_cmd(name, arguments)

  def run(self, script, *arguments):
    return self.driver.execute_script(script, *arguments)

  def find(self, selector):
    return self.driver.find_element("css selector", selector)

  def hover(self, selector):
    """Moves the mouse onto an element, which is scrolled into the middle of the window first."""
    self.run("document.querySelector(arguments[0]).scrollIntoView({block: 'center', behavior: 'instant'})", selector)
    webdriver.ActionChains(self.driver, duration=0).move_to_element(self.find(selector)).perform()

  def click(self, selector):
    self.hover(selector)
    webdriver.ActionChains(self.driver, duration=0).click().perform()

  def press(self, key):
    self.driver.switch_to.active_element.send_keys(key)

  def texts(self, selector):
    return self.run("return [...document.querySelectorAll(arguments[0])].map((e) => e.textContent)", selector)

  def ids(self, selector):
    return sorted(self.run("return [...document.querySelectorAll(arguments[0])].map((e) => +e.dataset.id)", selector))

  def slide(self, batch):
    """As a finger does: the value changes, and the slider says so."""
    self.run(
      "const s = document.getElementById('batch'); s.value = arguments[0]; s.dispatchEvent(new Event('input'))", batch
    )

  def complaints(self):
    return [entry["message"] for entry in self.driver.get_log("browser")]

  def requests(self):
    """Addresses asked for since the page was opened."""
    messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
    return [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
  options = webdriver.ChromeOptions()
  options.binary_location = BROWSER
  for flag in (*FLAGS, f"user-data-dir={tmp_path_factory.mktemp('profile')}"):
    options.add_argument(f"--{flag}")
  options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
  driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
  yield Browser(driver, tmp_path_factory.mktemp("report"))
  driver.quit()


@pytest.fixture
def page(browser):
  """The page of `RECORD`, which must not have complained of anything when the test is over."""
  browser.open(RECORD)
  yield browser
  assert browser.complaints() == []


def strongest(archive):
  """An elite of an archive that two different individuals are the parents of."""
  individuals = RECORD.individuals
  return max(
    (one for one in RECORD.elites(archive).values() if len(set(individuals.parents[one])) == 2),
    key=lambda one: len(RECORD.ancestors(one)),
  )


def nobody():
  """A run that has scored no one yet."""
  record = make_record(children=0, finished=False)
  fields = {field.name: getattr(record.individuals, field.name)[:0] for field in dataclasses.fields(record.individuals)}
  individuals = dataclasses.replace(record.individuals, **fields)
  bins = np.zeros((0, 3), int)
  return dataclasses.replace(
    record, individuals=individuals, bins=bins, best=None, aggregated=[], facts={}, settings=""
  )


def experts(scores, taken, bins):
  """A run of its experts only."""
  record = make_record(children=0, finished=False)
  individuals = dataclasses.replace(record.individuals, scores=np.array(scores), taken=np.array(taken, bool))
  best = None if np.isnan(individuals.scores).all() else 0
  return dataclasses.replace(record, individuals=individuals, best=best, bins=np.array(bins), aggregated=[])


def test_opening_it_requests_nothing_but_itself(page):
  assert page.requests() == [(page.folder / "report.html").as_uri()]
  page.slide(3)
  page.click("[data-archive='0'] .cell")
  assert page.requests() == []
  assert page.run("return performance.getEntriesByType('resource').length") == 0


def test_the_score_table_has_all_methods_and_the_best_bold(page):
  rows = RECORD.rows
  assert page.texts(".scores tbody th") == [row["name"] for row in rows]
  assert page.texts(".scores thead th") == [
    "model",
    *RECORD.task_names,
    "mean",
    "min",
    "any 3",
    "any 8",
    "scored",
    "answers",
  ]
  coding = page.texts(".scores tbody td:nth-child(2)")
  assert coding == [f"{row['scores']['coding']:.3f}" if row["scores"] else "\u2013" for row in rows]
  best = max(row["scores"].get("coding", 0) for row in rows)
  assert set(page.texts(".scores tbody td:nth-child(2) b")) == {f"{best:.3f}"}


def test_hovering_a_cell_tells_scores_parents_weights_and_birth(page):
  one = strongest(1)
  page.hover(f"[data-archive='1'] .cell[data-id='{one}']")
  tooltip, individuals = page.find("#tooltip"), RECORD.individuals
  assert tooltip.is_displayed()
  assert f"Individual {one}" in tooltip.text
  assert f"born in batch {individuals.born[one]}" in tooltip.text
  for score in individuals.scores[one]:
    assert f"{score:.3f}" in tooltip.text
  for parent, (weight,) in zip(individuals.parents[one], individuals.weights(one), strict=True):
    name = f"expert {RECORD.task_names[parent]}" if parent < 3 else f"{parent}"
    assert f"{name} ({weight:.2f})" in tooltip.text
  assert f"archive {RECORD.task_names[individuals.archive[one]]}" in tooltip.text
  assert "expert_svd 0.3" in tooltip.text
  page.hover("#scores-title")
  assert not tooltip.is_displayed()


def test_hovering_tells_all_other_notes(browser):
  one = strongest(1)
  notes = list(RECORD.individuals.notes)
  notes[one] = {"rate": 0.12345, "sigmas": [0.1, 0.3], HOSTILE: HOSTILE, "x" * 200: "y" * 200}
  browser.open(dataclasses.replace(RECORD, individuals=dataclasses.replace(RECORD.individuals, notes=notes)))
  browser.hover(f"[data-archive='1'] .cell[data-id='{one}']")
  names, texts = browser.texts("#tooltip dt"), browser.texts("#tooltip dd")
  assert dict(zip(names, texts, strict=True)).items() >= {
    ("rate", "0.123"),
    ("sigmas", "0.2 on average, 0.1 to 0.3 over 2"),
    (HOSTILE, HOSTILE),
    ("x" * 200, "y" * 79 + "\u2026"),
  }
  script = """
    const right = document.getElementById("tooltip").getBoundingClientRect().right;
    return [...document.querySelectorAll("#tooltip dt, #tooltip dd")].every((e) => {
      const range = document.createRange();
      range.selectNodeContents(e);
      return range.getBoundingClientRect().right <= right;
    })"""
  assert browser.run(script)
  assert browser.run("return document.querySelectorAll('img').length") == 0
  assert browser.complaints() == []


def test_the_tooltip_stays_within_the_window_and_off_its_cell(page):
  script = """
    const tip = document.getElementById("tooltip").getBoundingClientRect();
    const cell = document.querySelector(arguments[0]).getBoundingClientRect();
    return [tip.left >= 0 && tip.top >= 0 && tip.right <= innerWidth && tip.bottom <= innerHeight,
      tip.left >= cell.right || tip.right <= cell.left || tip.top >= cell.bottom || tip.bottom <= cell.top]"""
  for archive in range(3):
    for one in (min(RECORD.elites(archive).values()), max(RECORD.elites(archive).values())):
      selector = f"[data-archive='{archive}'] .cell[data-id='{one}']"
      page.hover(selector)
      assert page.run(script, selector) == [True, True]


def test_keys_walk_over_cells_and_choose(page):
  page.run("document.querySelector(\"[data-archive='2'] .cell[tabindex='0']\").focus()")
  first = page.run("return +document.activeElement.dataset.id")
  assert page.find("#tooltip").is_displayed()
  page.press("\ue014")  # right
  second = page.run("return +document.activeElement.dataset.id")
  bins = RECORD.bins
  assert second != first
  assert bins[second][0] > bins[first][0]
  page.press("\ue007")  # enter
  assert page.ids("#tree .node") == RECORD.ancestors(second)
  page.press("\ue00c")  # escape
  assert not page.find("#tooltip").is_displayed()


def test_experts_are_boxed_where_they_were_filed(page):
  for archive in range(3):
    places = {tuple(np.delete(RECORD.bins[expert], archive)) for expert in range(3)}
    assert len(page.texts(f"[data-archive='{archive}'] .expert")) == len(places)
    for expert in range(3):
      if expert in RECORD.elites(archive).values():
        cell, box = (
          page.run(
            "const e = document.querySelector(arguments[0]).getBBox(); return [e.x, e.y, e.width, e.height]", selector
          )
          for selector in (
            f"[data-archive='{archive}'] .cell[data-id='{expert}']",
            f"[data-archive='{archive}'] .expert:nth-of-type({expert + 1})",
          )
        )
        np.testing.assert_allclose(cell, box, atol=1e-3)


def test_the_slider_replays_the_archives_batch_by_batch(page):
  last = int(RECORD.individuals.born[-1])
  assert page.find("#batch").get_attribute("max") == str(last)
  for batch in (last, 0, 1, 7, last - 1):
    page.slide(batch)
    for archive in range(3):
      held = RECORD.elites(archive, batch)
      assert page.ids(f"[data-archive='{archive}'] .cell") == sorted(held.values())
      assert f"{len(held)} elite" in page.texts(f"[data-archive='{archive}'] .caption")[0]
  page.slide(0)
  assert set(page.ids(".cell")) <= set(range(RECORD.num_experts))
  assert "experts alone" in page.texts("#moment")[0]
  page.slide(7)
  assert "batch 7 of" in page.texts("#moment")[0]
  qd_scores = page.texts(".chart:nth-child(2) .values b")
  assert qd_scores == [f"{value:.1f}" for value in RECORD.metrics["qd_score"][6]]
  markers = page.run("return [...document.querySelectorAll('.marker')].map((e) => e.getAttribute('d'))")
  assert len(set(markers)) == 1


def test_play_runs_from_the_start_to_the_end(page):
  page.run("setBatch(lastBatch - 1)")
  page.click("#play")
  assert page.texts("#play span") == ["Pause"]
  wait = WebDriverWait(page.driver, 5)
  wait.until(lambda _: page.texts("#play span") == ["Play"])
  assert page.run("return state.batch === lastBatch")
  page.click("#play")
  assert page.run("return state.batch < lastBatch")
  page.click("#play")
  assert page.texts("#play span") == ["Play"]


def test_choosing_an_elite_draws_its_ancestors_and_their_lines(page):
  assert page.ids("#tree .node") == RECORD.ancestors(RECORD.best)
  one = strongest(2)
  page.click(f"[data-archive='2'] .cell[data-id='{one}']")
  family = RECORD.ancestors(one)
  assert page.ids("#tree .node") == family
  lines = page.run(
    "return [...document.querySelectorAll('#tree .hit')].map((e) => [+e.dataset.parent, +e.dataset.child])"
  )
  parents = RECORD.individuals.parents
  assert sorted(map(tuple, lines)) == sorted((int(p), child) for child in family for p in parents[child] if p >= 0)
  assert f"{len(family) - 1} ancestors" in page.texts("#family-summary")[0]
  # Time runs from left to right, and no two touch.
  at = page.run(
    "return [...document.querySelectorAll('#tree .node')].map((e) => [+e.dataset.id, e.getCTM().e, e.getCTM().f])"
  )
  born = RECORD.individuals.born
  by_birth = sorted((born[int(identity)], x) for identity, x, _ in at)
  assert [x for _, x in by_birth] == sorted(x for _, x in by_birth)
  distances = [np.hypot(a[1] - b[1], a[2] - b[2]) for i, a in enumerate(at) for b in at[:i]]
  assert min(distances) > 24


def test_hovering_a_line_tells_the_merge_weight_and_a_click_on_an_ancestor_chooses_it(page):
  one = strongest(0)
  page.run("choose(arguments[0])", one)
  parent, weight = int(RECORD.individuals.parents[one][0]), RECORD.individuals.weights(one)[0, 0]
  page.run(
    "const over = new PointerEvent('pointerover', {bubbles: true, pointerType: 'mouse'});"
    "document.querySelector(arguments[0]).dispatchEvent(over)",
    f".hit[data-parent='{parent}'][data-child='{one}']",
  )
  assert f"merge weight {weight:.2f}" in page.find("#tooltip").text
  assert len(page.texts(".edge.lit")) == 2
  page.click(f"#tree .node[data-id='{parent}']")
  assert page.ids("#tree .node") == RECORD.ancestors(parent)


def test_answers_are_text_and_can_be_filtered(browser):
  samples = [Sample("coding", HOSTILE, HOSTILE, HOSTILE, 1.0), *RECORD.samples]
  browser.open(dataclasses.replace(RECORD, samples=samples, settings=HOSTILE, facts={HOSTILE: HOSTILE}))
  assert browser.texts(".prompt")[0] == HOSTILE
  assert browser.run("return document.querySelectorAll('img').length") == 0
  assert browser.driver.title == RECORD.name
  for passed, name in ((True, "passed"), (False, "failed")):
    browser.click(f"[data-filter='{name}']")
    assert len(browser.texts(".sample")) == sum(sample.passed == passed for sample in samples)
    assert set(browser.texts(".verdict")) == {"✓ passed" if passed else "✗ failed"}
  assert browser.complaints() == []


def pictured(size, caption, color=(0, 90, 200)):
  """A caption, and a square of a color with a white corner."""
  array = np.full((size, size, 3), color, np.uint8)
  array[: size // 2, : size // 2] = 255
  return caption, base64.b64encode(png_bytes(array)).decode()


def test_a_dialogue_is_shown_turn_by_turn_with_what_was_executed_and_why_it_failed(browser):
  turns = [
    ("system", "You are a careful shell."),
    ("user", "How many files?"),
    ("assistant", f"Act: bash {HOSTILE}"),
    ("executed", "ls | wc -l"),
    ("user", "The output of the OS: 3"),
    ("assistant", ""),
  ]
  samples = [
    Sample("coding", "How many files?", "", "", 0.0, turns=turns, reason=f"timeout: over 5 s {HOSTILE}"),
    Sample("coding", "one turn", "", "x", 0.0, reason="error: NameError"),
    Sample("coding", "no reason", "", "x", 1.0),
  ]
  costs = [Cost("the experts", 3, 300, 12.4, 320, 1_000_000, 40_000), Cost("CycleQD", 60, 6000, 250.0)]
  browser.open(dataclasses.replace(RECORD, samples=samples, costs=costs))
  assert browser.texts(".turns h4") == ["system", "user", "model", "executed", "user", "model"]
  assert browser.texts(".turns pre") == [*(text for _, text in turns[:-1]), "(nothing)"]
  assert browser.texts(".reason") == [f"timeout: over 5 s {HOSTILE}", "error: NameError"]
  assert browser.run("return document.title") == RECORD.name
  browser.click("#scores summary")
  cells = browser.run(
    "return [...document.querySelectorAll('.costs tr')].map((r) => [...r.cells].map((c) => c.textContent))"
  )
  assert cells == [
    ["scored", "models", "questions", "turns", "tokens read", "tokens decoded", "seconds"],
    ["the experts", "3", "300", "320", "1,000,000", "40,000", "12"],
    ["CycleQD", "60", "6,000", "", "", "", "250"],
  ]
  assert browser.complaints() == []


def test_pictures_are_shown_side_by_side_and_scores_by_their_value(browser):
  both = [pictured(8, "asked"), pictured(600, HOSTILE)]
  samples = [
    Sample("coding", "right", "", "", 1.0, both),
    Sample("coding", "nearly", "gold", "answer", 0.9999, both[:1]),
    Sample("coding", "not finite", "", "", float("nan")),
    Sample("os", "wrong", "", "words", 0.0, [("no picture", "AAAA"), ("", "BBBB")]),
  ]
  browser.open(dataclasses.replace(RECORD, samples=samples))
  script = (
    "return Promise.all([...document.querySelectorAll('.pictures img')].map((e) => e.decode().then(() => true, () =>"
    " false).then((fine) => [fine, e.naturalWidth, e.classList.contains('enlarged')])))"
  )
  assert browser.run(script) == [
    [True, 8, True],
    [True, 600, False],
    [True, 8, True],
    [False, 0, False],
    [False, 0, False],
  ]
  boxes = browser.run(
    "return [...document.querySelectorAll('.sample:first-child .pictures img')].map((e) => [e.x, e.y, e.width])"
  )
  assert boxes[0][1] == boxes[1][1]
  assert boxes[0][0] + boxes[0][2] < boxes[1][0]
  assert browser.texts("figure figcaption")[-5:] == ["asked", HOSTILE, "asked", "no picture", ""]
  assert browser.texts(".verdict") == ["✓ passed", "score 1.000", "✗ not scored", "✗ failed"]
  assert browser.texts("#answers .choices button") == ["all (4)", "passed (1)", "not passed (3)"]
  assert browser.texts(".task-samples .caption") == ["mean score 1.000", "mean score 0.000"]
  assert all(url.startswith("data:image/png;base64,") for url in browser.requests()[1:])
  assert browser.complaints() == []
  browser.click("[data-filter='failed']")
  assert browser.texts(".prompt") == ["nearly", "not finite", "wrong"]
  browser.open(dataclasses.replace(RECORD, samples=samples), width=360)
  assert browser.run("return document.scrollingElement.scrollWidth <= innerWidth")


def long_names():
  """Texts without a place to break a line."""
  record = make_record(children=24)
  names = [f"{'a_very_long_task_name_' * 4}{k}" for k in range(3)]
  rows = [{**row, "name": "m" * 90, "scores": dict.fromkeys(names, 0.5)} for row in record.rows]
  samples = [Sample(name, *["q" * 200] * 3, score=1.0) for name in names]
  return dataclasses.replace(
    record, name="n" * 90, task_names=names, facts={"f" * 90: "x" * 90}, rows=rows, samples=samples, settings="s" * 200
  )


ODD = {
  "two tasks": make_record(num_tasks=2, children=24),
  "four tasks": make_record(num_tasks=4, children=24),
  "voronoi cells": make_record(num_tasks=5, children=24, voronoi=True),
  "unfinished": make_record(children=24, finished=False),
  "one batch": make_record(children=4, finished=False),
  "long names": long_names(),
  "nobody": nobody(),
  "equal experts": experts(np.full((3, 3), 0.5), [[1, 1, 1], [0, 0, 0], [0, 0, 0]], np.full((3, 3), 4)),
  "an expert failed": experts(
    [[0.5, 0.1, 0.1], [np.nan] * 3, [0.1, 0.1, 0.5]],
    [[1, 1, 1], [0, 0, 0], [1, 1, 1]],
    [[9, 1, 1], [0, 0, 0], [1, 1, 9]],
  ),
  "all failed": experts(np.full((3, 3), np.nan), np.zeros((3, 3)), np.zeros((3, 3), int)),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_records_are_drawn_without_a_complaint(browser, name):
  record = ODD[name]
  browser.open(record, width=360)
  assert browser.complaints() == []
  assert browser.run("return document.scrollingElement.scrollWidth <= innerWidth")
  assert "NaN" not in browser.run("return document.querySelector('main').outerHTML")
  assert browser.texts("#status")[0].startswith("finished" if record.finished else "in progress: ")
  said = " ".join(browser.texts(".missing, .note"))
  for what, absent in (
    ("No scores yet", not record.rows),
    ("No answers yet", not record.samples),
    ("No curves yet", not record.metrics),
    ("archives are empty", not record.individuals.taken.any()),
    ("No family tree yet", record.best is None),
    ("Scoring failed for the expert database", name == "an expert failed"),
    ("share one cell", name == "equal experts"),
  ):
    assert (what in said) == absent, what


def test_four_tasks_have_a_panel_each_pair_of_axes_and_show_the_best_behind(browser):
  record = ODD["four tasks"]
  browser.open(record)
  scores, bins = record.individuals.scores, record.bins
  panels = browser.run(
    "return [...document.querySelectorAll(\"[data-archive='1'] .panels svg\")].map("
    "(e) => [...e.querySelectorAll('.cell')].map((c) => +c.dataset.id))"
  )
  assert len(panels) == 3
  for pair, shown in zip(((0, 2), (0, 3), (2, 3)), panels, strict=True):
    best = {}
    for one in record.elites(1).values():
      place = tuple(bins[one, list(pair)])
      best[place] = max(best.get(place, -1), scores[one, 1])
    assert sorted(scores[one, 1] for one in shown) == sorted(best.values())


def test_a_long_lineage_stays_usable(browser):
  record = make_record(children=1200, batch=8)
  browser.open(record)
  family = record.ancestors(record.best)
  assert len(family) > 150
  assert browser.ids("#tree .node") == family
  assert "bear numbers" in browser.texts("#family-summary")[0]
  assert browser.run("return document.scrollingElement.scrollWidth <= innerWidth")
  assert browser.find("#tree").size["height"] < 900
  assert browser.complaints() == []


def test_of_a_very_large_family_the_youngest_are_drawn(browser):
  """One of whom each is the child of the one before."""
  record = make_record(children=1000, batch=8)
  parents = np.repeat(np.arange(-1, 1002)[:, None], 2, axis=1)
  parents[:3] = -1
  browser.open(dataclasses.replace(record, individuals=dataclasses.replace(record.individuals, parents=parents)))
  browser.run("choose(1002)")
  assert browser.ids("#tree .node") == [2, *range(203, 1003)]
  assert "1,000 ancestors" in browser.texts("#family-summary")[0]
  assert "youngest 800 are drawn" in browser.texts("#family-summary")[0]
  assert browser.complaints() == []


def luminance(color):
  channels = np.array([int(part) for part in color[color.index("(") + 1 : -1].split(",")[:3]]) / 255
  linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
  return float(linear @ [0.2126, 0.7152, 0.0722])


TEXTS = {
  "color": (
    *("h1", ".lead", ".note", ".caption", "nav a", ".scores td", ".scores thead th", ".prompt"),
    *(".passed .verdict", ".failed .verdict", "#moment", "#status"),
  ),
  "fill": (".axis-name", ".axes text", *(f".line-name.task-{task}" for task in range(3)), ".founder-name"),
}


def test_text_is_readable_in_light_and_dark(browser):
  """By the contrast that WCAG 2 asks of ordinary text, 4.5."""
  script = "return getComputedStyle(document.querySelector(arguments[0]))[arguments[1]]"
  grounds = []
  for scheme in ("light", "dark"):
    browser.open(RECORD, color_scheme=scheme)
    behind = [luminance(browser.run(script, where, "backgroundColor")) for where in ("body", ".sample")]
    grounds.append(behind[0])
    for name, selectors in TEXTS.items():
      for selector in selectors:
        text = luminance(browser.run(script, selector, name))
        contrasts = [(max(text, ground) + 0.05) / (min(text, ground) + 0.05) for ground in behind]
        assert min(contrasts) >= 4.5, (scheme, selector)
  assert grounds[0] > 0.8
  assert grounds[1] < 0.05


def test_it_fits_a_phone(browser):
  browser.open(RECORD, width=360, reduced_motion="reduce")
  assert browser.run("return document.scrollingElement.scrollWidth <= innerWidth")
  browser.run("choose(arguments[0])", max(range(len(RECORD.individuals)), key=lambda one: len(RECORD.ancestors(one))))
  for selector in (".scroller", "#tree"):  # what is wider scrolls within itself
    assert browser.run("const e = document.querySelector(arguments[0]); return e.scrollWidth > e.clientWidth", selector)
  assert browser.run("return document.scrollingElement.scrollWidth <= innerWidth")
  assert browser.run("return getComputedStyle(document.querySelector('.cell')).transitionDuration") == "0s"


def test_a_tap_shows_the_tooltip_and_chooses(browser):
  browser.open(RECORD, width=360)
  one = strongest(0)
  x, y = browser.run(
    "const e = document.querySelector(arguments[0]); e.scrollIntoView({block: 'center', behavior: 'instant'});"
    "const b = e.getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height / 2]",
    f"[data-archive='0'] .cell[data-id='{one}']",
  )
  browser.command("Emulation.setTouchEmulationEnabled", enabled=True)
  browser.command("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": x, "y": y}])
  browser.command("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
  WebDriverWait(browser.driver, 5).until(lambda _: browser.find("#tooltip").is_displayed())
  assert f"Individual {one}" in browser.find("#tooltip").text
  assert browser.ids("#tree .node") == RECORD.ancestors(one)
  browser.command("Emulation.setTouchEmulationEnabled", enabled=False)
