/* Draws the report: its head, score table, answers and settings; and starts all else. */

const ANSWERS_SHOWN = 6;

function drawHead() {
  const children = numIndividuals - numFounders, planned = count(record.planned, "child", "children");
  const coverage = (metrics.coverage ?? []).map((curve) => curve.at(-1)).filter(isNumber);
  const shown = [
    ["children scored", record.finished ? children.toLocaleString("en") : `${children} of ${record.planned}`],
    ["distinct elites", metrics.num_elites?.at(-1) ?? new Set(tasks.flatMap((_, k) => elites(k, lastBatch))).size],
    ["best mean score", record.best === null ? "–" : score(mean(record.best))],
    ["mean coverage", coverage.length ? percent(sum(coverage) / coverage.length) : "–"],
  ];
  place("status").className = record.finished ? "finished" : "unfinished";
  place("status").textContent = record.finished ? "finished" : `in progress: ${children} of ${planned}`;
  const entry = ([name, text]) => html("div", {}, html("dt", {}, name), html("dd", {}, `${text}`));
  fill("figures", shown.map(entry));
  fill("facts", record.facts.map(entry));
}

/* Columns of the score table that hold a number, as [name, what gives it of a row]. */
function scoreColumns() {
  const columns = [
    ...tasks.map((task) => [task, (row) => row.scores[task]]),
    ["mean", (row) => row.mean],
    ["min", (row) => row.minimum],
    ...record.swarms.map((size) => [`any ${size}`, (row) => row.solved[size]]),
  ];
  return columns.filter(([, value]) => record.rows.some((row) => isNumber(value(row))));
}

function scoreTable() {
  const { rows } = record, columns = scoreColumns();
  const costs = [["scored", "evaluations"], ["answers", "answers"]].filter(([, name]) => rows.some((row) => row[name]));
  const values = rows.map((row) => columns.map(([, value]) => value(row)));
  const best = columns.map((_, i) => Math.max(...values.map((row) => row[i] ?? -Infinity)));
  const longest = Math.max(1, ...best);
  const cell = (value, i) => {
    if (!isNumber(value)) return html("td", { class: "none" }, html("span", { "aria-label": "none" }, "–"));
    const top = value === best[i];
    return html("td", { class: top ? "best" : null }, html(top ? "b" : "span", {}, score(value)), bar(value / longest));
  };
  const heading = (name) => html("th", { scope: "col" }, name);
  const body = rows.map((row, i) => {
    const chosen = Object.entries(row.chosen).map(([name, value]) => `${name} ${value}`).join(", ");
    return html("tr", { class: row.name.startsWith("CycleQD") ? "own" : null },
      html("th", { scope: "row" }, row.name, chosen ? html("small", {}, chosen) : null),
      values[i].map(cell),
      costs.map(([, name]) => html("td", { class: "plain" }, row[name] ? row[name].toLocaleString("en") : "")));
  });
  const names = ["model", ...columns.map(([name]) => name), ...costs.map(([name]) => name)];
  const head = html("tr", {}, names.map(heading));
  return html("table", { class: "scores" }, html("thead", {}, head), html("tbody", {}, body));
}

/* What scoring took, by method; columns that nothing is counted for are left out. */
function costTable() {
  const columns = [
    ["models", "individuals"], ["questions", "samples"], ["turns", "turns"], ["tokens read", "prompt_tokens"],
    ["tokens decoded", "answer_tokens"], ["seconds", "seconds"],
  ].filter(([, name]) => record.costs.some((cost) => cost[name]));
  const figure = (value) => (isNumber(value) ? Math.round(value).toLocaleString("en") : "");
  const heading = (name) => html("th", { scope: "col" }, name);
  const body = record.costs.map((cost) => html("tr", {}, html("th", { scope: "row" }, cost.name),
    columns.map(([, name]) => html("td", { class: "plain" }, figure(cost[name])))));
  const head = html("tr", {}, heading("scored"), columns.map(([name]) => heading(name)));
  return html("table", { class: "scores costs" }, html("thead", {}, head), html("tbody", {}, body));
}

function drawCosts() {
  if (!record.costs.length) return null;
  return html("details", {}, html("summary", {}, "What scoring took"),
    html("div", { class: "scroller", tabindex: 0, role: "region", "aria-label": "What scoring took" }, costTable()),
    html("p", { class: "note" }, "Of each method its children on validation; an individual that two methods came to is " +
      "counted with both. A turn's dialogue so far is read whole."));
}

function drawScores() {
  const { rows, swarms } = record;
  if (!rows.length) {
    return fill("scores-content", missing("No scores yet: test questions are asked at the end of the run."), drawCosts());
  }
  const explained = [
    "The best of each column is bold.",
    "min: the lowest of the tasks' scores.",
    swarms.length ? `any ${swarms[0]}: the share of questions that at least one of ${swarms[0]} models solves, which ` +
      "were chosen on validation to complement each other." : "",
    rows.some((row) => row.evaluations) ? "scored: how many candidates a method tried on validation." : "",
    rows.some((row) => row.answers) ? "answers: all that a method asked for, those that it learned from included." : "",
  ];
  fill("scores-content",
    html("p", { class: "lead" }, "The mean over test samples, new to training and search: of verdicts, the share that is right."),
    html("div", { class: "scroller", tabindex: 0, role: "region", "aria-label": "Score table" }, scoreTable()),
    html("p", { class: "note" }, explained.filter(Boolean).join(" ")), drawCosts());
}

