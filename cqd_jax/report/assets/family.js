/* The family tree of a chosen individual. */

/* Up to so many members of a family bear their numbers; of more than the second, only the youngest are drawn. */
const MOST_NUMBERED = 150;
const MOST_DRAWN = 800;
const RADIUS = { numbered: 12, plain: 5 };
const meanRange = extent([...new Set(takenBy.flat())].map(mean));

/* Where the members stand: one column per batch in which one was born, the experts at the left. Along y a child begins
   between its parents, nearer to the one of larger weight; then all are moved apart. */
function layoutFamily(members, radii, room) {
  const columns = [...new Set(members.map((one) => born[one]))];
  const narrowest = 2 * Math.min(...radii.values()) + 6;
  const pitch = Math.max(narrowest, Math.min(90, room / Math.max(1, columns.length - 1)));
  const area = sum([...radii.values()].map((radius) => (2 * radius + 5) ** 2));
  const founders = members.filter((one) => !parentsOf(one).some((parent) => radii.has(parent)));
  const height = Math.max(80 * founders.length, (3 * area) / (columns.length * pitch));
  const at = new Map();
  for (const one of members) {
    const y = between(one, at) ?? (height * (founders.indexOf(one) + 0.5)) / founders.length;
    at.set(one, { x: columns.indexOf(born[one]) * pitch, y });
  }
  moveAllApart(members, radii, at);
  return { at, columns, pitch };
}

/* The mean height of the parents that stand already, by merge weight; null without. */
function between(child, at) {
  const weights = mergeWeights(child);
  const known = parentsOf(child)
    .map((parent, i) => [at.get(parent), Math.max(0.05, weights?.[i] ?? 0.5)])
    .filter(([parent]) => parent);
  if (!known.length) return null;
  return sum(known.map(([parent, weight]) => parent.y * weight)) / sum(known.map(([, weight]) => weight));
}

/* Moves members up and down until none touches another. */
function moveAllApart(members, radii, at) {
  const gap = (one, other) => radii.get(one) + radii.get(other) + 5;
  const near = members.map((one, i) =>
    members.slice(0, i).filter((other) => Math.abs(at.get(one).x - at.get(other).x) < gap(one, other)));
  for (let sweep = 0, moved = true; moved && sweep < 100; sweep++) {
    moved = false;
    for (const [i, one] of members.entries())
      for (const other of near[i]) moved = moveApart(at.get(one), at.get(other), gap(one, other), i) || moved;
  }
}

function moveApart(one, other, gap, index) {
  const dx = one.x - other.x, dy = one.y - other.y, wanted = Math.sqrt(Math.max(0, gap * gap - dx * dx));
  if (Math.abs(dy) >= wanted) return false;
  const way = Math.abs(dy) > 1e-6 ? Math.sign(dy) : index % 2 ? 1 : -1;
  const push = ((wanted - Math.abs(dy)) / 2 + 0.1) * way;
  one.y += push;
  other.y -= push;
  return true;
}

/* Those of a large family that bear numbers: experts, itself, and who has most children in it. */
function numbered(members) {
  if (members.length <= MOST_NUMBERED) return new Set(members);
  const children = new Map();
  for (const one of members)
    for (const parent of parentsOf(one)) children.set(parent, (children.get(parent) ?? 0) + 1);
  const most = [...members].sort((a, b) => (children.get(b) ?? 0) - (children.get(a) ?? 0)).slice(0, 25);
  return new Set([...most, ...members.filter(isFounder), members.at(-1)]);
}

/* A line from each parent, as wide as its merge weight, and over it a wide invisible one that is easy to point at. */
function drawLines(members, at) {
  const hits = [];
  const lines = members.flatMap((one) => parentsOf(one).map((parent, i) => {
    if (!at.has(parent)) return null;
    const from = at.get(parent), to = at.get(one), middle = (from.x + to.x) / 2;
    const d = `M${from.x} ${from.y}C${middle} ${from.y} ${middle} ${to.y} ${to.x} ${to.y}`;
    const width = 0.6 + 1.6 * Math.min(1.2, Math.abs(mergeWeights(one)?.[i] ?? 0.5));
    hits.push(svg("path", { class: "hit", d, "data-tip": "", "data-child": one, "data-parent": parent }));
    return svg("path", { class: "edge", d, "data-child": one, "stroke-width": width.toFixed(2) });
  }));
  return svg("g", { class: members.length > MOST_NUMBERED ? "many" : null }, lines, hits);
}

function drawMember(one, { x, y }, radius) {
  const [r, g, b] = color(mean(one), meanRange).match(/\d+/g).map(Number);
  const disc = { class: "disc", fill: `rgb(${r},${g},${b})` };
  const onWhat = 0.299 * r + 0.587 * g + 0.114 * b < 140 ? "on-dark" : "on-light";
  const attributes = {
    class: `node${one === state.chosen ? " own" : ""}${isFounder(one) ? " founder" : ""}`,
    "data-id": one, "data-tip": "", role: "button", tabindex: one === state.chosen ? 0 : -1, "aria-label": spoken(one),
    transform: `translate(${x.toFixed(1)} ${y.toFixed(1)})`,
  };
  return svg("g", attributes,
    isFounder(one) ?
      svg("rect", { ...disc, x: -radius, y: -radius, width: 2 * radius, height: 2 * radius, rx: 3 }) :
      svg("circle", { ...disc, r: radius }),
    radius < RADIUS.numbered ? null :
      svg("text", { class: `${onWhat}${one > 999 ? " long" : ""}`, "text-anchor": "middle", y: 3.5 }, `${one}`),
    isFounder(one) ?
      svg("text", { class: "founder-name", x: -radius - 8, y: 4, "text-anchor": "end" }, shorten(founderName(one), 16)) :
      null);
}

