"use strict";
// One patch of each image, and the most similar patches of other images.

const { grid, size, patch } = data;
function framed(src, alt, at, caption) {
  const shown = board({ src, grid, size, alt });
  shown.mark(at);
  return make("figure", {}, shown.element, make("figcaption", {}, caption));
}
for (const image of data.images) {
  main.append(make("section", { class: "small" }, make("h2", {}, image.name), make("div", { class: "boards" },
    framed(image.src, image.name, patch, `Query: ${place(grid, patch)}`),
    ...image.found.map(found => framed(found.src, found.name, found.patch,
      `${found.similarity.toFixed(3)}: ${found.name}, ${place(grid, found.patch)}`)))));
}
