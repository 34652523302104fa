/* What pictures and texts are made of: elements, numbers, words, scales, the color of fitness. */

// The page has an inline picture already: it knows the namespace, so no address is written here.
const SVG = document.querySelector("svg").namespaceURI;

function build(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) if (value !== null) node.setAttribute(name, value);
  node.append(...children.flat(2).filter((child) => child !== null));
  return node;
}
const html = (tag, attributes = {}, ...children) => build(document.createElement(tag), attributes, children);
const svg = (tag, attributes = {}, ...children) => build(document.createElementNS(SVG, tag), attributes, children);
const missing = (text) => html("p", { class: "missing" }, text);
const place = (id) => document.getElementById(id);
const fill = (id, ...children) => place(id).replaceChildren(...children.flat(2).filter((child) => child !== null));

const isNumber = (value) => typeof value === "number";
const sum = (values) => values.reduce((total, value) => total + value, 0);
const score = (value) => (isNumber(value) ? value.toFixed(Math.abs(value) < 100 ? 3 : 1) : "failed");
const percent = (value) => `${(100 * value).toFixed(value < 0.0995 && value > 0 ? 1 : 0)} %`;
const count = (number, one, many = `${one}s`) => `${number.toLocaleString("en")} ${number === 1 ? one : many}`;
const shorten = (text, length) => (text.length > length ? `${text.slice(0, length - 1)}…` : text);
const list = (words) => (words.length < 2 ? words.join("") : `${words.slice(0, -1).join(", ")} and ${words.at(-1)}`);

/* Least and largest number; a little to both sides where they are one, 0 to 1 where there is none. */
function extent(values) {
  const numbers = values.filter(isNumber);
  if (!numbers.length) return [0, 1];
  const low = numbers.reduce((a, b) => Math.min(a, b)), high = numbers.reduce((a, b) => Math.max(a, b));
  return high > low ? [low, high] : [low - 0.05, high + 0.05];
}

/* Round numbers within a range, about `wanted` of them, as [value, text]. */
function ticks([low, high], wanted) {
  const raw = (high - low) / wanted, power = 10 ** Math.floor(Math.log10(raw));
  const step = power * (raw / power < 1.5 ? 1 : raw / power < 3.5 ? 2 : raw / power < 7.5 ? 5 : 10);
  const decimals = Math.max(0, -Math.floor(Math.log10(step) + 1e-9));
  const values = [];
  for (let i = Math.ceil(low / step - 1e-6); i * step <= high + step * 1e-6; i++) values.push(i * step);
  return values.map((value) => [value, (Math.abs(value) < step / 2 ? 0 : value).toFixed(decimals)]);
}

/* From a range of numbers to a range of the picture. */
const scale = ([low, high], [from, to]) => (value) => from + ((value - low) / (high - low)) * (to - from);

/* Places near those wished for, in the same order, at least `gap` apart and none above `high`. */
function spread(wishes, gap, high) {
  const order = wishes.map((_, i) => i).sort((a, b) => wishes[a] - wishes[b]), places = [...wishes];
  for (let sweep = 0; sweep < 50; sweep++) {
    for (let i = 1; i < order.length; i++) {
      const push = (places[order[i - 1]] + gap - places[order[i]]) / 2;
      if (push > 0) { places[order[i - 1]] -= push; places[order[i]] += push; }
    }
    places[order.at(-1)] = Math.min(places[order.at(-1)], high);
  }
  return places;
}

/* From violet over green to yellow, each step as large to the eye. */
const RAMP = [
  [72, 50, 126], [59, 82, 139], [44, 114, 142], [33, 145, 140], [40, 174, 128], [94, 201, 98], [173, 220, 48],
  [240, 229, 60],
];

function color(value, [low, high]) {
  if (!isNumber(value)) return "rgb(150,150,150)";
  const at = Math.min(Math.max((value - low) / (high - low), 0), 1) * (RAMP.length - 1);
  const below = Math.min(Math.floor(at), RAMP.length - 2);
  return `rgb(${RAMP[below].map((c, i) => Math.round(c + (at - below) * (RAMP[below + 1][i] - c)))})`;
}

function colorBar(range, label) {
  const ramp = html("span", { class: "ramp" });
  ramp.style.background = `linear-gradient(90deg, ${RAMP.map((c) => `rgb(${c})`).join(", ")})`;
  return html("span", { class: "color-bar" }, html("span", {}, label), score(range[0]), ramp, score(range[1]));
}
