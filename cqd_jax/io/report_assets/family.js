/* The family tree of a chosen individual. */

/* Up to so many members of a family bear their numbers; of more than the second, only the youngest are drawn. */
const MOST_NUMBERED = 150;
const MOST_DRAWN = 800;

const meanRange = extent([...new Set(takenBy.flat())].map(mean));

/* Where the members of a family stand: a column a batch in which one was born, the experts at the left.
   Along y a child begins between its parents, nearer to the one of larger weight; then all are moved apart. */
function layoutFamily(members, radius, room) {
  const columns = [...new Set(members.map((one) => born[one]))], pitch = Math.max(2 * radius + 6, Math.min(90,
    room / Math.max(1, columns.length - 1)));
  const column = new Map(columns.map((batch, i) => [batch, i])), gap = 2 * radius + 5;
  const founders = members.filter((one) => !parentsOf(one).some((parent) => members.includes(parent)));
  const height = Math.max(80 * founders.length, (2 * members.length * gap * gap) / (columns.length * pitch));
  const at = new Map();
  for (const one of members) {
    const known = parentsOf(one).map((parent, i) => [at.get(parent), Math.max(0.05, mergeWeights(one)?.[i] ?? 0.5)])
      .filter(([parent]) => parent);
    const y = known.length ? sum(known.map(([parent, weight]) => parent.y * weight)) / sum(known.map(([, weight]) => weight)) :
      (height * (founders.indexOf(one) + 0.5)) / founders.length;
    at.set(one, { x: column.get(born[one]) * pitch, y });
  }
  const near = members.map((one, i) => members.slice(0, i).filter((other) => at.get(one).x - at.get(other).x < gap));
  for (let sweep = 0; sweep < 60; sweep++)
    for (const [i, one] of members.entries()) for (const other of near[i]) moveApart(at.get(one), at.get(other), gap, i);
  return { at, columns, pitch };
}

function moveApart(one, other, gap, index) {
  const dx = one.x - other.x, dy = one.y - other.y, wanted = Math.sqrt(Math.max(0, gap * gap - dx * dx));
  if (Math.abs(dy) >= wanted) return;
  const way = Math.abs(dy) > 1e-6 ? Math.sign(dy) : index % 2 ? 1 : -1;
  const push = ((wanted - Math.abs(dy)) / 2 + 0.1) * way;
  one.y += push;
  other.y -= push;
}

/* Those of a large family that bear numbers: experts, itself, and who has most children in it. */
function numbered(members) {
  if (members.length <= MOST_NUMBERED) return new Set(members);
  const children = new Map();
  for (const one of members) for (const parent of parentsOf(one)) children.set(parent, (children.get(parent) ?? 0) + 1);
  const most = [...members].sort((a, b) => (children.get(b) ?? 0) - (children.get(a) ?? 0)).slice(0, 25);
  return new Set([...most, ...members.filter(isExpert), members.at(-1)]);
}

function drawFamilyEdges(members, at) {
  const hits = [];
  const lines = members.flatMap((one) => parentsOf(one).filter((parent) => at.has(parent)).map((parent) => {
    const from = at.get(parent), to = at.get(one), middle = (from.x + to.x) / 2;
    const weight = Math.abs(mergeWeights(one)?.[parentsOf(one).indexOf(parent)] ?? 0.5);
    const d = `M${from.x} ${from.y}C${middle} ${from.y} ${middle} ${to.y} ${to.x} ${to.y}`;
    hits.push(svg("path", { class: "hit", d, "data-tip": "", "data-child": one, "data-parent": parent }));
    return svg("path", { class: "edge", d, "data-child": one, "stroke-width": (0.6 + 1.6 * Math.min(1.2, weight)).toFixed(2) });
  }));
  return svg("g", {}, lines, hits);
}

function drawMember(one, { x, y }, radius, withNumber) {
  const [r, g, b] = colour(mean(one), meanRange).match(/\d+/g).map(Number);
  const dark = 0.299 * r + 0.587 * g + 0.114 * b < 140;
  const shape = { class: "disc", fill: `rgb(${r},${g},${b})` };
  const size = withNumber ? Math.max(radius, 8) : radius;
  return svg("g", { class: `node${one === state.chosen ? " own" : ""}${isExpert(one) ? " founder" : ""}`, "data-id": one,
    "data-tip": "", role: "button", tabindex: one === state.chosen ? 0 : -1, "aria-label": spoken(one),
    transform: `translate(${x.toFixed(1)} ${y.toFixed(1)})` },
  isExpert(one) ? svg("rect", { ...shape, x: -size, y: -size, width: 2 * size, height: 2 * size, rx: 3 }) :
    svg("circle", { ...shape, r: size }),
  withNumber ? svg("text", { class: `${dark ? "on-dark" : "on-light"}${one > 999 ? " long" : ""}`, "text-anchor": "middle",
    y: 3.5 }, `${one}`) : null,
  isExpert(one) ? svg("text", { class: "founder-name", x: -size - 8, y: 4, "text-anchor": "end" },
    shorten(expertName(one), 16)) : null);
}

/* The batch below each column, as many as do not touch. */
function drawBatches({ columns, pitch }, bottom) {
  let last = -Infinity;
  return svg("g", { class: "axes", "aria-hidden": "true" }, columns.map((batch, i) => {
    if (i * pitch - last < 34) return null;
    last = i * pitch;
    return svg("text", { x: i * pitch, y: bottom + 22, "text-anchor": "middle" }, i ? `${batch}` : `batch ${batch}`);
  }));
}

