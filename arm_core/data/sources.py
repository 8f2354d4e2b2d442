"""Where images come from: a source has a length, class names, and gives items by index.

A source does nothing random that (its own seed, epoch, index) does not decide, and it can be pickled:
worker processes each hold a copy.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image

from arm_core.model.rng import KeyedRng

Pixels = npt.NDArray[np.uint8]

UNLABELLED = -1
"""Label of an image whose class is not known."""

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
"""Files that a folder offers as images, in any mixture of capitals."""


@dataclass(frozen=True, kw_only=True)
class Item:
    """One image as its source holds it."""

    image: bytes | Pixels
    """An encoded file, or (H, W, 3) uint8 pixels."""
    label: int
    """Index into the source's `classes`, or `UNLABELLED`."""
    name: str
    """For people: the file, or the set and the number in it."""


class ImageSource(Protocol):
    """Images by number."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in the order of the labels; empty for images without labels."""

    def __len__(self) -> int: ...

    def item(self, index: int, epoch: int = 0) -> Item:
        """Image number `index`; a source that draws its images anew uses `epoch`, others ignore it."""


class ImageFolder:
    """The images under a folder.

    With `labels`, every sub-folder of `root` is a class and holds its images at any depth; `classes`
    fixes the class order (by default the sorted names) and refuses other sub-folders, so that the
    labels of a validation folder mean what those of the training folder mean. Without `labels`, every
    image under `root` counts and none has a class. Hidden files and folders are passed over.

    Raises ValueError for a missing folder, one without images, a class without images, an unknown class.
    """

    def __init__(
        self, root: str | os.PathLike[str], *, labels: bool = True, classes: Sequence[str] | None = None
    ) -> None:
        self._root = Path(root)
        if not self._root.is_dir():
            what = "is a file, not a folder" if self._root.exists() else "no such folder"
            raise ValueError(f"{self._root}: {what}; expected a folder of images")
        if labels:
            self._classes = self._find_classes(classes)
            found = {name: _find_images(self._root, name) for name in self._classes}
            # A class that the caller named may be absent here; a class folder that is here may not be empty.
            empty = [name for name in self._classes if not found[name] and (self._root / name).is_dir()]
            if empty and any(found.values()):
                raise ValueError(f"{self._root / empty[0]}: no images in this class folder ({_looked_for()})")
        else:
            self._classes = ()
            found = {"": _find_images(self._root, "")}
        self._paths = [path for paths in found.values() for path in paths]
        if not self._paths:
            raise ValueError(f"{self._root}: no images found ({_looked_for()})")
        counts = [len(paths) for paths in found.values()]
        self._labels = np.repeat(np.arange(len(counts)) if labels else [UNLABELLED], counts)

    def _find_classes(self, expected: Sequence[str] | None) -> tuple[str, ...]:
        folders = sorted(
            entry.name for entry in self._root.iterdir() if entry.is_dir() and not _hidden(entry.name)
        )
        if not folders:
            raise ValueError(
                f"{self._root}: no class folders; a classifier learns from one sub-folder of images per class"
            )
        splits = {"train", "training", "val", "valid", "validation", "test"}
        if len(folders) > 1 and splits.issuperset(name.lower() for name in folders):
            raise ValueError(
                f"{self._root}: holds the splits {', '.join(folders)}, not classes; "
                f"name one of them, such as {self._root / folders[0]}"
            )
        if expected is None:
            return tuple(folders)
        if unknown := sorted(set(folders) - set(expected)):
            raise ValueError(
                f"{self._root}: class folder {unknown[0]!r} is none of the {len(expected)} known classes "
                f"({', '.join(list(expected)[:5])}{', ...' if len(expected) > 5 else ''})"
            )
        return tuple(expected)

    @property
    def classes(self) -> tuple[str, ...]:
        return self._classes

    def __len__(self) -> int:
        return len(self._paths)

    def item(self, index: int, epoch: int = 0) -> Item:
        """The file's bytes; ValueError names a file that cannot be read."""
        path = self._root / self._paths[index]
        return Item(image=read_file(path), label=int(self._labels[index]), name=str(path))


def read_file(path: Path) -> bytes:
    """The bytes of a file; a ValueError names one that cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error})") from None


def _hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _looked_for() -> str:
    return f"looked for {' '.join(suffix[1:] for suffix in IMAGE_SUFFIXES)}"


def _find_images(root: Path, below: str) -> list[str]:
    """Images under `root/below` at any depth, as sorted paths relative to `root`; links are followed."""
    found: list[str] = []
    for folder, folders, files in os.walk(root / below, followlinks=True):
        folders[:] = [name for name in folders if not _hidden(name)]
        images = [name for name in files if name.lower().endswith(IMAGE_SUFFIXES) and not _hidden(name)]
        if images:
            relative = Path(folder).relative_to(root)
            found += [(relative / name).as_posix() for name in images]
    return sorted(found)


class Synthetic:
    """Soft random colour fields, for benchmarks and tests: image `index` follows from (seed, index)."""

    def __init__(
        self, count: int, image_size: tuple[int, int] = (64, 64), *, classes: int = 10, seed: int = 0
    ) -> None:
        if count < 1 or min(image_size) < 1 or classes < 0:
            raise ValueError(
                f"synthetic images: nothing to make from {count} of size {image_size}, {classes} classes"
            )
        self._count, self._image_size, self._seed = count, image_size, seed
        self._classes = tuple(str(i) for i in range(classes))

    @property
    def classes(self) -> tuple[str, ...]:
        return self._classes

    def __len__(self) -> int:
        return self._count

    def item(self, index: int, epoch: int = 0) -> Item:
        if not 0 <= index < self._count:
            raise IndexError(f"synthetic image {index} of {self._count}")
        coarse = (
            (KeyedRng(self._seed, "synthetic", index).uniform(6 * 6 * 3) * 256)
            .astype(np.uint8)
            .reshape(6, 6, 3)
        )
        height, width = self._image_size
        image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        label = index % len(self._classes) if self._classes else UNLABELLED
        return Item(image=np.asarray(image), label=label, name=f"synthetic image {index}")
