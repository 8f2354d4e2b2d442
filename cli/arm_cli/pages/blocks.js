"use strict";
// Headings, texts, tables, pictures, code, and charts whose curves share one x axis: steps or hours.

const COLORS = ["#2f7ed8", "#d6591c", "#4b9b3c", "#8d5fc9", "#c23b78", "#1a9a9a", "#a8811a", "#7a7f8c"];
const SVG = document.createRange().createContextualFragment("<svg></svg>").firstChild.namespaceURI;
const SIZE = { width: 640, height: 270, left: 62, right: 12, top: 10, bottom: 34 };

function svg(tag, attributes = {}, ...children) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) if (value !== null) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

const short = value => value === 0 ? "0"
  : Math.abs(value) >= 1e5 || Math.abs(value) < 1e-3 ? value.toExponential(2) : String(Number(value.toPrecision(4)));

function ticks(low, high) {
  const rough = (high - low) / 4, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map(f => f * power).find(f => f >= rough);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high * (1 + 1e-9) + 1e-300; i++) found.push(i * step);
  return found;
}

function extent(values) {
  const low = values.reduce((a, b) => Math.min(a, b)), high = values.reduce((a, b) => Math.max(a, b));
  const pad = high > low ? (high - low) / 40 : Math.abs(high) / 2 || 1;
  return [low - pad, high + pad];
}

function chart({ title, curves }) {
  // A figure with `draw(axis)`. Arrow keys and the pointer move a cursor; the values at it are written below.
  const board = svg("svg", { viewBox: `0 0 ${SIZE.width} ${SIZE.height}`, role: "img", tabindex: 0, "aria-label": title });
  const readout = make("figcaption", { class: "readout" });
  const legend = make("div", { class: "legend" }, ...curves.filter(curve => curve.name).map(curve => {
    const key = make("span", { class: "key" + (curve.dashed ? " dashed" : "") });
    key.style.background = COLORS[curve.color % COLORS.length];
    return make("span", {}, key, " ", curve.name);
  }));
  let axis = "steps", at = 0, x, xs, cursor;
  const low = () => SIZE.height - SIZE.bottom;

  function mark() {
    const place = xs[at];
    cursor.setAttribute("x1", x(place));
    cursor.setAttribute("x2", x(place));
    const values = curves.map(curve => {
      const distances = curve[axis].map(value => Math.abs(value - place));
      const nearest = distances.indexOf(Math.min(...distances));
      return `${curve.name ? curve.name + ": " : ""}${short(curve.values[nearest])}`;
    });
    readout.textContent = `${axis === "steps" ? "step " + place : short(place) + " hours"}: ${values.join("; ")}`;
  }

  function draw(wanted) {
    axis = wanted;
    xs = [...new Set(curves.flatMap(curve => curve[axis]))].sort((a, b) => a - b);
    at = Math.min(at, xs.length - 1);
    const [left, right] = [Math.min(0, xs[0]), xs[xs.length - 1] || 1];
    const [bottom, top] = extent(curves.flatMap(curve => curve.values));
    x = value => SIZE.left + (value - left) / (right - left) * (SIZE.width - SIZE.left - SIZE.right);
    const y = value => low() - (value - bottom) / (top - bottom) * (low() - SIZE.top);
    const parts = [];
    for (const value of ticks(bottom, top)) {
      parts.push(svg("line", { class: "grid", x1: SIZE.left, x2: SIZE.width - SIZE.right, y1: y(value), y2: y(value) }));
      parts.push(svg("text", { x: SIZE.left - 6, y: y(value) + 4, "text-anchor": "end" }, short(value)));
    }
    for (const value of ticks(left, right))
      parts.push(svg("text", { x: x(value), y: low() + 16, "text-anchor": "middle" }, short(value)));
    parts.push(svg("text", { x: SIZE.width - SIZE.right, y: SIZE.height - 3, "text-anchor": "end" },
      axis === "steps" ? "training step" : "hours of training"));
    for (const curve of curves) {
      const color = COLORS[curve.color % COLORS.length];
      const points = curve[axis].map((value, i) => [x(value).toFixed(1), y(curve.values[i]).toFixed(1)]);
      parts.push(svg("polyline", { class: "curve", points: points.map(p => p.join()).join(" "), stroke: color,
        "stroke-dasharray": curve.dashed ? "6 4" : null }));
      if (curve.marked || points.length === 1)
        for (const [cx, cy] of points) parts.push(svg("circle", { cx, cy, r: 3, fill: color }));
    }
    cursor = svg("line", { class: "cursor", y1: SIZE.top, y2: low() });
    board.replaceChildren(...parts, cursor);
    mark();
  }

  board.addEventListener("pointermove", event => {
    const box = board.getBoundingClientRect();
    const wanted = (event.clientX - box.left) / box.width * SIZE.width;
    const distances = xs.map(value => Math.abs(x(value) - wanted));
    at = distances.indexOf(Math.min(...distances));
    mark();
  });
  board.addEventListener("keydown", event => {
    const move = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (move === undefined) return;
    event.preventDefault();
    at = Math.min(xs.length - 1, Math.max(0, at + move));
    mark();
  });
  at = Infinity; // the last point
  return { draw, figure: make("figure", { class: "chart" }, make("h3", {}, title), board, legend, readout) };
}

const BLOCKS = {
  heading: ({ text }) => [make("h2", {}, text)],
  text: ({ text }) => [make("p", {}, text)],
  table: ({ head, rows }) => [make("div", { class: "scroll" }, make("table", { class: "words" },
    make("thead", {}, make("tr", {}, ...head.map(text => make("th", { scope: "col" }, text)))),
    make("tbody", {}, ...rows.map(row => make("tr", {}, ...row.map(text => make("td", {}, text)))))))],
  code: ({ text, summary }) => {
    const code = make("pre", {}, text);
    return [summary === null ? code : make("details", {}, make("summary", {}, summary), code)];
  },
  pictures: ({ pictures, small }) => [make("div", { class: "gallery" + (small ? " coarse" : "") },
    ...pictures.map(({ src, caption }) =>
      make("figure", {}, make("img", { src, alt: caption }), make("figcaption", {}, caption))))],
  charts: ({ charts }) => {
    const shown = charts.map(chart);
    const choose = axis => {
      shown.forEach(one => one.draw(axis));
      buttons.forEach(button => button.setAttribute("aria-pressed", button.dataset.axis === axis));
    };
    const buttons = ["steps", "hours"].map(axis => make("button",
      { class: "plain", type: "button", "data-axis": axis, onclick: () => choose(axis) },
      axis === "steps" ? "over steps" : "over hours of training"));
    choose("steps");
    return [make("div", { class: "controls" }, ...buttons),
      make("div", { class: "charts" }, ...shown.map(one => one.figure))];
  },
};

for (const block of data.blocks) main.append(...BLOCKS[block.kind](block));