function drawFamily() {
  if (state.chosen === null) return fill("family-content", missing("No family tree yet: no model has been scored so far."));
  const family = ancestors(state.chosen);
  const members = family.length <= MOST_DRAWN ? family :
    [...new Set([...family.filter(isExpert), ...family.slice(-MOST_DRAWN)])];
  const withNumbers = numbered(members), radius = withNumbers.size === members.length ? 12 : 5;
  const names = members.filter(isExpert).map((one) => shorten(expertName(one), 16).length);
  const left = 34 + 7 * Math.max(0, ...names), room = place("family").clientWidth - left - 24;
  const layout = layoutFamily(members, radius, room);
  const ys = [...layout.at.values()].map(({ y }) => y), low = Math.min(...ys) - 22, high = Math.max(...ys) + 22;
  const width = left + layout.pitch * (layout.columns.length - 1) + 24;
  const picture = svg("svg", { width, height: high - low + 30, viewBox: `${-left} ${low} ${width} ${high - low + 30}`, role: "group",
    "aria-label": `Family tree of individual ${state.chosen}` },
  drawBatches(layout, high), drawFamilyEdges(members, layout.at),
  svg("g", {}, members.map((one) => drawMember(one, layout.at.get(one), radius, withNumbers.has(one)))));
  place("family-summary").textContent = familySummary(family, members, withNumbers);
  place("tree").replaceChildren(picture);
  place("tree").scrollLeft = width;
  for (const button of place("family-content").querySelectorAll("button"))
    button.setAttribute("aria-pressed", button.dataset.id === `${state.chosen}`);
  place("any-individual").value = state.chosen;
}

function familySummary(family, members, withNumbers) {
  const batches = new Set(family.map((one) => born[one])).size, founders = family.filter(isExpert);
  if (family.length === 1) return `${title(state.chosen)} (mean score ${score(mean(state.chosen))}) has no ancestors.`;
  return `${title(state.chosen)} (mean score ${score(mean(state.chosen))}) descends from ` +
    `${count(family.length - 1, "ancestor")} of ${count(batches - 1, "batch", "batches")}` +
    `${founders.length ? `, back to ${founders.length === 1 ? "expert" : "the experts"} ${list(founders.map(expertName))}` : ""}.` +
    (members.length < family.length ? ` Of these the youngest ${members.length} and the experts are drawn.` : "") +
    (withNumbers.size < members.length ? ` ${withNumbers.size} of ${members.length} bear their numbers: those with most children.` : "");
}

function choose(identity) {
  state.chosen = identity;
  if (!place("tree")) prepareFamily();
  for (const panel of panels) panel.mark();
  drawFamily();
}

function prepareFamily() {
  if (!numIndividuals) return;
  const button = (identity, name) => html("button", { type: "button", "data-id": identity }, name);
  const any = html("input", { id: "any-individual", type: "number", min: 0, max: numIndividuals - 1, inputmode: "numeric" });
  const tree = html("div", { class: "scroller", id: "tree", tabindex: 0, role: "region", "aria-label": "Family tree" });
  const buttons = html("div", { class: "choices" },
    record.best === null ? null : button(record.best, "best mean score"),
    record.aggregated.map((identity, archive) => button(identity, `best at ${tasks[archive]}`)),
    html("label", {}, "number ", any));
  fill("family-content", html("p", { class: "lead" }, "All ancestors of a model, by the batch in which they were born. A line is " +
    "as wide as the parent's merge weight; click an ancestor, or a cell above, to see its family."), buttons,
  html("p", { id: "family-summary", "aria-live": "polite" }), tree, html("p", { class: "note" }, colourBar(meanRange, "mean score")));
  buttons.addEventListener("click", (event) => event.target.dataset.id && choose(Number(event.target.dataset.id)));
  any.addEventListener("change", () => any.value !== "" && born[any.value] !== undefined && choose(Number(any.value)));
  explains(tree, (element) => (element.dataset.id ? describe(Number(element.dataset.id)) :
    describeEdge(Number(element.dataset.parent), Number(element.dataset.child))));
  walks(tree, ".node");
  tree.addEventListener("click", (event) => {
    const node = event.target.closest(".node");
    if (node) choose(Number(node.dataset.id));
  });
  tree.addEventListener("pointerover", (event) => lightUp(event.target.closest(".node, .hit")));
  tree.addEventListener("pointerleave", () => lightUp(null));
}

function describeEdge(parent, child) {
  const weights = record.weights[child];
  const texts = parentsOf(child).map((one, i) => (one === parent && weights ? weightText(weights[i]) : null)).filter(Boolean);
  return [html("p", { class: "who" }, html("b", {}, `${title(parent)} → ${child}`)),
    html("p", {}, texts.length ? `merge weight ${texts.join(" and ")}` : "merge weight not recorded")];
}

/* The lines from an individual's parents stand out while it is pointed at. */
function lightUp(element) {
  const child = element?.dataset.id ?? element?.dataset.child;
  for (const edge of place("tree").querySelectorAll(".edge")) edge.classList.toggle("lit", edge.dataset.child === child);
}
