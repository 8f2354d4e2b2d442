"use strict";
// Influence maps: choose a layer and a direction, click the token whose sources should show.

const { grid, size, patches, views, classToken } = data;
// A target is a token's number, or "class": the tokens that the class is read from, together.
const tokenOf = new Map(patches.map((patch, token) => [patch, token]).filter(([patch]) => patch >= 0));
const nameOf = target => target === "class" ? "the class"
  : target === classToken ? "the class token" : place(grid, patches[target]);
const percent = value => `${(100 * value).toFixed(Math.abs(value) < 0.1 ? 1 : 0)} %`;

function section(image) {
  let view = data.firstView, direction = data.directions[0], target = data.target;
  const stored = new Map(image.maps.map(map => [`${map.view}|${map.direction}`, map]));

  // The rollout and the gradient have one map for all directions.
  const current = () => stored.get(`${view}|${direction}`) ?? stored.get(`${view}|${data.directions[0]}`);

  function values(map) {
    const row = map.targets.indexOf(target);
    if (row < 0) return null;
    map.bytes ??= unpack(map.data);
    const count = map.onPatches ? grid[0] * grid[1] : patches.length;
    return Array.from({ length: count }, (_, i) => (map.bytes[row * count + i] - 128) / 127 * map.scale[row]);
  }

  const readout = make("p", { class: "readout", "aria-live": "polite" });
  const map = board({
    src: image.src, grid, size, grey: true, name: "Target patch", alt: `${image.name}, under the influence map`,
    picked: patch => { if (tokenOf.has(patch)) { target = tokenOf.get(patch); draw(); } },
  });
  const photo = board({ src: image.src, grid, size, alt: image.name });

  function draw() {
    for (const [button, value] of buttons) button.setAttribute("aria-pressed", String(target === value));
    const patch = typeof target === "number" && patches[target] >= 0 ? patches[target] : null;
    photo.mark(patch);
    map.mark(patch ?? map.patch ?? Math.floor(grid[0] / 2) * grid[1] + Math.floor(grid[1] / 2));
    map.element.querySelector(".marker").style.opacity = patch === null ? 0.35 : 1;
    const shown = current(), found = values(shown), { onPatches } = shown;
    if (!found) {
      map.paint(() => null);
      readout.textContent = `The page stores this map for ${shown.targets.map(nameOf).join(", ")} only; choose that, `
        + "or the mean of the directions of a layer.";
      return;
    }
    const byPatch = new Array(grid[0] * grid[1]).fill(null);
    found.forEach((value, i) => { const p = onPatches ? i : patches[i]; if (p >= 0) byPatch[p] = value; });
    const most = Math.max(...byPatch.map(v => Math.abs(v ?? 0)), 1e-30), { more, less } = colors();
    map.paint(p => byPatch[p] === null ? null : [...(byPatch[p] >= 0 ? more : less), 0.9 * Math.abs(byPatch[p]) / most]);
    const best = byPatch.map((value, p) => [value ?? 0, p]).sort((a, b) => Math.abs(b[0]) - Math.abs(a[0])).slice(0, 4);
    const unit = view === "gradient times input" ? value => value.toPrecision(3) : percent;
    readout.textContent = `${view}${stored.has(`${view}|${direction}`) ? `, ${direction}` : ""}. `
      + `Target: ${nameOf(target)}. Most influence: ` + best.map(([value, p]) => `${place(grid, p)} (${unit(value)})`).join("; ")
      + (onPatches || classToken === null ? "." : `; the class token ${unit(found[classToken])}.`);
  }

  const layers = slider("Map", views.length, views.indexOf(view), i => views[i], i => { view = views[i]; draw(); });
  const select = make("select", {}, ...data.directions.map(name => make("option", { value: name }, name)));
  select.addEventListener("change", () => { direction = select.value; draw(); });
  const buttons = new Map();
  for (const value of [...(data.hasClass ? ["class"] : []), ...(classToken === null ? [] : [classToken])]) {
    const button = make("button", { type: "button", class: "plain" }, nameOf(value));
    button.addEventListener("click", () => { target = value; draw(); });
    buttons.set(button, value);
  }
  main.append(make("section", {},
    make("h2", {}, image.name),
    make("p", {}, image.answer),
    make("div", { class: "controls" }, layers.element,
      make("label", {}, "Direction", select),
      ...(buttons.size ? [make("div", { role: "group", "aria-label": "Target" }, ...buttons.keys())] : [])),
    make("div", { class: "boards" },
      make("figure", {}, map.element, make("figcaption", {},
        make("span", { class: "key more" }), " positive  ", make("span", { class: "key less" }), " negative. ",
        "Click a patch, or move the frame with the arrow keys, to choose the target.")),
      make("figure", {}, photo.element, make("figcaption", {}, "The image, as the model reads it"))),
    readout));
  layers.update();
}

for (const image of data.images) section(image);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  for (const input of document.querySelectorAll("input[type=range]")) input.dispatchEvent(new Event("input"));
});
