"""Bicubic interpolation of position tables: `torch.nn.functional.interpolate`, align_corners=False."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

A = -0.75
"""Sharpness of the cubic kernel (Keys 1981), the same as in torch."""


def interpolation_matrix(size: int, new_size: int) -> npt.NDArray[np.float64]:
    """(new_size, size) weights that interpolate a line: cubic, no antialiasing, edges repeated.

    Pixel centres are at i + 1/2 of their own grid, so point i of the new line lies at
    (i + 1/2) size / new_size - 1/2 of the old one.
    """
    place = (np.arange(new_size) + 0.5) * (size / new_size) - 0.5
    left = np.floor(place).astype(int)
    matrix = np.zeros((new_size, size))
    for offset in (-1, 0, 1, 2):
        weight = cubic(place - (left + offset))
        np.add.at(matrix, (np.arange(new_size), np.clip(left + offset, 0, size - 1)), weight)
    return matrix


def cubic(distance: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The kernel at a distance in pixels; 0 beyond two."""
    x = np.abs(distance)
    near = (A + 2) * x**3 - (A + 3) * x**2 + 1
    far = A * x**3 - 5 * A * x**2 + 8 * A * x - 4 * A
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


def resize_table(
    table: npt.NDArray[np.float32], grid: tuple[int, int], new_grid: tuple[int, int]
) -> npt.NDArray[np.float32]:
    """A table of positions (rows * columns, D) for another grid, computed in float64."""
    if grid == new_grid:
        return table
    rows, columns = (interpolation_matrix(a, b) for a, b in zip(grid, new_grid, strict=True))
    values = table.reshape(*grid, -1).astype(np.float64)
    resized = np.einsum("ra,cb,abd->rcd", rows, columns, values, optimize=True)
    return np.asarray(resized.reshape(new_grid[0] * new_grid[1], -1), np.float32)
