/* The timeline that replays the archives, and curves over it. */

let playing = null;

function setBatch(batch) {
  state.batch = Math.max(0, Math.min(lastBatch, batch));
  const slider = place("batch"), known = born.filter((one) => one <= state.batch).length - numFounders;
  slider.value = state.batch;
  const moment = state.batch ? `batch ${state.batch} of ${lastBatch}` : numFounders > numExperts ? "batch 0" : "batch 0: the experts alone";
  place("moment").textContent = state.batch ? `${moment} · ${count(known, "child", "children")}` : moment;
  slider.setAttribute("aria-valuetext", place("moment").textContent);
  hideTooltip();
  updateArchives();
  updateCurves();
}

function stop() {
  clearInterval(playing);
  playing = null;
  place("play").classList.remove("playing");
  place("play").querySelector("span").textContent = "Play";
}

/* The whole replay takes some ten seconds at most, from the start if it stands at the end. */
function play() {
  if (playing) return stop();
  if (state.batch === lastBatch) setBatch(0);
  const step = Math.ceil(lastBatch / 200);
  playing = setInterval(() => {
    setBatch(state.batch + step);
    if (state.batch === lastBatch) stop();
  }, Math.max(50, Math.min(400, 10000 / lastBatch)));
  place("play").classList.add("playing");
  place("play").querySelector("span").textContent = "Pause";
}

function drawTimeline() {
  place("timeline").hidden ||= lastBatch === 0;
  place("batch").max = lastBatch;
  place("batch").addEventListener("input", (event) => {
    stop();
    setBatch(Number(event.target.value));
  });
  place("play").addEventListener("click", play);
}

const CURVES = [
  ["coverage", "Coverage", "share of cells that hold an elite", percent],
  ["qd_score", "QD score", "sum of the elites' fitness", (value) => value.toFixed(1)],
  ["max_fitness", "Best fitness", "of the best elite at its archive's task", score],
];
const charts = [];

/* Where a chart's lines run; the names of the tasks stand at their ends. */
function chartGeometry(name, labels) {
  const box = { left: 44, right: 346 - 6.6 * Math.max(...labels.map((text) => text.length)), top: 10, bottom: 190 };
  const [low, high] = extent(metrics[name].flat());
  const floor = name === "max_fitness" ? low - 0.08 * (high - low) : Math.min(0, low);
  const across = [0, Math.max(1, lastBatch)], up = [floor, high + 0.05 * (high - floor)];
  return { box, across, up, x: scale(across, [box.left, box.right]), y: scale(up, [box.bottom, box.top]) };
}

function drawChartAxes({ box, across, up, x, y }, word) {
  const text = (attributes, words) => svg("text", { "text-anchor": "middle", ...attributes }, words);
  const batches = ticks(across, 5).filter(([at]) => Number.isInteger(at));
  return svg("g", { class: "axes" },
    ticks(up, 4).map(([at, number]) => [
      svg("path", { class: "grid", d: `M${box.left} ${y(at)}H${box.right}` }),
      text({ x: box.left - 7, y: y(at) + 4, "text-anchor": "end" }, word(at, number)),
    ]),
    batches.map(([at, number]) => text({ x: x(at), y: box.bottom + 16 }, number)),
    text({ class: "axis-name", x: (box.left + box.right) / 2, y: box.bottom + 33 }, "batch"));
}

/* The lines over batches from 1 on, one per task, and the tasks' names at their ends. */
function drawCurve(curves, labels, { box, up, x, y }) {
  const known = (curve) => [...curve.entries()].filter(([, value]) => isNumber(value));
  const places = spread(curves.map((curve) => y(known(curve).at(-1)?.[1] ?? up[0])), 14, box.bottom);
  return curves.map((curve, k) => {
    const points = known(curve).map(([i, value]) => `${x(i + 1).toFixed(1)} ${y(value).toFixed(1)}`);
    return [
      svg("path", { class: `curve task-${k}`, d: points.length ? `M${points.join("L")}` : "" }),
      svg("text", { class: `line-name task-${k}`, x: box.right + 8, y: places[k] + 4 }, labels[k]),
    ];
  });
}

/* A chart; `update` moves the marker to a batch and tells the values there. A press on the chart moves the timeline. */
function makeChart([name, heading, explanation, format]) {
  const curves = metrics[name], labels = tasks.map((task) => shorten(task, 13));
  const geometry = chartGeometry(name, labels), { box, x, y } = geometry;
  const marker = svg("path", { class: "marker" });
  const dots = curves.map((_, k) => svg("circle", { class: `dot task-${k}`, r: 3.5 }));
  const swatch = (k) => html("i", { class: `swatch task-${k}` });
  const values = tasks.map((task, k) => html("span", {}, swatch(k), `${task} `, html("b")));
  const picture = svg("svg",
    { viewBox: "0 0 360 226", role: "img", "aria-label": `${heading} after each batch, one line a task` },
    drawChartAxes(geometry, (at, number) => (name === "coverage" ? percent(at) : number)),
    marker, drawCurve(curves, labels, geometry), dots);

  function update(batch) {
    marker.setAttribute("d", `M${x(batch)} ${box.top}V${box.bottom}`);
    for (const [k, curve] of curves.entries()) {
      const value = curve[batch - 1], there = isNumber(value);
      build(dots[k], { cx: x(batch), cy: there ? y(value) : 0, visibility: there ? "visible" : "hidden" }, []);
      values[k].lastChild.textContent = there ? format(value) : "–";
    }
  }

  function seek(event) {
    const at = picture.getBoundingClientRect(), along = (360 * (event.clientX - at.left)) / at.width;
    stop();
    setBatch(Math.round(((along - box.left) / (box.right - box.left)) * lastBatch));
  }
  picture.addEventListener("pointerdown", seek);
  picture.addEventListener("pointermove", (event) => event.buttons && seek(event));
  const caption = html("figcaption", {},
    html("h3", {}, heading), html("span", { class: "caption" }, explanation), html("p", { class: "values" }, values));
  return { figure: html("figure", { class: "chart" }, caption, picture), update };
}

function drawCurves() {
  const known = CURVES.filter(([name]) => metrics[name]?.some((curve) => curve.some(isNumber)));
  if (!known.length) return fill("curves-content", missing("No curves yet: they begin with the first batch."));
  charts.push(...known.map(makeChart));
  fill("curves-content",
    html("p", { class: "lead" }, "Figures after each batch; the dotted line is the moment on the timeline."),
    html("div", { class: "charts" }, charts.map((chart) => chart.figure)));
}

function updateCurves() {
  for (const chart of charts) chart.update(state.batch);
}
