/* The timeline that replays the archives, and curves over it. */

let playing = null;

function setBatch(batch) {
  state.batch = Math.max(0, Math.min(lastBatch, batch));
  const slider = place("batch"), known = born.filter((one) => one <= state.batch).length - numExperts;
  slider.value = state.batch;
  const moment = state.batch ? `batch ${state.batch} of ${lastBatch}` : "batch 0: the experts alone";
  place("moment").textContent = state.batch ? `${moment} · ${count(known, "child", "children")}` : moment;
  slider.setAttribute("aria-valuetext", place("moment").textContent);
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
  place("batch").addEventListener("input", (event) => { stop(); setBatch(Number(event.target.value)); });
  place("play").addEventListener("click", play);
}

const CURVES = [
  ["coverage", "Coverage", "share of cells that hold an elite", percent],
  ["qd_score", "QD score", "sum of the elites' fitness", (value) => value.toFixed(1)],
  ["max_fitness", "Best fitness", "of the best elite at its archive's task", score],
];
const charts = [];

/* One line a task over batches; `update` moves the marker and tells the values there. */
function makeChart([name, heading, explanation, format]) {
  const curves = metrics[name], names = tasks.map((task) => shorten(task, 13));
  const box = { left: 44, right: 346 - 6.6 * Math.max(...names.map((text) => text.length)), top: 10, bottom: 190 };
  const [low, high] = extent(curves.flat()), floor = name === "max_fitness" ? low - 0.08 * (high - low) : Math.min(0, low);
  const x = scale([0, Math.max(1, lastBatch)], [box.left, box.right]);
  const y = scale([floor, high + 0.05 * (high - floor)], [box.bottom, box.top]);
  const known = (curve) => [...curve.entries()].filter(([, value]) => isNumber(value));
  const line = (curve) => known(curve).map(([i, value], j) => `${j ? "L" : "M"}${x(i + 1).toFixed(1)} ${y(value).toFixed(1)}`);
  const labels = spread(curves.map((curve) => y(known(curve).at(-1)?.[1] ?? floor)), 14, box.bottom);
  const marker = svg("path", { class: "marker" }), dots = curves.map((_, k) => svg("circle", { class: `dot task-${k}`, r: 3.5 }));
  const values = tasks.map((task, k) => html("span", {}, html("i", { class: `swatch task-${k}` }), `${task} `, html("b")));
  const picture = svg("svg", { viewBox: "0 0 360 226", role: "img", "aria-label": `${heading} by batch, one line a task` },
    svg("g", { class: "axes" },
      ticks([floor, high + 0.05 * (high - floor)], 4).map(([at, word]) => [
        svg("path", { class: "grid", d: `M${box.left} ${y(at)}H${box.right}` }),
        svg("text", { x: box.left - 7, y: y(at) + 4, "text-anchor": "end" }, name === "coverage" ? percent(at) : word)]),
      ticks([0, Math.max(1, lastBatch)], 5).filter(([at]) => at === Math.round(at)).map(([at, word]) =>
        svg("text", { x: x(at), y: box.bottom + 16, "text-anchor": "middle" }, word)),
      svg("text", { class: "axis-name", x: (box.left + box.right) / 2, y: box.bottom + 33, "text-anchor": "middle" }, "batch")),
    marker,
    curves.map((curve, k) => [svg("path", { class: `curve task-${k}`, d: line(curve).join("") }),
      svg("text", { class: `line-name task-${k}`, x: box.right + 8, y: labels[k] + 4 }, names[k])]),
    dots);

  function update(batch) {
    marker.setAttribute("d", `M${x(batch)} ${box.top}V${box.bottom}`);
    for (const [k, curve] of curves.entries()) {
      const value = curve[batch - 1];
      build(dots[k], isNumber(value) ? { cx: x(batch), cy: y(value), visibility: "visible" } : { visibility: "hidden" }, []);
      values[k].lastChild.textContent = isNumber(value) ? format(value) : "–";
    }
  }

  const seek = (event) => {
    const at = picture.getBoundingClientRect();
    stop();
    setBatch(Math.round(((((event.clientX - at.left) / at.width) * 360 - box.left) / (box.right - box.left)) * lastBatch));
  };
  picture.addEventListener("pointerdown", seek);
  picture.addEventListener("pointermove", (event) => event.buttons && seek(event));
  const figure = html("figure", { class: "chart" }, html("figcaption", {}, html("h3", {}, heading), html("span", {
    class: "caption" }, explanation), html("p", { class: "values" }, values)), picture);
  return { figure, update };
}

function drawCurves() {
  const known = CURVES.filter(([name]) => metrics[name]?.some((curve) => curve.some(isNumber)));
  if (!known.length) return fill("curves-content", missing("No curves yet: they begin with the first batch of children."));
  charts.push(...known.map(makeChart));
  fill("curves-content", html("p", { class: "lead" }, "Figures after each batch; the dotted line is the moment on the timeline."),
    html("div", { class: "charts" }, charts.map((chart) => chart.figure)));
}

function updateCurves() {
  for (const chart of charts) chart.update(state.batch);
}
