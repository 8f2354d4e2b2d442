"use strict";
const $ = (id) => document.getElementById(id);
const config = JSON.parse($("config").textContent);
const view = $("view"), pen = view.getContext("2d", { willReadFrequently: true });
const LONGEST = 1024; // pixels; larger pictures are reduced by the browser first
const THREADS = 4;

// The large resources are gzip, then base64.
async function unpack(id) {
  const text = $(id).textContent;
  $(id).textContent = ""; // tens of megabytes that are not needed again
  const packed = await (await fetch("data:application/octet-stream;base64," + text)).blob();
  return new Response(packed.stream().pipeThrough(new DecompressionStream("gzip"))).arrayBuffer();
}

// A pool of workers: each has a session, and pictures go to a free worker.
const idle = [], waiting = [], pending = new Map();
let counter = 0;

function ask(worker, message, transfer = []) {
  return new Promise((resolve, reject) => {
    const id = ++counter;
    pending.set(id, { resolve, reject });
    worker.postMessage({ ...message, id }, transfer);
  });
}

function answered({ data }) {
  const { resolve, reject } = pending.get(data.id);
  pending.delete(data.id);
  data.error ? reject(new Error(data.error)) : resolve(data);
}

async function start() {
  const [wasm, model] = await Promise.all(["wasm", "model"].map(unpack));
  // A page opened as a file cannot import blobs in a worker, but it can import data addresses.
  const module = "data:text/javascript;base64," + $("runtime").textContent;
  const script = URL.createObjectURL(new Blob([$("worker").textContent], { type: "text/javascript" }));
  const threads = model.byteLength > 2e8 ? 1 : Math.min(navigator.hardwareConcurrency || 2, THREADS);
  await Promise.all(Array.from({ length: threads }, async () => {
    const worker = new Worker(script);
    worker.onmessage = answered;
    await ask(worker, { runtime: module, wasm, model });
    release(worker);
  }));
  return threads;
}

function release(worker) {
  const next = waiting.shift();
  next ? next(worker) : idle.push(worker);
}

// (H, W) canvas -> probabilities of the classes and the milliseconds of the model.
async function classify(canvas) {
  const context = canvas.getContext("2d", { willReadFrequently: true });
  const { data, width, height } = context.getImageData(0, 0, canvas.width, canvas.height);
  const pixels = new Uint8Array(width * height * 3);
  for (let from = 0, to = 0; from < data.length; from += 4) {
    pixels[to++] = data[from];
    pixels[to++] = data[from + 1];
    pixels[to++] = data[from + 2];
  }
  const worker = idle.pop() || await new Promise((resolve) => waiting.push(resolve));
  try {
    const { logits, map, milliseconds } = await ask(worker, { pixels, width, height }, [pixels.buffer]);
    const largest = Math.max(...logits);
    const exponentials = Array.from(logits, (logit) => Math.exp(logit - largest));
    const sum = exponentials.reduce((a, b) => a + b);
    return { logits, map, probabilities: exponentials.map((e) => e / sum), milliseconds };
  } finally {
    release(worker);
  }
}

// The picture, reduced if it is large, on white if it is transparent.
function onCanvas(source, width, height, mirrored = false) {
  const scale = Math.min(1, LONGEST / Math.max(width, height));
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(width * scale));
  canvas.height = Math.max(1, Math.round(height * scale));
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.fillStyle = "#fff";
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.imageSmoothingQuality = "high";
  if (mirrored) context.setTransform(-1, 0, 0, 1, canvas.width, 0);
  context.drawImage(source, 0, 0, canvas.width, canvas.height);
  return canvas;
}

// The photo and, if there is a map and it is selected, the influence of each patch over it.
let shown = null;
function show(canvas, map) {
  shown = { canvas, map };
  view.height = Math.round(view.width * canvas.height / canvas.width);
  pen.drawImage(canvas, 0, 0, view.width, view.height);
  $("maps").hidden = !map;
  if (!map || !$("influence").checked) return;
  // The model reads the center of the photo.
  const scale = Math.max(config.covered[0] / view.height, config.covered[1] / view.width);
  const [height, width] = config.size.map((side) => side / scale);
  const [top, left] = [(view.height - height) / 2, (view.width - width) / 2];
  const largest = Math.max(...map.values.map(Math.abs));
  map.values.forEach((value, i) => {
    const row = Math.floor(i / map.columns), column = i % map.columns;
    pen.fillStyle = value > 0 ? "#ff7a00" : "#2050ff";
    pen.globalAlpha = 0.75 * Math.abs(value) / largest;
    pen.fillRect(left + column * width / map.columns, top + row * height / map.rows,
      width / map.columns, height / map.rows);
  });
  pen.globalAlpha = 1;
}

function list(probabilities, note) {
  const order = probabilities.map((p, i) => [p, i]).sort((a, b) => b[0] - a[0]).slice(0, 5);
  $("answers").replaceChildren(...order.map(([p, i]) => {
    const item = document.createElement("li"), line = document.createElement("div");
    const bar = document.createElement("div");
    line.className = "line";
    line.append(document.createElement("span"), document.createElement("span"));
    line.firstChild.textContent = config.classes[i];
    line.lastChild.textContent = (100 * p).toFixed(1) + " %";
    bar.className = "bar";
    bar.style.width = 100 * p + "%";
    item.append(line, bar);
    return item;
  }));
  $("status").textContent = note;
}

async function photo(file) {
  const bitmap = await createImageBitmap(file, { imageOrientation: "from-image" });
  const canvas = onCanvas(bitmap, bitmap.width, bitmap.height);
  show(canvas);
  const { probabilities, map, milliseconds } = await classify(canvas);
  show(canvas, map);
  view.setAttribute("aria-label", `${file.name}: ${config.classes[best(probabilities)]}`);
  list(probabilities, `${file.name}: ${milliseconds.toFixed(0)} ms`);
  return probabilities;
}

