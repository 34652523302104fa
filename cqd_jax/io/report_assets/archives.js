/* The archives as heat maps, as they were after any batch. */

/* Tasks along the axes of an archive's panels: each pair of the other tasks, or the one other. */
function panelsOf(archive) {
  const others = [...tasks.keys()].filter((task) => task !== archive);
  return others.length < 2 ? [others] : others.flatMap((x, i) => others.slice(i + 1).map((y) => [x, y]));
}

/* All that an archive ever took: one colour scale for the whole replay. */
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
  const along = (task, to, identity) => [to(edges[task][bins[task][identity]]), to(edges[task][bins[task][identity] + 1])];
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

const inset = (box, by) => ({ x: box.x + by, y: box.y + by, width: Math.max(1, box.width - 2 * by),
  height: Math.max(1, box.height - 2 * by) });

function drawAxes(pair, { x, y, bottom }) {
  const middle = (PANEL.top + bottom) / 2;
  const text = (attributes, ...words) => svg("text", attributes, ...words);
  const lines = edges ? [
    edges[pair[0]].map((edge) => `M${x(edge)} ${PANEL.top}V${bottom}`),
    y ? edges[pair[1]].map((edge) => `M${PANEL.left} ${y(edge)}H${PANEL.right}`) :
      [`M${PANEL.left} ${PANEL.top}H${PANEL.right}M${PANEL.left} ${bottom}H${PANEL.right}`],
  ].flat().join("") : `M${PANEL.left} ${PANEL.top}H${PANEL.right}V${bottom}H${PANEL.left}Z`;
  return svg("g", { class: "axes", "aria-hidden": "true" },
    svg("rect", { class: "ground", x: PANEL.left, y: PANEL.top, width: PANEL.right - PANEL.left, height: bottom - PANEL.top }),
    svg("path", { class: "grid", d: lines }),
    ticks(axisRange(pair[0]), 5).map(([at, word]) => text({ x: x(at), y: bottom + 16, "text-anchor": "middle" }, word)),
    text({ class: "axis-name", x: (PANEL.left + PANEL.right) / 2, y: bottom + 34, "text-anchor": "middle" },
      `${shorten(tasks[pair[0]], 40)} score →`),
    y ? [
      ticks(axisRange(pair[1]), 5).map(([at, word]) => text({ x: PANEL.left - 7, y: y(at) + 4, "text-anchor": "end" }, word)),
      text({ class: "axis-name", transform: `translate(12 ${middle}) rotate(-90)`, "text-anchor": "middle" },
        `${shorten(tasks[pair[1]], 34)} score →`),
    ] : null);
}

/* A panel of an archive; `update` draws it as it was after a batch. */
function makePanel(archive, pair) {
  const geometry = panelGeometry(pair), cells = svg("g"), marks = svg("g", { class: "marks" }), drawn = new Map();
  const boxes = new Map();
  for (const expert of all.slice(0, numExperts)) {
    if (!failed(expert)) boxes.set(JSON.stringify(geometry.boxOf(expert)), geometry.boxOf(expert));
  }
  const experts = [...boxes.values()].map((box) => svg("rect", { class: "expert", ...inset(box, 0.5) }));
  const picture = svg("svg", { viewBox: `0 0 ${PANEL.width} ${geometry.bottom + 42}`, role: "group",
    "aria-label": `Archive ${tasks[archive]} along ${list(pair.map((task) => tasks[task]))}` },
  drawAxes(pair, geometry), cells, svg("g", { class: "marks" }, experts), marks);

  /* The best elite in each place of the panel, and how many lie behind it along axes that are not drawn. */
  function placed(batch) {
    const places = new Map();
    for (const identity of elites(archive, batch)) {
      const key = bins ? pair.map((task) => bins[task][identity]).join() : identity;
      const held = places.get(key);
      const better = !held || scores[archive][identity] > scores[archive][held.identity];
      places.set(key, { identity: better ? identity : held.identity, behind: (held?.behind ?? 0) + 1 });
    }
    return places;
  }

  function drawCell(key, { identity, behind }) {
    if (!drawn.has(key)) {
      const shape = svg("rect", { class: "cell", "data-tip": "", role: "button", tabindex: -1, rx: bins ? 1 : 5 });
      drawn.set(key, cells.appendChild(shape));
    }
    const cell = drawn.get(key);
    if (cell.dataset.id === `${identity}` && cell.dataset.behind === `${behind}`) return;
    Object.assign(cell.dataset, { id: identity, behind });
    build(cell, { ...inset(geometry.boxOf(identity), bins ? 0.5 : 0.75), "aria-label": spoken(identity),
      fill: colour(scores[archive][identity], fitnessRange[archive]) }, []);
  }

  function update(batch) {
    const places = placed(batch);
    for (const [key, cell] of drawn) if (!places.has(key)) { cell.remove(); drawn.delete(key); }
    for (const [key, held] of places) drawCell(key, held);
    if (!cells.querySelector('[tabindex="0"]')) cells.firstElementChild?.setAttribute("tabindex", 0);
    mark();
  }

  /* A ring around the elite whose family is shown. */
  function mark() {
    const cell = [...drawn.values()].find((one) => one.dataset.id === `${state.chosen}`);
    const box = cell && inset(geometry.boxOf(state.chosen), bins ? 2.5 : -1);
    marks.replaceChildren(...(cell ? [svg("rect", { class: "ring-out", ...box }), svg("rect", { class: "ring", ...box })] : []));
  }
  return { picture, update, mark };
}

