/* The archives as heat maps, as they were after any batch. */

/* Tasks along the axes of an archive's panels: each pair of the other tasks, or the one other. */
function panelsOf(archive) {
  const others = [...tasks.keys()].filter((task) => task !== archive);
  return others.length < 2 ? [others] : others.flatMap((x, i) => others.slice(i + 1).map((y) => [x, y]));
}

/* All that an archive ever took: one color scale for the whole replay. */
const fitnessRange = tasks.map((_, archive) => extent(takenBy[archive].map((identity) => scores[archive][identity])));

function axisRange(task) {
  if (edges) return [edges[task][0], edges[task].at(-1)];
  const [low, high] = extent(scores[task]);
  return [low - 0.04 * (high - low), high + 0.04 * (high - low)];
}

const PANEL = { width: 360, left: 46, right: 350, top: 8 };

/* Of a panel: what turns an individual into the box where it lies, and the range of the picture along y. */
function panelGeometry(pair) {
  const bottom = pair.length === 2 ? PANEL.top + 286 : PANEL.top + 56;
  const x = scale(axisRange(pair[0]), [PANEL.left, PANEL.right]);
  const y = pair.length === 2 ? scale(axisRange(pair[1]), [bottom, PANEL.top]) : null;
  const along = (task, to, identity) => [0, 1].map((end) => to(edges[task][bins[task][identity] + end]));
  const boxOf = (identity) => {
    if (!bins) {
      const middle = y ? y(scores[pair[1]][identity]) : (PANEL.top + bottom) / 2;
      return { x: x(scores[pair[0]][identity]) - 5, y: middle - 5, width: 10, height: 10 };
    }
    const [left, right] = along(pair[0], x, identity);
    const [low, high] = y ? along(pair[1], y, identity) : [bottom, PANEL.top];
    return { x: left, y: high, width: right - left, height: low - high };
  };
  return { x, y, bottom, boxOf };
}

const inset = (box, by) => ({
  x: box.x + by,
  y: box.y + by,
  width: Math.max(1, box.width - 2 * by),
  height: Math.max(1, box.height - 2 * by),
});

/* The edges of all cells, or a frame where there are none. */
function gridLines(pair, { x, y, bottom }) {
  const { left, right, top } = PANEL;
  if (!edges) return `M${left} ${top}H${right}V${bottom}H${left}Z`;
  const across = y ? edges[pair[1]].map(y) : [top, bottom];
  const upright = edges[pair[0]].map((edge) => `M${x(edge)} ${top}V${bottom}`);
  return [...upright, ...across.map((at) => `M${left} ${at}H${right}`)].join("");
}

function drawAxes(pair, geometry) {
  const { x, y, bottom } = geometry, { left, right, top } = PANEL;
  const middle = { x: (left + right) / 2, y: (top + bottom) / 2 };
  const text = (attributes, word) => svg("text", { "text-anchor": "middle", ...attributes }, word);
  const beside = ([at, word]) => text({ x: left - 7, y: y(at) + 4, "text-anchor": "end" }, word);
  return svg("g", { class: "axes", "aria-hidden": "true" },
    svg("rect", { class: "ground", x: left, y: top, width: right - left, height: bottom - top }),
    svg("path", { class: "grid", d: gridLines(pair, geometry) }),
    ticks(axisRange(pair[0]), 5).map(([at, word]) => text({ x: x(at), y: bottom + 16 }, word)),
    text({ class: "axis-name", x: middle.x, y: bottom + 34 }, `${shorten(tasks[pair[0]], 40)} score →`),
    y ? ticks(axisRange(pair[1]), 5).map(beside) : null,
    y ? text({ class: "axis-name", transform: `translate(12 ${middle.y}) rotate(-90)` },
      `${shorten(tasks[pair[1]], 34)} score →`) : null);
}

/* Red boxes where the experts were filed, one where several were. */
function drawExperts({ boxOf }) {
  const filed = all.slice(0, numExperts).filter((expert) => !failed(expert)).map(boxOf);
  const boxes = new Map(filed.map((box) => [JSON.stringify(box), inset(box, 0.5)]));
  return svg("g", { class: "marks" }, [...boxes.values()].map((box) => svg("rect", { class: "expert", ...box })));
}

/* By place in a panel the best elite, and how many of them lie there along axes that are not drawn. */
function placed(archive, pair, batch) {
  const places = new Map();
  for (const identity of elites(archive, batch)) {
    const key = bins ? pair.map((task) => bins[task][identity]).join() : identity;
    const held = places.get(key);
    const better = !held || scores[archive][identity] > scores[archive][held.identity];
    places.set(key, { identity: better ? identity : held.identity, among: (held?.among ?? 0) + 1 });
  }
  return places;
}