/* A picture as large as its column; the pixels of a small one stay squares. */
function drawPicture([caption, png]) {
  const image = html("img", { src: `data:image/png;base64,${png}`, alt: caption || "picture" });
  image.addEventListener("load", () => image.classList.toggle("enlarged", image.naturalWidth < image.clientWidth));
  return html("figure", {}, image, html("figcaption", {}, caption));
}

/* Its class, its symbol, and what is said of it. */
function verdictOf(score) {
  if (score === 1) return ["passed", "✓", "passed"];
  if (score === 0) return ["failed", "✗", "failed"];
  if (!isNumber(score)) return ["failed", "✗", "not scored"];
  return [score > 1 ? "passed" : "", "", `score ${score.toFixed(3)}`];
}

/* A dialogue turn by turn; what was said at its beginning is the prompt, which may be long. */
function drawTurns(turns) {
  return html("ol", { class: "turns" }, turns.map(([role, text]) =>
    html("li", { class: ["assistant", "executed"].includes(role) ? role : null },
      html("h4", {}, role === "assistant" ? "model" : role), html("pre", {}, text || "(nothing)"))));
}

function drawSample([, prompt, gold, answer, score, pictures, turns, reason]) {
  const block = (name, text) => html("div", {}, html("h4", {}, name), html("pre", {}, text || "(nothing)"));
  const [name, symbol, verdict] = verdictOf(score);
  return html("article", { class: `sample ${name}` },
    html("p", { class: "verdict" }, symbol ? [html("span", { "aria-hidden": "true" }, symbol), " "] : null, verdict),
    reason ? html("p", { class: "note reason" }, reason) : null,
    html("p", { class: "prompt" }, prompt),
    pictures.length ? html("div", { class: "pictures" }, pictures.map(drawPicture)) : null,
    turns.length ? drawTurns(turns) : answer || !pictures.length ? block("answer", answer) : null,
    !gold ? null :
      gold === answer ? html("p", { class: "note" }, "Word for word as expected.") : block("expected", gold));
}

const hasPassed = ([, , , , score]) => score >= 1;
const KEPT = { all: () => true, passed: hasPassed, failed: (sample) => !hasPassed(sample) };

/* Some scores are neither right nor wrong: those that have not passed need not have failed. */
const graded = record.samples.some(([, , , , score]) => isNumber(score) && score !== 0 && score !== 1);
const FILTERS = { all: "all", passed: "passed", failed: graded ? "not passed" : "failed" };

function taskSummary(own) {
  const scored = own.map(([, , , , score]) => score).filter(isNumber);
  if (!graded || !scored.length) return `${own.filter(hasPassed).length} of ${own.length} passed`;
  return `mean score ${(sum(scored) / scored.length).toFixed(3)}`;
}

/* The answers of a task that a filter keeps, the first few until all are asked for. */
function drawTaskSamples(task, filter) {
  const own = record.samples.filter(([name]) => name === task), kept = own.filter(KEPT[filter]);
  const cards = html("div", { class: "samples" }, kept.slice(0, ANSWERS_SHOWN).map(drawSample));
  const more = html("button", { type: "button" }, `show all ${kept.length}`);
  more.addEventListener("click", () => {
    cards.replaceChildren(...kept.map(drawSample));
    more.remove();
  });
  return html("div", { class: "task-samples" },
    html("h3", {}, task, html("span", { class: "caption" }, taskSummary(own))),
    kept.length ? cards : missing(`None ${FILTERS[filter]}.`),
    kept.length > ANSWERS_SHOWN ? html("p", { class: "choices" }, more) : null);
}

function drawAnswers() {
  const { samples } = record;
  if (!samples.length) {
    return fill("answers-content", missing("No answers yet: the best model is asked at the end of the run."));
  }
  const lists = html("div"), buttons = html("div", { class: "choices", role: "group", "aria-label": "Which answers" },
    Object.keys(KEPT).map((name) =>
      html("button", { type: "button", "data-filter": name },
        `${FILTERS[name]} (${samples.filter(KEPT[name]).length})`)));
  function show(filter) {
    lists.replaceChildren(...[...new Set(samples.map(([task]) => task))].map((task) => drawTaskSamples(task, filter)));
    for (const button of buttons.children) button.setAttribute("aria-pressed", button.dataset.filter === filter);
  }
  buttons.addEventListener("click", ({ target }) => target.dataset.filter && show(target.dataset.filter));
  fill("answers-content",
    html("p", { class: "lead" },
      `Test questions as the best model answered them${graded ? ", each with its score." :
        ". Each answer was executed, and judged by what it did."}`),
    buttons, lists);
  show("all");
}

function drawSettings() {
  const { settings } = record;
  fill("settings-content", settings.trim() ?
    html("details", {}, html("summary", {}, "All settings of this run (YAML)"), html("pre", {}, settings)) :
    missing("No settings are recorded."));
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