const panels = [];
const captions = [];

function expertNotes() {
  const names = (experts) => list(experts.map((expert) => (numExperts === numTasks ? tasks[expert] : `${expert}`)));
  const experts = all.slice(0, numExperts), lost = experts.filter(failed);
  const notes = lost.length ? [`Scoring failed for ${lost.length === 1 ? "expert" : "experts"} ${names(lost)}: no red box.`] : [];
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

function drawArchives() {
  if (!takenBy.some((taken) => taken.length)) {
    place("timeline").hidden = true;
    return fill("archives-content", missing("The archives are empty so far: nothing was scored and taken yet."));
  }
  place("archives-lead").textContent = "Each archive keeps, for every combination of scores on the other tasks, the model " +
    "that is best at its own. " + (bins ? "" : "Its cells are Voronoi cells: here every model that it ever took is a point. ") +
    (bins && numTasks > 3 ? "A square shows the best over the axes that are not drawn. " : "") +
    "Hover or tap for details; click to see a model's family.";
  const figures = tasks.map((task, archive) => {
    const own = panelsOf(archive).map((pair) => makePanel(archive, pair));
    const caption = html("span", { class: "caption" });
    panels.push(...own);
    captions.push(caption);
    return html("figure", { class: own.length > 1 ? "archive wide" : "archive", "data-archive": archive },
      html("figcaption", {}, html("h3", {}, task), caption, colourBar(fitnessRange[archive], "fitness")),
      html("div", { class: "panels" }, own.map((panel) => panel.picture)));
  });
  const content = html("div", { class: numTasks > 3 ? "archives stacked" : "archives" }, figures);
  fill("archives-content", content,
    html("p", { class: "note legend" }, html("span", { class: "key expert-key" }), "cell of an expert ",
      html("span", { class: "key chosen-key" }), "the model whose family is shown below"),
    expertNotes().map((text) => html("p", { class: "note" }, text)));
  explains(content, (cell) => describe(Number(cell.dataset.id), cell.dataset.behind > 1 && bins ?
    `the best of ${cell.dataset.behind} elites here` : null));
  walks(content, ".cell");
  content.addEventListener("click", (event) => {
    const cell = event.target.closest(".cell");
    if (cell) choose(Number(cell.dataset.id));
  });
}

function updateArchives() {
  for (const panel of panels) panel.update(state.batch);
  for (const [archive, caption] of captions.entries()) {
    const held = elites(archive, state.batch).length;
    const cells = edges && edges.reduce((product, own, task) => (task === archive ? product : product * (own.length - 1)), 1);
    caption.textContent = cells ? `${count(held, "elite")}, ${percent(held / cells)} of cells` : `${held} taken`;
  }
}