/* A panel of an archive; `update` draws it as it was after a batch. */
function makePanel(archive, pair) {
  const geometry = panelGeometry(pair), cells = svg("g"), ring = svg("g", { class: "marks" }), drawn = new Map();
  const label = `Archive ${tasks[archive]} along ${list(pair.map((task) => tasks[task]))}`;
  const picture = svg("svg",
    { viewBox: `0 0 ${PANEL.width} ${geometry.bottom + 42}`, role: "group", "aria-label": label },
    drawAxes(pair, geometry), cells, drawExperts(geometry), ring);

  function drawCell(key, { identity, among }) {
    if (!drawn.has(key)) {
      const shape = svg("rect", { class: "cell", "data-tip": "", role: "button", tabindex: -1, rx: bins ? 1 : 5 });
      drawn.set(key, cells.appendChild(shape));
    }
    const cell = drawn.get(key);
    if (cell.dataset.id === `${identity}` && cell.dataset.among === `${among}`) return;
    Object.assign(cell.dataset, { id: identity, among });
    const fill = color(scores[archive][identity], fitnessRange[archive]);
    build(cell, { ...inset(geometry.boxOf(identity), 0.5), "aria-label": spoken(identity), fill }, []);
  }

  function update(batch) {
    const places = placed(archive, pair, batch);
    for (const [key, cell] of drawn) {
      if (!places.has(key)) {
        cell.remove();
        drawn.delete(key);
      }
    }
    for (const [key, held] of places) drawCell(key, held);
    if (!cells.querySelector('[tabindex="0"]')) cells.firstElementChild?.setAttribute("tabindex", 0);
    mark();
  }

  /* A ring around the elite whose family is shown, within the red box of an expert. */
  function mark() {
    const shown = [...drawn.values()].some((cell) => cell.dataset.id === `${state.chosen}`);
    const box = shown && inset(geometry.boxOf(state.chosen), bins ? 4 : -3);
    ring.replaceChildren(...(shown ? ["ring-out", "ring"].map((name) => svg("rect", { class: name, ...box })) : []));
  }
  return { picture, update, mark };
}

const panels = [];
const captions = [];

function expertNotes() {
  const names = (experts) => list(experts.map((expert) => (numExperts === numTasks ? tasks[expert] : `${expert}`)));
  const experts = all.slice(0, numExperts), lost = experts.filter(failed);
  const notes = [];
  if (lost.length) notes.push(`Scoring failed for the expert${lost.length > 1 ? "s" : ""} ${names(lost)}: no red box.`);
  for (const [archive, task] of tasks.entries()) {
    const groups = new Map();
    for (const one of experts.filter((expert) => !failed(expert))) {
      const cell = cellOf(one, archive);
      groups.set(cell, [...(groups.get(cell) ?? []), one]);
    }
    for (const group of groups.values())
      if (group.length > 1) notes.push(`In archive ${task} the experts ${names(group)} share one cell.`);
  }
  return notes;
}

function makeArchive(task, archive) {
  const own = panelsOf(archive).map((pair) => makePanel(archive, pair)), caption = html("span", { class: "caption" });
  panels.push(...own);
  captions.push(caption);
  return html("figure", { class: own.length > 1 ? "archive wide" : "archive", "data-archive": archive },
    html("figcaption", {}, html("h3", {}, task), caption, colorBar(fitnessRange[archive], "fitness")),
    html("div", { class: "panels" }, own.map((panel) => panel.picture)));
}

function drawArchives() {
  if (!takenBy.some((taken) => taken.length)) {
    place("timeline").hidden = true;
    return fill("archives-content", missing("The archives are empty so far: nothing was scored and taken yet."));
  }
  place("archives-lead").textContent = [
    "Each archive keeps the models that are best at its own task, one for each combination of scores on the others.",
    bins ? "" : "Its cells are Voronoi cells: here every model that it ever took is a point.",
    bins && numTasks > 3 ? "A square shows the best over the axes that are not drawn." : "",
    "Hover or tap to learn more about a model; a click shows its family below.",
  ].filter(Boolean).join(" ");
  const content = html("div", { class: numTasks > 3 ? "archives stacked" : "archives" }, tasks.map(makeArchive));
  const key = (name, text) => html("span", {}, html("i", { class: `key ${name}` }), text);
  fill("archives-content", content,
    html("p", { class: "note legend" }, key("expert-key", bins ? "cell of an expert" : "expert"),
      key("chosen-key", "the model whose family is shown below")),
    expertNotes().map((text) => html("p", { class: "note" }, text)));
  explains(content, ({ dataset }) =>
    describe(Number(dataset.id), dataset.among > 1 ? `the best of ${dataset.among} elites here` : null));
  walks(content, ".cell");
  content.addEventListener("click", (event) => {
    const cell = event.target.closest(".cell");
    if (cell) choose(Number(cell.dataset.id));
  });
}

function captionText(archive) {
  const held = elites(archive, state.batch).length;
  if (!edges) return `${held} taken`;
  const cells = edges.reduce((product, own, k) => (k === archive ? product : product * (own.length - 1)), 1);
  return `${count(held, "elite")}, ${percent(held / cells)} of cells`;
}

function updateArchives() {
  for (const panel of panels) panel.update(state.batch);
  for (const [archive, caption] of captions.entries()) caption.textContent = captionText(archive);
}
