"use strict";
// Steps through the clusters: the given and the predicted clusters of each step.

const { grid, size, patch, clusters, given } = data;
const blank = [128, 128, 128];

function bounds(cluster) {
  const rows = cluster.map(p => Math.floor(p / grid[1])), columns = cluster.map(p => p % grid[1]);
  const [top, left] = [Math.min(...rows), Math.min(...columns)];
  return { top, left, height: Math.max(...rows) - top + 1, width: Math.max(...columns) - left + 1 };
}

function scene(title, describe, sourceOf) {
  // A canvas where `sourceOf(cluster, step)` names the picture that each cluster is cut from, or null.
  const canvas = make("canvas", { width: size[1], height: size[0], role: "img", "aria-label": title });
  const marker = make("div", { class: "marker" });
  const element = make("div", { class: "board " + (size[1] < 100 ? "coarse" : "smooth") }, canvas, marker);
  element.style.aspectRatio = `${size[1]} / ${size[0]}`;
  const context = canvas.getContext("2d");
  function show(pictures, step) {
    context.fillStyle = `rgb(${blank.join()})`;
    context.fillRect(0, 0, size[1], size[0]);
    clusters.forEach((cluster, c) => {
      const source = sourceOf(c, step);
      if (source === null) return;
      const { top, left, height, width } = bounds(cluster);
      const box = [left * patch, top * patch, width * patch, height * patch];
      context.drawImage(pictures[source], ...box, ...box);
    });
    const { top, left, height, width } = bounds(clusters[step]);
    marker.style.top = `${100 * top / grid[0]}%`;
    marker.style.left = `${100 * left / grid[1]}%`;
    marker.style.height = `${100 * height / grid[0]}%`;
    marker.style.width = `${100 * width / grid[1]}%`;
    canvas.setAttribute("aria-label", describe(step));
  }
  return { show, figure: make("figure", {}, element, make("figcaption", {}, title)) };
}

const number = value => value === null ? "given" : value.toFixed(3);

function section(image) {
  const kinds = [
    scene("The image", () => `${image.name}: the image`, () => "true"),
    scene(
      "Step by step: from the true clusters before it",
      step => `${image.name}: clusters 1 to ${step} true, cluster ${step + 1} predicted`,
      (c, step) => c < step ? "true" : c === step ? (step === 0 ? "true" : "steps") : null,
    ),
    scene(
      `Rollout: from ${given === 1 ? "the first cluster" : `the first ${given} clusters`} and its own predictions`,
      step => `${image.name}: clusters 1 to ${Math.min(given, step + 1)} given, the others predicted from predictions`,
      (c, step) => c > step ? null : c < given ? "true" : "rollout",
    ),
  ];
  const head = ["cluster", "step by step: loss", "pixels", "rollout: loss", "pixels"];
  const body = clusters.map((_, c) => {
    const values = [image.stepLoss, image.stepPixels, image.rolloutLoss, image.rolloutPixels].map(v => number(v[c]));
    return make("tr", {}, ...[`${c + 1}`, ...values].map(text => make("td", {}, text)));
  });
  const table = make("table", {},
    make("thead", {}, make("tr", {}, ...head.map(text => make("th", { scope: "col" }, text)))),
    make("tbody", {}, ...body));
  const readout = make("p", { class: "readout" });
  main.append(make("section", { class: "three" },
    make("h2", {}, image.name),
    make("div", { class: "boards" }, ...kinds.map(kind => kind.figure)),
    readout,
    make("details", {}, make("summary", {}, "Error of every cluster"), make("div", { class: "scroll" }, table))));

  const pictures = {};
  const ready = ["true", "steps", "rollout"].map(name => {
    pictures[name] = new Image();
    pictures[name].src = image[name];
    return pictures[name].decode();
  });
  let wanted = 0;
  const show = step => {
    wanted = step;
    Promise.all(ready).then(() => wanted === step && kinds.forEach(kind => kind.show(pictures, step)));
    body.forEach((row, c) => c === step ? row.setAttribute("aria-current", "step") : row.removeAttribute("aria-current"));
    readout.textContent = image.stepLoss[step] === null ? "This cluster is given."
      : `Loss ${number(image.stepLoss[step])} from true clusters, `
        + (image.rolloutLoss[step] === null ? "given in the rollout." : `${number(image.rolloutLoss[step])} in the rollout.`);
  };
  return show;
}

const shows = [];
const live = make("p", { class: "caption", "aria-live": "polite" });
const steps = slider("Cluster", clusters.length, 1, i => `${i + 1} of ${clusters.length}`, step => {
  shows.forEach(show => show(step));
  const { top, left } = bounds(clusters[step]);
  live.textContent = `Cluster ${step + 1} of ${clusters.length} begins at ${place(grid, top * grid[1] + left)}. `
    + "Grey clusters come later.";
});
main.append(make("div", { class: "controls sticky" }, steps.element), live);
for (const image of data.images) shows.push(section(image));
steps.update();

document.addEventListener("keydown", event => {
  if (event.target !== document.body) return;
  const move = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (move === undefined) return;
  event.preventDefault();
  steps.input.value = Number(steps.input.value) + move;
  steps.update();
});
