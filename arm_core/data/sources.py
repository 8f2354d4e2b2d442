"""Sources of images: a source has a length, class names, and items by index.

Items of a source depend only on (its seed, epoch, index), and several threads may read items at the same
time.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image

from arm_core.data.decode import Pixels
from arm_core.model.rng import KeyedRng

UNLABELLED = -1
"""Label of an image whose class is not known."""


@dataclass(frozen=True, kw_only=True)
class Item:
    """One image of a source."""

    image: bytes | Pixels
    """An encoded file, or (H, W, 3) uint8 pixels."""
    label: int
    """Index into the source's `classes`, or `UNLABELLED`."""
    name: str
    """Human-readable: the file, or the set and the index in it."""


class ImageSource(Protocol):
    """Images by index."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in the order of the labels; empty for images without labels."""

    def __len__(self) -> int: ...

    def item(self, index: int, epoch: int = 0) -> Item:
        """Image number `index`; sources that redraw images in each epoch use `epoch`, others ignore it."""


class ListedSource(ABC):
    """A source that knows the label and the name of every image without reading it.

    labels: (images,) indices into `classes`, or `UNLABELLED`.  names: relative names, which do
    not depend on the location; they identify the images (`arm_core.data.identity`).  groups: the group of
    each image; a group is not split between training and validation. None if there are no groups.
    """

    def __init__(
        self,
        names: Sequence[str],
        labels: npt.NDArray[np.int64],
        classes: Sequence[str],
        *,
        groups: Sequence[str] | None = None,
    ) -> None:
        self.names, self.labels, self.groups = names, labels, groups
        self._classes = tuple(classes)

    @property
    def classes(self) -> tuple[str, ...]:
        return self._classes

    def __len__(self) -> int:
        return len(self.names)

    def item(self, index: int, epoch: int = 0) -> Item:
        """The image as it is stored; a ValueError names one that cannot be read."""
        return Item(image=self.read(index), label=int(self.labels[index]), name=self.where(index))

    @abstractmethod
    def read(self, index: int) -> bytes:
        """The encoded image."""

    def where(self, index: int) -> str:
        """Human-readable: the image's file, or its position in one."""
        return self.names[index]


class Synthetic:
    """Soft random colour fields, for benchmarks and tests: image `index` depends on (seed, index)."""

    def __init__(
        self, count: int, image_size: tuple[int, int] = (64, 64), *, classes: int = 10, seed: int = 0
    ) -> None:
        if count < 1 or min(image_size) < 1 or classes < 0:
            raise ValueError(
                f"synthetic images: expected 1 or more, found {count} of size {image_size}, {classes} classes"
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
