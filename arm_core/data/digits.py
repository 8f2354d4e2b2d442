"""The built-in data set: handwritten digits, drawn differently on each visit.

1797 digits of 8x8 pixels (source and licence: `assets/README.md`). A visit places a digit on a
larger canvas with a small affine distortion, in dark ink on light or light on dark, over a soft gradient.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from importlib import resources

import numpy as np
import numpy.typing as npt
from PIL import Image

from arm_core.data.decode import Pixels
from arm_core.data.sources import Item
from arm_core.model.rng import KeyedRng

INK = 16
"""Largest value of the stored digits."""

ROTATION, SHEAR = 15.0, 0.15
"""Largest distortion in either direction: degrees and slope."""
BACKGROUND, CONTRAST, GRADIENT = (0.15, 0.35), (0.45, 0.65), 0.1
"""Grey of the background (mirrored for dark ink), ink against it, and its largest slope per half canvas."""

SPLIT_SEED = 0
"""Assigns digits to splits; results before and after a change are not comparable."""
HELD_OUT = {"test": 40, "validation": 30}
"""Digits per class in the validation and test splits."""


@dataclass(frozen=True, kw_only=True)
class Placing:
    """Where a digit is on the canvas."""

    shift: float
    """Largest shift in either direction, as a fraction of the canvas's shorter side."""
    scale: tuple[float, float]
    """Side of the 8x8 square, as a fraction of the canvas."""


PLACINGS = {
    "digits": Placing(shift=0.08, scale=(0.75, 0.95)),
    "varied-digits": Placing(shift=0.12, scale=(0.6, 0.95)),
}
"""By the name of the data set. At more varied sizes and places, comparing pixels is of less help."""


class Split(StrEnum):
    """Parts of the set, which do not overlap."""

    TRAIN = "train"
    VALIDATION = "validation"
    TEST = "test"


class Digits:
    """One split: 1097 digits to train on, 300 for validation, 400 for the test, both balanced.

    split:  `train`, `validation` or `test`.
    size:   height and width of the canvas, pixels.
    seed:   determines the distortions of the training split (by epoch and index) and the digits that
            `labels_per_class` keeps. Validation and test are the same for every seed and epoch.
    labels_per_class:  number of training digits to keep per class; a smaller choice is part of a larger one.
    name:  `digits` or `varied-digits`, see `PLACINGS`.

    Items are (H, W, 3) grey pixels. Raises ValueError for an unknown split and a choice out of range.
    """

    def __init__(
        self,
        split: str = "train",
        *,
        size: tuple[int, int] = (24, 24),
        seed: int = 0,
        labels_per_class: int | None = None,
        name: str = "digits",
    ) -> None:
        if split not in tuple(Split):
            raise ValueError(f"digits: split must be one of {', '.join(Split)}, found {split!r}")
        if min(size) < 8:
            raise ValueError(f"digits: the canvas must be 8x8 pixels or larger, found {size[0]}x{size[1]}")
        self._split, self._size, self._seed = Split(split), size, seed
        self._placing = PLACINGS[name]
        self._members = split_members(self._split)
        if labels_per_class is not None:
            if self._split is not Split.TRAIN:
                raise ValueError(f"digits: labels_per_class selects training digits, the split is {split!r}")
            self._members = _select(self._members, labels_per_class, seed)

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple("0123456789")

    def __len__(self) -> int:
        return len(self._members)

    @property
    def members(self) -> npt.NDArray[np.int64]:
        """Indices of this split's digits in the whole set, `(len,)`."""
        return self._members

    def item(self, index: int, epoch: int = 0) -> Item:
        images, labels = load_digits()
        member = int(self._members[index])
        if self._split is Split.TRAIN:
            rng = KeyedRng(self._seed, "digits", epoch, member)
        else:
            rng = KeyedRng(SPLIT_SEED, f"digits/{self._split}", member)
        image = draw_digit(images[member], self._size, rng, self._placing)
        return Item(image=image, label=int(labels[member]), name=f"digit {member} ({self._split})")


