"""Features of patches: principal components as colours, and nearest patches in a folder, as PNGs and
pages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from arm_cli.images import image_batches, image_files
from arm_cli.opening import Opened
from arm_cli.pages.pictures import enlarge, outline, save_row, stems
from arm_cli.pages.shell import check_count, pack, picture, render
from arm_cli.progress import ProgressBar
from arm_core.data.transforms import denormalize, load_image
from arm_core.engine.protocol import Array, Engine
from arm_core.explain.features import (
    component_colors,
    nearest_patches,
    patch_features,
    read_patches,
    unit,
)
from arm_core.explain.layout import CLASS, token_patches, token_weights
from arm_core.model.spec import ModelSpec

BATCH = 16
MOST = 24
"""Largest number of images on a page."""
PICTURES = 120
"""Largest number of pictures on a page of neighbours."""
STORED = 1_600_000
"""Bytes of cosines that a page stores; larger pages store only those within each image."""


@dataclass(frozen=True, kw_only=True)
class Query:
    """The values of --neighbours, --token and --count."""

    patch: int
    """Raster index."""
    folder: str
    count: int

    @classmethod
    def parse(cls, spec: ModelSpec, token: str | None, folder: str, count: int) -> Query:
        """ValueError unless the token is a patch that the model reads."""
        if token in (None, CLASS):
            raise ValueError("--neighbours: expected the patch to search for; pass --token ROW,COLUMN")
        patch = int(token_patches(spec)[token_weights(spec, token or "").argmax()])
        return cls(patch=patch, folder=folder, count=count)


def _pixels(opened: Opened, images: Array) -> npt.NDArray[np.uint8]:
    return denormalize(images, opened.transform.mean, opened.transform.std)


def colour_page(opened: Opened, engine: Engine, files: Sequence[Path], folder: Path) -> str:
    """Colours of all images' patches from common components; a PNG of each image beside its colours."""
    check_count(files, MOST)
    spec, features, pixels = opened.spec, [], []
    with ProgressBar("explain", len(files), "images") as counter:
        for batch in image_batches(files, opened, BATCH):
            features.append(patch_features(engine, batch))
            pixels += list(_pixels(opened, batch))
            counter.advance(len(batch))
    joined = np.concatenate(features)  # (B, P, D)
    colors = np.round(255 * component_colors(joined)).astype(np.uint8)
    patches = read_patches(spec)
    for name, image, color in zip(stems(files), pixels, colors, strict=True):
        save_row(folder / f"{name}-pca.png", [image, _on_patches(spec, patches, color)])
    directions = unit(joined)
    across = (len(files) * len(patches)) ** 2 <= STORED
    everywhere = directions.reshape(-1, joined.shape[-1])
    data = {
        "grid": spec.grid,
        "size": spec.image_size,
        "patches": patches.tolist(),
        "across": across,
        "images": [
            {
                "name": file.name,
                "src": picture(image),
                "colors": pack(color.tobytes()),
                "cosines": pack(_levels(own @ (everywhere if across else own).T).tobytes()),
            }
            for file, image, color, own in zip(files, pixels, colors, directions, strict=True)
        ],
    }
    captions = [
        "The first three principal components of the features of all patches of all images, as red, green "
        "and blue: patches of similar colours have similar features. The sign of a component is arbitrary.",
        "Click a patch, or move its frame with the arrow keys, to see the cosine similarity of its "
        "features with "
        + (
            "those of every patch."
            if across
            else "those of the same image; for all images, show fewer of them."
        ),
    ]
    return render("Features of patches", captions, "features.js", data, footer=f"Model: {opened.folder}")


def _levels(cosines: Array) -> npt.NDArray[np.uint8]:
    return np.asarray(np.round((np.clip(cosines, -1, 1) + 1) * 127.5), np.uint8)


def _on_patches(
    spec: ModelSpec, patches: npt.NDArray[np.int32], colors: npt.NDArray[np.uint8]
) -> npt.NDArray[np.uint8]:
    """(P, 3) colours of patches as a picture of the image's size; patches that the model skips are white."""
    grid = np.full((spec.patches, 3), 255, np.uint8)
    grid[patches] = colors
    side = spec.encoder.patch
    return grid.reshape(*spec.grid, 3).repeat(side, axis=0).repeat(side, axis=1)


def neighbour_page(opened: Opened, engine: Engine, files: Sequence[Path], folder: Path, query: Query) -> str:
    """The patches in a folder that are most similar to one patch of each image, except its own patches."""
    check_count(files, max(1, PICTURES // (query.count + 1)))
    spec, pool = opened.spec, image_files([query.folder])
    place = int(np.flatnonzero(read_patches(spec) == query.patch)[0])
    with ProgressBar("explain", len(files) + len(pool), "images") as counter:

        def counted(files: Sequence[Path]) -> Iterator[Array]:
            for images in image_batches(files, opened, BATCH):
                yield images
                counter.advance(len(images))

        queries = np.concatenate([patch_features(engine, images)[:, place] for images in counted(files)])
        # One more than requested: if the image itself is in the folder, it is removed below.
        nearest = nearest_patches(engine, queries, counted(pool), count=query.count + 1)
    shown = []
    for file, name, candidates in zip(files, stems(files), nearest, strict=True):
        found = [n for n in candidates if pool[n.image].resolve() != file.resolve()][: query.count]
        chosen = [(file, query.patch), *((pool[n.image], n.patch) for n in found)]
        pictures = [_pixels(opened, load_image(f, spec.image_size, opened.transform)) for f, _ in chosen]
        framed = [enlarge(image) for image in pictures]
        for image, (_, patch) in zip(framed, chosen, strict=True):
            outline(image, (patch // spec.grid[1], patch % spec.grid[1]), spec.grid)
        save_row(folder / f"{name}-neighbours.png", framed)
        described = [
            {
                "name": pool[n.image].name,
                "patch": n.patch,
                "similarity": round(n.similarity, 4),
                "src": picture(image),
            }
            for n, image in zip(found, pictures[1:], strict=True)
        ]
        shown.append({"name": file.name, "src": picture(pictures[0]), "found": described})
    data = {"grid": spec.grid, "size": spec.image_size, "patch": query.patch, "images": shown}
    caption = (
        f"The patches in {query.folder} whose features have the largest cosine similarity with the framed "
        f"patch of each image; at most one for each of {len(pool)} images, without the image itself."
    )
    return render("Nearest patches", [caption], "neighbours.js", data, footer=f"Model: {opened.folder}")
