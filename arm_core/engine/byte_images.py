"""8-bit images with what an engine does to them on its device: normalise, paste erased boxes, mix.

A batch travels as bytes, a quarter of the size of float32. Both engines compute the same float32 operations
in the same order as the reference, `ByteImages.normalised`, and get the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Self

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]
Color = tuple[float, float, float]


class Box(NamedTuple):
    """A rectangle of pixels; `bottom` and `right` are exclusive."""

    top: int
    bottom: int
    left: int
    right: int

    @property
    def pixels(self) -> int:
        return (self.bottom - self.top) * (self.right - self.left)


@dataclass(frozen=True, kw_only=True)
class Mix:
    """The mixing of one batch; image b is mixed with image B - 1 - b."""

    weight: float = 1.0
    """Weight of each image (and of its target); its partner has the rest."""
    box: Box | None = None
    """The rectangle that CutMix pastes; None blends whole images."""


def no_noise() -> FloatArray:
    return np.empty((0, 3), np.float32)


@dataclass(frozen=True, kw_only=True)
class ByteImages:
    """A batch of images as bytes. `np.asarray` gives `normalised()`."""

    pixels: npt.NDArray[np.uint8]
    """(B, H, W, 3)"""
    mean: Color
    """Mean of the normalisation, red, green, blue, for values from 0 to 1."""
    std: Color
    """Standard deviation of the normalisation, red, green, blue."""
    erased: tuple[tuple[int, Box], ...] = ()
    """Erased rectangles: the number of the image and the box."""
    noise: FloatArray = field(default_factory=no_noise)
    """(pixels of all erased boxes, 3) normalised values of the boxes, row by row, box after box."""
    mix: Mix = Mix()

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def shape(self) -> tuple[int, ...]:
        """(B, H, W, 3)"""
        return self.pixels.shape

    @property
    def constants(self) -> FloatArray:
        """(3, W * 3): 255, the mean and the deviation for each value of a row of pixels.

        Whole rows are several times faster than colour by colour.
        """
        row = [np.tile(np.array(color, np.float32), self.shape[2]) for color in (self.mean, self.std)]
        return np.stack([np.full_like(row[0], 255), *row])

    def pasted(self) -> Iterator[tuple[int, Box, slice]]:
        """Each erased box: the image, the box, and its rows of `noise`."""
        start = 0
        for image, box in self.erased:
            yield image, box, slice(start, start + box.pixels)
            start += box.pixels

    def flipped(self) -> Self:
        """The mirror images, left to right; only for images without erased boxes and mixing."""
        assert not self.erased
        assert self.mix == Mix()
        return replace(self, pixels=self.pixels[:, :, ::-1])

    def __array__(
        self, dtype: npt.DTypeLike | None = None, copy: bool | None = None
    ) -> npt.NDArray[np.generic]:
        if copy is False:
            raise ValueError("the float32 values of ByteImages are computed, so they need a copy")
        images = self.normalised()
        return images if dtype is None else images.astype(dtype, copy=False)

    def normalised(self) -> FloatArray:
        """The (B, H, W, 3) values that a model reads: normalised, with erased boxes, mixed."""
        images: FloatArray = self.pixels.astype(np.float32)
        rows = images.reshape(-1, self.shape[2] * 3)
        scale, mean, std = self.constants
        rows /= scale
        rows -= mean
        rows /= std
        for image, box, part in self.pasted():
            target = images[image, box.top : box.bottom, box.left : box.right]
            target[:] = self.noise[part].reshape(target.shape)
        return mix_images(images, self.mix)


def mix_images(images: FloatArray, mix: Mix) -> FloatArray:
    """(B, H, W, 3) images, each mixed with its partner; the input is not changed."""
    if mix.weight == 1.0:
        return images
    if mix.box is None:
        weight = np.float32(mix.weight)
        return images * weight + images[::-1] * (np.float32(1) - weight)
    top, bottom, left, right = mix.box
    mixed = images.copy()
    mixed[:, top:bottom, left:right] = images[::-1, top:bottom, left:right]
    return mixed
