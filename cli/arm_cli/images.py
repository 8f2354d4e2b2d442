"""Images named on the command line, in preprocessed batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from glob import glob
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from arm_cli.opening import Opened
    from arm_core.engine.protocol import Array


def image_files(names: Sequence[str]) -> list[Path]:
    """The named files, the files that match a pattern, and all images in a folder at any depth.

    Raises ValueError if there are none.
    """
    from arm_core.data.walk import find_images, looked_for

    files: list[Path] = []
    for name in names:
        path = Path(name)
        if path.is_dir():
            found = find_images(path)
            found.warn(path)
            if not found.images:
                raise ValueError(f"{name}: no images in this folder ({looked_for()})")
            files += [path / image for image in found.images]
        elif path.exists():
            files.append(path)
        elif any(mark in name for mark in "*?["):  # a pattern that no shell has expanded
            matches = glob(name, recursive=True)  # noqa: PTH207 (takes absolute patterns)
            matching = sorted(Path(match) for match in matches if Path(match).is_file())
            if not matching:
                raise ValueError(f"{name}: no file matches this pattern")
            files += matching
        else:
            raise ValueError(f"{name}: no such image or folder")
    return files


def image_batches(files: Sequence[Path], model: Opened, batch_size: int) -> Iterator[Array]:
    """(B, H, W, 3) float32, preprocessed for the model; a ValueError names a broken file."""
    from arm_core.data.transforms import load_image

    for start in range(0, len(files), batch_size):
        part = files[start : start + batch_size]
        yield np.stack([load_image(file, model.spec.image_size, model.transform) for file in part])
