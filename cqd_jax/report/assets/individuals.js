/* The record of the run, and what can be asked about the individuals in it. */

const record = JSON.parse(document.getElementById("record").textContent);
const { tasks, born, parents, scores, bins, edges, metrics } = record;
const numTasks = tasks.length;
const numIndividuals = born.length;
const numExperts = record.experts;
const numFounders = born.filter((batch) => batch === 0).length;
const lastBatch = Math.max(0, ...(metrics.coverage ?? []).map((curve) => curve.length), born[numIndividuals - 1] ?? 0);

/* What the reader looks at: the archives after this batch, and the family of this individual. */
const state = { batch: lastBatch, chosen: record.best };

const all = [...born.keys()];
const scoresOf = (identity) => scores.map((column) => column[identity]);
const failed = (identity) => !scoresOf(identity).every(isNumber);
const mean = (identity) => (failed(identity) ? null : sum(scoresOf(identity)) / numTasks);
const isFounder = (identity) => born[identity] === 0;
const isExpert = (identity) => identity < numExperts;
const parentsOf = (identity) => parents.map((column) => column[identity]).filter((parent) => parent >= 0);
const mutationText = (identity) => record.mutations[record.mutation[identity]];

/* Of the initial population: experts by their task, or by number unless there is one per task; others by what they are. */
function founderName(one) {
  if (!isExpert(one)) return mutationText(one);
  return numExperts === numTasks ? tasks[one] : `expert ${one}`;
}

function title(identity) {
  if (!isFounder(identity)) return `Individual ${identity}`;
  if (!isExpert(identity)) return mutationText(identity);
  return `Expert ${numExperts === numTasks ? tasks[identity] : identity}`;
}

function ancestors(identity) {
  const found = new Set([identity]), waiting = [identity];
  while (waiting.length)
    for (const parent of parentsOf(waiting.pop()))
      if (!found.has(parent)) { found.add(parent); waiting.push(parent); }
  return [...found].sort((a, b) => a - b);
}

const takenBy = tasks.map((_, archive) => all.filter((identity) => record.taken[archive][identity]));
const cellOf = (identity, archive) =>
  bins ? bins.filter((_, task) => task !== archive).map((column) => column[identity]).join() : identity;

/* Who holds the cells of an archive after a batch. Voronoi cells cannot be told apart: all that were taken. */
function elites(archive, batch) {
  const held = new Map();
  for (const identity of takenBy[archive]) {
    if (born[identity] > batch) break;
    held.set(cellOf(identity, archive), identity);
  }
  return [...held.values()];
}

/* The two merge weights as numbers, their means where there is one for each of many groups; null without. */
function mergeWeights(identity) {
  const weights = record.weights[identity];
  return weights && weights.map((one) => (isNumber(one) ? one : one[0]));
}

function weightText(weight) {
  if (isNumber(weight)) return weight.toFixed(2);
  const [average, least, most, groups] = weight;
  return `${average.toFixed(2)} on average, ${least.toFixed(2)} to ${most.toFixed(2)} over ${groups} groups`;
}

function ancestryText(identity) {
  const weights = record.weights[identity];
  const name = (parent) => (isFounder(parent) ? title(parent).replace("Expert", "expert") : `${parent}`);
  return list(parentsOf(identity).map((parent, i) => name(parent) + (weights ? ` (${weightText(weights[i])})` : "")));
}

/* A line as long as a share. */
function bar(share) {
  const inner = html("i");
  inner.style.width = `${100 * Math.min(1, Math.max(0, share ?? 0))}%`;
  return html("span", { class: "bar", "aria-hidden": "true" }, inner);
}

/* All that is known of an individual, for the tooltip. */
function describe(identity, note = null) {
  const line = (name, text) => (text ? [html("dt", {}, name), html("dd", {}, text)] : null);
  const row = (name, value, className = null) => html("tr", { class: className },
    html("th", { scope: "row" }, name), html("td", {}, className ? null : bar(value)), html("td", {}, score(value)));
  const holds = tasks.filter((_, archive) => elites(archive, state.batch).includes(identity));
  return [
    html("p", { class: "who" }, html("b", {}, title(identity)), html("span", {}, `born in batch ${born[identity]}`)),
    html("table", {}, tasks.map((task, k) => row(task, scores[k][identity])), row("mean", mean(identity), "mean")),
    html("dl", {},
      line("parents", ancestryText(identity)),
      line("from", record.archive[identity] >= 0 ? `archive ${tasks[record.archive[identity]]}` : ""),
      line("mutation", mutationText(identity)),
      record.notes[identity].flatMap(([name, text]) => line(name, text) ?? []),
      line("elite in", list(holds)),
      line("shown", note)),
  ];
}

const spoken = (identity) =>
  `${title(identity)}: ${tasks.map((task, k) => `${task} ${score(scores[k][identity])}`).join(", ")}; ` +
  `${parentsOf(identity).length ? `parents ${ancestryText(identity)}; ` : ""}born in batch ${born[identity]}`;
