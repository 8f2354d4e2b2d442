"""Arrays in and out of files: images as .npy, outputs of a model as .npz."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]

BATCHED = ("features", "logits", "encoder", "prediction")
"""Outputs with a row for each image; the others are means over the images."""


def read_array(name: str, size: tuple[int, int], channels: int) -> Array:
    """Normalised images (B, 3, H, W) float32 from a .npy file, as (B, H, W, 3); a ValueError names it."""
    try:
        with Path(name).open("rb") as file:
            array = np.load(file, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{name}: cannot be read as a .npy file ({error})") from None
    expected = f"expected float32 (images, {channels}, {size[0]}, {size[1]})"
    if not isinstance(array, np.ndarray):
        raise ValueError(f"{name}: {expected} in a .npy file, found an .npz archive; save the array alone")
    if array.dtype != np.float32 or array.ndim != 4 or array.shape[1:] != (channels, *size) or not len(array):
        raise ValueError(f"{name}: {expected}, found {array.dtype} {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"{name}: holds values that are not finite")
    return np.ascontiguousarray(array.transpose(0, 2, 3, 1))


def join(results: list[tuple[int, dict[str, Array]]]) -> dict[str, npt.NDArray[Any]]:
    """Outputs of several batches as those of one: rows joined, means weighted by the images."""
    counts = np.array([count for count, _ in results], np.float64)
    joined: dict[str, npt.NDArray[Any]] = {}
    for name in results[0][1]:
        values = [outputs[name] for _, outputs in results]
        if name in BATCHED:
            joined[name] = np.concatenate(values)
        else:
            joined[name] = np.average(np.stack(values), axis=0, weights=counts).astype(np.float32)
    return joined


def write_npz(path: Path, arrays: dict[str, npt.NDArray[Any]]) -> None:
    """Write atomically, under the exact name."""
    from arm_core.files.atomic import create_file, new_file

    with new_file(path, force=True) as draft, create_file(draft) as file:
        np.savez(file, allow_pickle=False, **arrays)