/* The batch below each column, as many as do not touch. */
function drawBatches({ columns, pitch }, y) {
  let last = -Infinity;
  return svg("g", { class: "axes", "aria-hidden": "true" }, columns.map((batch, i) => {
    if (i * pitch - last < 34) return null;
    last = i * pitch;
    return svg("text", { x: last, y, "text-anchor": "middle" }, i ? `${batch}` : `batch ${batch}`);
  }));
}

function drawTree(members, withNumbers) {
  const radii = new Map(members.map((one) => [one, withNumbers.has(one) ? RADIUS.numbered : RADIUS.plain]));
  const names = members.filter(isFounder).map((one) => shorten(founderName(one), 16).length);
  const left = 34 + 7 * Math.max(0, ...names), right = 24;
  const layout = layoutFamily(members, radii, place("family").clientWidth - left - right);
  const [low, high] = extent([...layout.at.values()].map(({ y }) => y)), top = low - 22;
  const width = left + layout.pitch * (layout.columns.length - 1) + right, height = high - low + 74;
  return svg("svg",
    { width, height, viewBox: `${-left} ${top} ${width} ${height}`, role: "group", "aria-label": "Family tree" },
    drawBatches(layout, high + 44),
    drawLines(members, layout.at),
    svg("g", {}, members.map((one) => drawMember(one, layout.at.get(one), radii.get(one)))));
}

function familySummary(family, members, withNumbers) {
  const self = `${title(state.chosen)} (mean score ${score(mean(state.chosen))})`;
  if (family.length === 1) return `${self} has no ancestors.`;
  const batches = new Set(family.map((one) => born[one])).size - 1, founders = family.filter(isFounder);
  const names = `${founders.length === 1 ? "the expert" : "the experts"} ${list(founders.map(founderName))}`;
  const parts = [
    `${self} has ${count(family.length - 1, "ancestor")} from ${count(batches, "batch", "batches")}, back to ${names}.`,
    members.length < family.length ? `The experts and the youngest ${MOST_DRAWN} are drawn.` : "",
    withNumbers.size < members.length ? `${withNumbers.size} bear numbers: those with most children.` : "",
  ];
  return parts.filter(Boolean).join(" ");
}

function drawFamily() {
  if (state.chosen === null) return fill("family-content", missing("No family tree yet: no archive holds a model."));
  const family = ancestors(state.chosen);
  const members = family.filter((one, i) => isFounder(one) || family.length - i <= MOST_DRAWN);
  const withNumbers = numbered(members);
  place("family-summary").textContent = familySummary(family, members, withNumbers);
  const tree = place("tree"), focused = tree.contains(document.activeElement) && document.activeElement !== tree;
  tree.replaceChildren(drawTree(members, withNumbers));
  tree.scrollLeft = tree.scrollWidth;
  if (focused) tree.querySelector(".own").focus();
  placeTooltip();
  for (const button of place("family-content").querySelectorAll("button"))
    button.setAttribute("aria-pressed", button.dataset.id === `${state.chosen}`);
  place("any-individual").value = state.chosen;
}

function choose(identity) {
  state.chosen = identity;
  for (const panel of panels) panel.mark();
  drawFamily();
}

/* Buttons for who is best at what, and a field for any number. */
function makeChoices() {
  const button = (identity, name) => html("button", { type: "button", "data-id": identity }, name);
  const any = { id: "any-individual", type: "number", min: 0, max: numIndividuals - 1, inputmode: "numeric" };
  const choices = html("div", { class: "choices" },
    record.best === null ? null : button(record.best, "best mean score"),
    record.aggregated.map((identity, archive) => button(identity, `best at ${tasks[archive]}`)),
    html("label", {}, "number ", html("input", any)));
  choices.addEventListener("click", ({ target }) => target.dataset.id && choose(Number(target.dataset.id)));
  choices.addEventListener("change", ({ target }) => {
    if (target.value !== "" && born[target.value] !== undefined) choose(Number(target.value));
  });
  return choices;
}

function prepareFamily() {
  if (state.chosen === null) return;
  const tree = html("div",
    { class: "scroller", id: "tree", tabindex: 0, role: "region", "aria-label": "Family tree, scrolls sideways" });
  fill("family-content",
    html("p", { class: "lead" },
      "All ancestors of a model, by the batch in which they were born. A line is as wide as its merge weight." +
      " Choose another model here, in the archives, or among its ancestors."),
    makeChoices(), html("p", { id: "family-summary", "aria-live": "polite" }), tree,
    html("p", { class: "note" }, colorBar(meanRange, "mean score")));
  explains(tree, ({ dataset }) =>
    dataset.id ? describe(Number(dataset.id)) : describeLine(Number(dataset.parent), Number(dataset.child)));
  walks(tree, ".node");
  tree.addEventListener("click", (event) => {
    const node = event.target.closest(".node");
    if (node) choose(Number(node.dataset.id));
  });
  tree.addEventListener("pointerover", (event) => lightUp(event.target.closest(".node, .hit")));
  tree.addEventListener("pointerleave", () => lightUp(null));
}

function describeLine(parent, child) {
  const weights = record.weights[child];
  const texts = parentsOf(child).map((one, i) => (one === parent && weights ? weightText(weights[i]) : null));
  return [
    html("p", { class: "who" }, html("b", {}, `${title(parent)} → ${child}`)),
    html("p", {}, weights ? `merge weight ${list(texts.filter(Boolean))}` : "merge weight not recorded"),
  ];
}

/* The lines from an individual's parents stand out while it is pointed at. */
function lightUp(element) {
  const child = element?.dataset.id ?? element?.dataset.child;
  for (const line of place("tree").querySelectorAll(".edge"))
    line.classList.toggle("lit", line.dataset.child === child);
}
