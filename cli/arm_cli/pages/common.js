"use strict";
// Elements, numbers packed as base64, and the board: a picture with a grid of patches laid over it.

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name in element && typeof value === "function") element[name] = value;
    else if (value !== null) element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

function unpack(text) {
  const raw = atob(text), bytes = new Uint8Array(raw.length);
  for (let i = 0; i < raw.length; i++) bytes[i] = raw.charCodeAt(i);
  return bytes;
}

function slider(label, count, value, text, changed) {
  // A labelled range from 0 to count - 1; `text(i)` is shown, and screen readers read it.
  const shown = make("span"); // an output element would take the label for itself
  const input = make("input", { type: "range", min: 0, max: count - 1, step: 1, value });
  const update = () => {
    shown.textContent = text(Number(input.value));
    input.setAttribute("aria-valuetext", shown.textContent);
    changed(Number(input.value));
  };
  input.addEventListener("input", update);
  const name = make("span", {}, label + ": ", shown);
  return { element: make("label", { class: "wide" }, name, input), input, update };
}

const place = (grid, patch) => `row ${Math.floor(patch / grid[1])}, column ${patch % grid[1]}`;

function colors() {
  const style = getComputedStyle(document.documentElement);
  const read = name => style.getPropertyValue(name).split(",").map(Number);
  return { more: read("--more"), less: read("--less") };
}

function board({ src, grid, size, alt, grey = false, picked = null, name = "Patch" }) {
  // A picture under a canvas of one pixel per patch. With `picked`, a click or an arrow key chooses a patch.
  const [rows, columns] = grid;
  const canvas = make("canvas", { width: columns, height: rows, "aria-hidden": "true" });
  const element = make("div", { class: "board" + (grey ? " grey" : "") + (size[1] < 100 ? " coarse" : "") });
  element.style.aspectRatio = `${size[1]} / ${size[0]}`;
  element.append(make("img", { src, alt }), canvas);
  const context = canvas.getContext("2d");
  const self = {
    element,
    patch: null,
    paint(rgba) { // (patch) -> [red, green, blue, alpha 0..1] or null
      const image = context.createImageData(columns, rows);
      for (let p = 0; p < rows * columns; p++) {
        const color = rgba(p);
        if (color) image.data.set([color[0], color[1], color[2], Math.round(255 * color[3])], 4 * p);
      }
      context.putImageData(image, 0, 0);
    },
    mark(patch) {
      self.patch = patch;
      marker.hidden = patch === null;
      if (patch === null) return;
      marker.style.left = `${100 * (patch % columns) / columns}%`;
      marker.style.top = `${100 * Math.floor(patch / columns) / rows}%`;
      marker.setAttribute("aria-label", `${name}: ${place(grid, patch)}. Arrow keys move it.`);
    },
  };
  const marker = make(picked ? "button" : "div", { class: "marker", type: picked ? "button" : null });
  marker.style.width = `${100 / columns}%`;
  marker.style.height = `${100 / rows}%`;
  marker.hidden = true;
  element.append(marker);
  if (!picked) return self;

  element.classList.add("pick");
  element.addEventListener("click", event => {
    if (event.target === marker) return;
    const box = element.getBoundingClientRect();
    const cell = (at, start, length, count) =>
      Math.min(count - 1, Math.max(0, Math.floor((at - start) / length * count)));
    const row = cell(event.clientY, box.top, box.height, rows);
    picked(row * columns + cell(event.clientX, box.left, box.width, columns));
  });
  marker.addEventListener("keydown", event => {
    const [down, right] = {
      ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1],
    }[event.key] ?? [0, 0];
    if (!down && !right) return;
    event.preventDefault();
    const row = Math.floor(self.patch / columns) + down, column = self.patch % columns + right;
    if (row >= 0 && row < rows && column >= 0 && column < columns) picked(row * columns + column);
  });
  return self;
}

const data = JSON.parse(document.getElementById("data").textContent);
const main = document.getElementById("main");
