"""PNG files: heat maps over images, rows of pictures, and their names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

Pixels = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.floating]

MORE, LESS = (214, 74, 10), (22, 93, 214)
"""Colours of positive and negative influence; the same as in page.css."""
MARK = (11, 107, 58)
GAP = 4
"""White pixels between pictures of a row."""
SMALLEST = 192
"""Pictures smaller than this are enlarged by an integer factor, pixels."""


def ready_folder(name: str) -> Path:
    """The folder, created if it does not exist."""
    folder = Path(name)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{name}: expected a folder, found a file")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def stems(files: Sequence[Path]) -> list[str]:
    """A file name without suffix for each image; repeated names get a number."""
    seen: dict[str, int] = {}
    names = []
    for file in files:
        seen[file.stem] = seen.get(file.stem, 0) + 1
        names.append(file.stem if seen[file.stem] == 1 else f"{file.stem}-{seen[file.stem]}")
    return names


def overlay(pixels: Pixels, values: Floats, *, marked: tuple[int, int] | None = None) -> Pixels:
    """An image in grey under its influence map: positive values are orange, negative blue, NaN grey.

    pixels: (H, W, 3).  values: (rows, columns); the colour is proportional to their size.  marked: a patch to
    outline. Returns (H, W, 3), enlarged by `enlarge`.
    """
    pixels = enlarge(pixels)
    rows, columns = values.shape
    patch = np.array(pixels.shape[:2]) // values.shape
    size = np.nan_to_num(np.abs(values))
    alpha = 0.9 * size / size.max() if size.max() > 0 else size
    alpha = np.kron(alpha, np.ones(patch))[..., None]
    color = np.where((np.nan_to_num(values) >= 0)[..., None], MORE, LESS)
    color = color.repeat(patch[0], axis=0).repeat(patch[1], axis=1)
    grey = pixels.mean(-1, keepdims=True)
    out = np.asarray(np.round((1 - alpha) * grey + alpha * color), np.uint8)
    if marked is not None:
        outline(out, marked, (rows, columns))
    return out


def outline(pixels: Pixels, patch: tuple[int, int], grid: tuple[int, int]) -> None:
    """Draw a frame inside a patch, in place; the patch has 5 pixels or more."""
    height, width = pixels.shape[0] // grid[0], pixels.shape[1] // grid[1]
    cut = pixels[patch[0] * height : (patch[0] + 1) * height, patch[1] * width : (patch[1] + 1) * width]
    line = max(1, min(height, width) // 16)
    for depth in range(2 * line):
        for edge in (np.s_[depth], np.s_[-1 - depth], np.s_[:, depth], np.s_[:, -1 - depth]):
            cut[edge] = (255, 255, 255) if depth < line else MARK


def enlarge(pixels: Pixels) -> Pixels:
    """The image with each pixel repeated until its larger side has `SMALLEST` pixels or more."""
    factor = -(-SMALLEST // max(pixels.shape[:2]))
    return np.asarray(pixels.repeat(factor, axis=0).repeat(factor, axis=1))


def save_row(path: Path, pictures: Sequence[Pixels]) -> None:
    """Pictures of the same height next to each other, as a PNG."""
    enlarged = [enlarge(pixels) for pixels in pictures]
    gap = np.full((enlarged[0].shape[0], GAP, 3), 255, np.uint8)
    parts = [part for pixels in enlarged for part in (gap, pixels)][1:]
    Image.fromarray(np.concatenate(parts, axis=1)).save(path, optimize=True)
