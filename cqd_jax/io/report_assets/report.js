/* Draws the report: its head, score table, answers and settings; and starts all else. */

const ANSWERS_SHOWN = 6;

function drawHead() {
  const children = numIndividuals - numExperts;
  const alive = new Set(tasks.flatMap((_, archive) => (bins ? elites(archive, lastBatch) : takenBy[archive])));
  const coverage = (metrics.coverage ?? []).map((curve) => curve.at(-1)).filter(isNumber);
  const shown = {
    "children scored": record.finished ? children.toLocaleString("en") : `${children} of ${record.planned}`,
    "distinct elites": metrics.num_elites?.at(-1) ?? alive.size,
    "best mean score": record.best === null ? "–" : score(mean(record.best)),
    "mean coverage": coverage.length ? percent(sum(coverage) / coverage.length) : "–",
  };
  place("status").className = record.finished ? "finished" : "unfinished";
  place("status").textContent = record.finished ? "finished" :
    `in progress: ${children} of ${count(record.planned, "child", "children")}`;
  const entries = (named) => named.map(([name, text]) => html("div", {}, html("dt", {}, name), html("dd", {}, `${text}`)));
  fill("figures", entries(Object.entries(shown)));
  fill("facts", entries(record.facts));
}

function drawScores() {
  if (!record.rows.length) {
    return fill("scores-content", missing("No scores yet: all methods are scored on the test questions at the end of the run."));
  }
  const columns = [
    ...tasks.map((task) => [task, (row) => row.scores[task]]),
    ["mean", (row) => row.mean],
    ["min", (row) => row.minimum],
    ...record.swarms.map((size) => [`any ${size}`, (row) => row.solved[size]]),
  ].filter(([, value]) => record.rows.some((row) => isNumber(value(row))));
  const most = Math.max(1, ...record.rows.flatMap((row) => columns.map(([, value]) => value(row) ?? 0)));
  const best = columns.map(([, value]) => Math.max(...record.rows.map((row) => value(row) ?? -Infinity)));
  const cell = (value, top) => {
    if (!isNumber(value)) return html("td", { class: "none" }, html("span", { "aria-label": "none" }, "–"));
    const text = html(value === top ? "b" : "span", {}, score(value)), bar = html("i", { "aria-hidden": "true" });
    bar.style.width = `${Math.max(0, (100 * value) / most)}%`;
    return html("td", { class: value === top ? "best" : null }, text, html("span", { class: "bar" }, bar));
  };
  const chosen = (row) => Object.entries(row.chosen).map(([name, value]) => `${name} ${value}`).join(", ");
  const searched = record.rows.some((row) => row.evaluations);
  const head = html("tr", {}, html("th", { scope: "col" }, "model"),
    columns.map(([name]) => html("th", { scope: "col" }, name)), searched ? html("th", { scope: "col" }, "scored") : null);
  const body = record.rows.map((row) => html("tr", { class: row.name.startsWith("CycleQD") ? "own" : null },
    html("th", { scope: "row" }, row.name, chosen(row) ? html("small", {}, chosen(row)) : null),
    columns.map(([, value], i) => cell(value(row), best[i])),
    searched ? html("td", { class: "plain" }, row.evaluations ? row.evaluations.toLocaleString("en") : "") : null));
  const explained = ["min: the lowest of the tasks' scores.",
    record.swarms.length ? `any ${record.swarms[0]}: the share of questions that at least one of ${record.swarms[0]} ` +
      "complementary models solves, chosen on validation." : "",
    searched ? "scored: candidates that a method tried on validation." : "", "The best of each column is bold."];
  fill("scores-content",
    html("p", { class: "lead" }, "The share of test questions that each method answers right. Neither training nor search saw them."),
    html("div", { class: "scroller", tabindex: 0, role: "region", "aria-label": "Score table" },
      html("table", { class: "scores" }, html("thead", {}, head), html("tbody", {}, body))),
    html("p", { class: "note" }, explained.filter(Boolean).join(" ")));
}

function drawSample([, prompt, gold, answer, passed]) {
  const block = (name, text) => html("div", {}, html("h4", {}, name), html("pre", {}, text || "(nothing)"));
  return html("article", { class: passed ? "sample passed" : "sample failed" },
    html("p", { class: "verdict" }, html("span", { "aria-hidden": "true" }, passed ? "✓" : "✗"), passed ? " passed" : " failed"),
    html("p", { class: "prompt" }, prompt),
    block("answer", answer),
    gold === answer ? html("p", { class: "note" }, "Word for word as expected.") : block("expected", gold));
}

function drawAnswers() {
  const { samples } = record;
  if (!samples.length) {
    return fill("answers-content", missing("No answers yet: the best model answers test questions at the end of the run."));
  }
  const choices = { all: () => true, passed: (one) => one[4], failed: (one) => !one[4] };
  const lists = html("div"), whole = new Set();
  let filter = "all";
  function drawLists() {
    lists.replaceChildren(...[...new Set(samples.map(([task]) => task))].map((task) => {
      const own = samples.filter((one) => one[0] === task), kept = own.filter(choices[filter]);
      const shown = whole.has(task) ? kept : kept.slice(0, ANSWERS_SHOWN);
      const more = html("button", { type: "button" }, `show all ${kept.length}`);
      more.addEventListener("click", () => { whole.add(task); drawLists(); });
      return html("div", { class: "task-samples" },
        html("h3", {}, task, html("span", { class: "caption" }, `${own.filter(choices.passed).length} of ${own.length} passed`)),
        kept.length ? html("div", { class: "samples" }, shown.map(drawSample)) : missing(`None ${filter}.`),
        shown.length < kept.length ? html("p", { class: "choices" }, more) : null);
    }));
    for (const button of buttons.children) button.setAttribute("aria-pressed", button.dataset.filter === filter);
  }
  const buttons = html("div", { class: "choices", role: "group", "aria-label": "Which answers" }, Object.keys(choices).map((name) =>
    html("button", { type: "button", "data-filter": name }, `${name} (${samples.filter(choices[name]).length})`)));
  buttons.addEventListener("click", (event) => {
    if (event.target.dataset.filter) { filter = event.target.dataset.filter; drawLists(); }
  });
  fill("answers-content", html("p", { class: "lead" }, "Test questions as the best model answered them; each answer was executed " +
    "and judged by what it did, not by its wording."), buttons, lists);
  drawLists();
}

function drawSettings() {
  fill("settings-content", record.settings.trim() ? html("details", {}, html("summary", {}, "All settings of this run (YAML)"),
    html("pre", {}, record.settings)) : missing("No settings are recorded."));
}

drawHead();
drawScores();
drawArchives();
drawTimeline();
drawCurves();
prepareFamily();
drawFamily();
drawAnswers();
drawSettings();
setBatch(lastBatch);