const best = (values) => values.indexOf(Math.max(...values));

async function photos(files) {
  for (const file of files) {
    try {
      await photo(file);
    } catch (error) {
      $("status").textContent = `${file.name}: cannot be read as an image (${error.message})`;
    }
  }
}

let stream = null;
async function camera() {
  if (stream) {
    stream.getTracks().forEach((track) => track.stop());
    stream = null;
    $("camera").textContent = "Use the camera";
    return;
  }
  try {
    stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
  } catch (error) {
    $("status").textContent = `The camera cannot be used: ${error.message}`;
    return;
  }
  $("camera").textContent = "Stop the camera";
  const video = document.createElement("video");
  video.srcObject = stream;
  video.muted = video.playsInline = true;
  await video.play();
  let frames = 0;
  const began = performance.now();
  while (stream) {
    const canvas = onCanvas(video, video.videoWidth, video.videoHeight);
    const { probabilities, map } = await classify(canvas);
    show(canvas, map);
    const rate = ++frames / ((performance.now() - began) / 1000);
    if (stream) list(probabilities, `Camera: ${rate.toFixed(1)} images/s`);
  }
}

// Drawing: white ink on dark grey, as in the digits that the demonstration trains on.
function clear() {
  pen.fillStyle = "#404040";
  pen.fillRect(0, 0, view.width, view.height);
  $("answers").replaceChildren();
  $("status").textContent = "Draw in the square.";
}

function drawing() {
  let last = null, busy = false, again = false;
  const point = (event) => {
    const box = view.getBoundingClientRect();
    return [(event.clientX - box.left) * view.width / box.width, (event.clientY - box.top) * view.height / box.height];
  };
  const answer = async () => {
    if (busy) { again = true; return; }
    busy = true;
    do {
      again = false;
      const { probabilities, milliseconds } = await classify(view);
      view.setAttribute("aria-label", `Drawing: looks like ${config.classes[best(probabilities)]}`);
      list(probabilities, `${milliseconds.toFixed(0)} ms`);
    } while (again);
    busy = false;
  };
  const line = (from, to) => {
    pen.strokeStyle = "#e0e0e0";
    pen.lineWidth = view.width / 9;
    pen.lineCap = pen.lineJoin = "round";
    pen.beginPath();
    pen.moveTo(...from);
    pen.lineTo(...to);
    pen.stroke();
    answer();
  };
  view.addEventListener("pointerdown", (event) => {
    view.setPointerCapture(event.pointerId);
    last = point(event);
    line(last, last);
  });
  view.addEventListener("pointermove", (event) => {
    if (!last) return;
    const to = point(event);
    line(last, to);
    last = to;
  });
  for (const end of ["pointerup", "pointercancel"]) view.addEventListener(end, () => { last = null; });
  // With a keyboard: arrows move the pen, Space lowers and lifts it, Delete clears.
  let cursor = [view.width / 2, view.height / 4], down = false;
  view.addEventListener("keydown", (event) => {
    const step = view.width / 16;
    const moves = { ArrowLeft: [-step, 0], ArrowRight: [step, 0], ArrowUp: [0, -step], ArrowDown: [0, step] };
    if (event.key === " ") {
      down = !down;
      if (down) line(cursor, cursor);
      else $("status").textContent = "Pen lifted.";
    } else if (moves[event.key]) {
      const clip = (value) => Math.min(view.width - step, Math.max(step, value));
      const to = [clip(cursor[0] + moves[event.key][0]), clip(cursor[1] + moves[event.key][1])];
      if (down) line(cursor, to);
      cursor = to;
    } else if (event.key === "Delete" || event.key === "Backspace") clear();
    else return;
    event.preventDefault();
  });
  $("clear").addEventListener("click", clear);
  clear();
}

// Images per second of the whole page on pictures of 256 x 256 pixels; for tests.
async function benchmark(count = 20) {
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = 256;
  const context = canvas.getContext("2d", { willReadFrequently: true });
  const noise = context.createImageData(256, 256);
  for (let i = 0; i < noise.data.length; i++) noise.data[i] = i % 4 === 3 ? 255 : (i * 7919) % 256;
  context.putImageData(noise, 0, 0);
  await Promise.all(Array.from({ length: 4 }, () => classify(canvas)));
  const began = performance.now();
  await Promise.all(Array.from({ length: count }, () => classify(canvas)));
  return count / ((performance.now() - began) / 1000);
}

(async () => {
  for (const element of document.querySelectorAll(config.draw ? ".photo" : ".draw")) element.hidden = true;
  const threads = await start();
  window.arm = { classify, benchmark, onCanvas, photo, threads };
  document.body.dataset.ready = "yes";
  $("status").textContent = `Ready. ${threads} ${threads === 1 ? "thread" : "threads"}.`;
  if (config.draw) return drawing();
  $("files").addEventListener("change", () => photos($("files").files));
  $("camera").addEventListener("click", camera);
  $("influence").addEventListener("change", () => show(shown.canvas, shown.map));
  const drop = $("drop");
  for (const kind of ["dragenter", "dragover", "dragleave", "drop"]) {
    document.addEventListener(kind, (event) => {
      event.preventDefault();
      drop.classList.toggle("over", kind === "dragenter" || kind === "dragover");
      if (kind === "drop") photos(event.dataTransfer.files);
    });
  }
  document.addEventListener("paste", (event) => photos(event.clipboardData.files));
})().catch((error) => {
  $("status").textContent = `The model cannot be loaded: ${error.message}`;
  console.error(error);
});