@lru_cache(maxsize=1)
def load_digits() -> tuple[Pixels, npt.NDArray[np.uint8]]:
    """The whole set as stored: images (1797, 8, 8) with ink 0..16, labels (1797,)."""
    with (
        resources.files("arm_core.data").joinpath("assets/digits.npz").open("rb") as file,
        np.load(file) as data,
    ):
        return data["images"], data["labels"]


def split_members(split: Split) -> npt.NDArray[np.int64]:
    """Indices of the digits in a split, ascending."""
    labels = load_digits()[1]
    parts: dict[Split, list[npt.NDArray[np.int64]]] = {s: [] for s in Split}
    for digit in range(10):
        members = np.flatnonzero(labels == digit)
        members = members[KeyedRng(SPLIT_SEED, "digits/split", digit).permutation(len(members))]
        test, validation = HELD_OUT["test"], HELD_OUT["validation"]
        parts[Split.TEST].append(members[:test])
        parts[Split.VALIDATION].append(members[test : test + validation])
        parts[Split.TRAIN].append(members[test + validation :])
    return np.sort(np.concatenate(parts[split]))


def _select(members: npt.NDArray[np.int64], per_class: int, seed: int) -> npt.NDArray[np.int64]:
    """`per_class` of the digits of each class, by seed; ascending."""
    labels = load_digits()[1][members]
    fewest = int(np.bincount(labels).min())
    if not 1 <= per_class <= fewest:
        raise ValueError(f"digits: labels_per_class must be 1 to {fewest}, found {per_class}")
    chosen = []
    for digit in range(10):
        group = members[labels == digit]
        chosen.append(group[KeyedRng(seed, "digits/labels", digit).permutation(len(group))[:per_class]])
    return np.sort(np.concatenate(chosen))


def draw_digit(
    digit: Pixels, size: tuple[int, int], rng: KeyedRng, placing: Placing = PLACINGS["digits"]
) -> Pixels:
    """Draw an (8, 8) digit on a canvas: (H, W, 3) uint8 grey pixels."""
    numbers = iter(rng.uniform(10).tolist())

    def between(low: float, high: float) -> float:
        return low + (high - low) * float(next(numbers))

    shift = placing.shift
    angle, shear = math.radians(between(-ROTATION, ROTATION)), between(-SHEAR, SHEAR)
    scale, down, right = between(*placing.scale), between(-shift, shift), between(-shift, shift)
    dark_ink = between(0, 1) < 0.5
    background, contrast = between(*BACKGROUND), between(*CONTRAST)
    slope_y, slope_x = between(-GRADIENT, GRADIENT), between(-GRADIENT, GRADIENT)

    # Canvas point -> point of the 8x8 square, both measured from their centre: undo shift, turn, shear.
    (height, width), (rows, columns), side = size, digit.shape, min(size)
    per_pixel = columns / (scale * side)
    a, b = math.cos(angle) * per_pixel, (math.sin(angle) + shear) * per_pixel
    d, e = -math.sin(angle) * per_pixel, math.cos(angle) * per_pixel
    center_x, center_y = width / 2 + right * side, height / 2 + down * side
    c, f = columns / 2 - a * center_x - b * center_y, rows / 2 - d * center_x - e * center_y
    ink = Image.fromarray(digit * np.uint8(255 // INK)).transform(
        (width, height), Image.Transform.AFFINE, (a, b, c, d, e, f), Image.Resampling.BICUBIC, fillcolor=0
    )
    # The gradient runs from -slope to slope over each side.
    grey = np.asarray(ink, np.float32) * (contrast / (255 // INK * INK))
    grey += (np.arange(height, dtype=np.float32) * (2 * slope_y / (height - 1)) + (background - slope_y))[
        :, None
    ]
    grey += np.arange(width, dtype=np.float32) * (2 * slope_x / (width - 1)) - slope_x
    if dark_ink:
        grey = 1 - grey
    values = (np.clip(grey, 0, 1) * 255 + 0.5).astype(np.uint8)
    return np.repeat(values[:, :, None], 3, axis=2)
