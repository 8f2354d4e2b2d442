"use strict";
// Principal components as colours beside each image; a chosen patch shows its similarity to all others.

const { grid, size, patches, across } = data;
const indexOf = new Map(patches.map((patch, i) => [patch, i]));
const readout = make("p", { class: "readout", "aria-live": "polite" }, "No patch is chosen.");
const sections = data.images.map((image, number) => {
  const pick = patch => indexOf.has(patch) && choose(number, patch);
  const photo = board({ src: image.src, grid, size, grey: false, alt: image.name, picked: pick });
  const colored = board({ src: image.src, grid, size, alt: `${image.name}, components as colours` });
  const bytes = unpack(image.colors);
  colored.paint(p => indexOf.has(p)
    ? [...bytes.slice(3 * indexOf.get(p), 3 * indexOf.get(p) + 3), 1] : [128, 128, 128, 1]);
  const centre = Math.floor(grid[0] / 2) * grid[1] + Math.floor(grid[1] / 2);
  photo.mark(indexOf.has(centre) ? centre : patches[0]);
  main.append(make("section", { class: "small" }, make("h2", {}, image.name), make("div", { class: "boards" },
    make("figure", {}, photo.element, make("figcaption", {}, "Image, and similarity to the chosen patch")),
    make("figure", {}, colored.element, make("figcaption", {}, "Components as colours")))));
  return { image, photo, colored };
});
main.prepend(make("div", { class: "sticky" }, readout));

function choose(number, patch) {
  const { image } = sections[number], { more } = colors();
  image.bytes ??= unpack(image.cosines);
  const width = across ? patches.length * sections.length : patches.length;
  const all = [];
  sections.forEach(({ photo, image: other }, m) => {
    photo.element.classList.toggle("grey", across || m === number);
    if (m === number) photo.mark(patch); else photo.mark(photo.patch);
    photo.element.querySelector(".marker").style.opacity = m === number ? 1 : 0.25;
    if (!across && m !== number) return photo.paint(() => null);
    const offset = indexOf.get(patch) * width + (across ? m * patches.length : 0);
    photo.paint(p => {
      if (!indexOf.has(p)) return null;
      const cosine = image.bytes[offset + indexOf.get(p)] / 127.5 - 1;
      if (m !== number || p !== patch) all.push([cosine, other.name, p]);
      return [...more, 0.9 * Math.max(0, cosine) ** 2];
    });
  });
  all.sort((a, b) => b[0] - a[0]);
  readout.textContent = `Chosen: ${place(grid, patch)} of ${image.name}. Most similar: `
    + all.slice(0, 4).map(([c, name, p]) => `${place(grid, p)} of ${name} (${c.toFixed(2)})`).join("; ") + ".";
}
