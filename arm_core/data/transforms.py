"""From an encoded image to 8-bit pixels: pure functions of (image, settings, rng).

Pillow resamples (its bicubic filter antialiases, as in the official recipes). The engine normalises, and
pastes the noise that is drawn here for an erased box (`arm_core.engine.byte_images`).
Sizes are (height, width) in pixels; intermediate images are Pillow's, 8-bit RGB.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from arm_core.data.augment import RandAugment, rand_augment
from arm_core.data.decode import Pixels, decode
from arm_core.data.sources import Item
from arm_core.data.walk import read_file
from arm_core.engine.byte_images import Box, ByteImages, Color, FloatArray, Mix, no_noise
from arm_core.model.checks import PART, POSITIVE, Range, check_ranges, shortened
from arm_core.model.rng import KeyedRng

Size = tuple[int, int]

IMAGENET_MEAN: Color = (0.485, 0.456, 0.406)
IMAGENET_STD: Color = (0.229, 0.224, 0.225)

EVAL_FRACTION = 224 / 256
"""Fraction of the resized image that the official evaluation keeps, for sizes up to `EVAL_MARGIN_LIMIT`."""
EVAL_MARGIN_LIMIT = 224
"""Larger sizes are evaluated without a margin."""

MAX_RESIZED = 2**23
"""Largest image, pixels, that is resized before cutting; of larger ones only the centre is computed."""

CROP_TRIES = 10
ERASE_TRIES = 10
ERASE_AREA, ERASE_ASPECT = (0.02, 1 / 3), (0.3, 1 / 0.3)
"""Erased fraction of the image, and its height over width."""


CROP_FRACTIONS = Range(low=0.05, high=1)
"""Fractions of a centre crop; the image is first resized to 1 / fraction of the crop."""


def _check_lengths(owner: str, settings: object, **lengths: int) -> None:
    """Convert lists to tuples; a ValueError names one with a wrong length."""
    for name, length in lengths.items():
        values = tuple(getattr(settings, name))
        if len(values) != length:
            raise ValueError(f"{owner}.{name}: expected {length} numbers, found {shortened(values)}")
        object.__setattr__(settings, name, values)


class Augmented(NamedTuple):
    """A training image before normalisation."""

    pixels: Pixels
    """(H, W, 3) uint8"""
    erased: Box | None
    """The rectangle that `noise` replaces after normalisation."""
    noise: FloatArray
    """(pixels of the rectangle, 3)"""


@dataclass(frozen=True, kw_only=True)
class TrainTransform:
    """Random crop and flip, optional RandAugment, normalisation, and random erasing.

    The defaults are those of official pretraining; `FINETUNE` holds those of finetuning. A
    `crop_scale` and `crop_ratio` of (1, 1) keep a square image whole.
    """

    crop_scale: tuple[float, float] = (0.2, 1.0)
    """Area of the crop, as a fraction of the image."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Width over height of the crop, before it is resized."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    rand_augment: RandAugment | None = None
    """Settings of RandAugment; none for no RandAugment."""
    fast_decode: bool = False
    """Decode JPEG files at the smallest of the scales 1, 1/2, 1/4, 1/8 that covers the crop. Faster for large
    images; the pixels differ a little from those of exact decoding."""
    erase: float = 0.0
    """Probability that a rectangle is replaced by noise."""
    mean: Color = IMAGENET_MEAN
    """Mean of the normalisation, red, green, blue, for values from 0 to 1."""
    std: Color = IMAGENET_STD
    """Standard deviation of the normalisation, red, green, blue."""

    def __post_init__(self) -> None:
        _check_lengths("augmentation", self, crop_scale=2, crop_ratio=2, mean=3, std=3)
        check_ranges(
            "augmentation",
            self,
            crop_scale=Range(above=0, high=1),
            crop_ratio=POSITIVE,
            flip=PART,
            erase=PART,
            mean=PART,
            std=POSITIVE,
        )
        for name in ("crop_scale", "crop_ratio"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"augmentation.{name}: expected the lower limit first, found {low}, {high}")

    def __call__(self, item: Item, size: Size, rng: KeyedRng) -> FloatArray:
        """(H, W, 3) float32, normalised; BadImage names an item that cannot be decoded."""
        image: FloatArray = self.batch([self.augment(item, size, rng)]).normalised()[0]
        return image

    def batch(self, images: Sequence[Augmented], mix: Mix | None = None) -> ByteImages:
        """Images of one size as a batch."""
        erased = [(i, image.erased, image.noise) for i, image in enumerate(images) if image.erased]
        return ByteImages(
            pixels=np.stack([image.pixels for image in images]),
            mean=self.mean,
            std=self.std,
            erased=tuple((i, box) for i, box, _ in erased),
            noise=np.concatenate([no_noise(), *(noise for _, _, noise in erased)]),
            mix=mix or Mix(),
        )

    def augment(self, item: Item, size: Size, rng: KeyedRng, trace: list[str] | None = None) -> Augmented:
        """Apply the random operations; BadImage names an item that cannot be decoded.

        trace: receives a description of each random operation.
        """
        trace = [] if trace is None else trace
        image = self._crop(item, size, rng, trace)
        if rng.chance(self.flip):
            trace.append("flip")
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if self.rand_augment is not None:
            image = rand_augment(image, self.rand_augment, fill=self.mean, rng=rng, trace=trace)
        box, noise = None, no_noise()
        if rng.chance(self.erase):
            box, noise = erased_box(size, rng)
            trace.append("erase")
        return Augmented(np.asarray(image), box, noise)

    def _crop(self, item: Item, size: Size, rng: KeyedRng, trace: list[str]) -> Image.Image:
        drawn: list[tuple[Size, tuple[int, int, int, int]]] = []

        def draw(whole: Size) -> int:
            drawn.append((whole, crop_box(whole, self.crop_scale, self.crop_ratio, rng)))
            _, _, width, height = drawn[0][1]
            return max(k for k in (1, 2, 4, 8) if k == 1 or (width >= k * size[1] and height >= k * size[0]))

        image = decode(item.image, item.name, draw if self.fast_decode else None)
        if not drawn:
            draw((image.height, image.width))
        whole, (left, top, width, height) = drawn[0]
        trace.append(f"crop {width}x{height}+{left}+{top} of {whole[1]}x{whole[0]}")
        if (image.height, image.width) == whole:
            return resized_crop(image, (left, top, left + width, top + height), size)
        x, y = image.width / whole[1], image.height / whole[0]
        right, bottom = min((left + width) * x, image.width), min((top + height) * y, image.height)
        box = (left * x, top * y, right, bottom)
        return image.resize((size[1], size[0]), Image.Resampling.BICUBIC, box=box)


PRETRAIN = TrainTransform()
FINETUNE = TrainTransform(crop_scale=(0.08, 1.0), rand_augment=RandAugment(), erase=0.25)


@dataclass(frozen=True, kw_only=True)
class EvalTransform:
    """Resize, then cut the centre: the official evaluation, without randomness."""

    crop_fraction: float | None = None
    """Side of the centre crop relative to that of the resized image; None for the official rule: 224/256 up
    to 224 pixels, 1 above."""
    mean: Color = IMAGENET_MEAN
    std: Color = IMAGENET_STD

    def __post_init__(self) -> None:
        _check_lengths("eval_transform", self, mean=3, std=3)
        check_ranges("eval_transform", self, crop_fraction=CROP_FRACTIONS, mean=PART, std=POSITIVE)

    def __call__(self, item: Item, size: Size) -> FloatArray:
        """(H, W, 3) float32, normalised; a ValueError names an item that cannot be decoded."""
        image: FloatArray = self.batch(self.crop(item, size)[None]).normalised()[0]
        return image

    def batch(self, pixels: Pixels) -> ByteImages:
        """(B, H, W, 3) cropped images as a batch."""
        return ByteImages(pixels=pixels, mean=self.mean, std=self.std)

    def crop(self, item: Item, size: Size) -> Pixels:
        """(H, W, 3) uint8; a ValueError names an item that cannot be decoded."""
        return np.asarray(center_crop(decode(item.image, item.name), size, self.fraction(size)))

    def fraction(self, size: Size) -> float:
        """Side of the centre crop relative to that of the resized image, for images of this size."""
        if self.crop_fraction is not None:
            return self.crop_fraction
        return EVAL_FRACTION if max(size) <= EVAL_MARGIN_LIMIT else 1.0


def random_resized_crop(
    image: Image.Image, size: Size, scale: tuple[float, float], ratio: tuple[float, float], rng: KeyedRng
) -> Image.Image:
    """Cut a random rectangle and resize it (bicubic); the crop of Inception and of torchvision.

    The area is uniform in `scale` and width / height log-uniform in `ratio`. If ten draws do not fit
    into the image, the largest centred rectangle with an allowed ratio is used.
    """
    left, top, width, height = crop_box((image.height, image.width), scale, ratio, rng)
    return resized_crop(image, (left, top, left + width, top + height), size)


def resized_crop(image: Image.Image, box: tuple[int, int, int, int], size: Size) -> Image.Image:
    """The part within `box` (left, top, right, bottom), resized separately (bicubic)."""
    return image.crop(box).resize((size[1], size[0]), Image.Resampling.BICUBIC)


def crop_box(
    image_size: Size, scale: tuple[float, float], ratio: tuple[float, float], rng: KeyedRng
) -> tuple[int, int, int, int]:
    """Left, top, width, height of a random crop, pixels."""
    image_height, image_width = image_size
    for _ in range(CROP_TRIES):
        area = rng.between(*scale) * image_height * image_width
        aspect = math.exp(rng.between(math.log(ratio[0]), math.log(ratio[1])))
        width, height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < width <= image_width and 0 < height <= image_height:
            return rng.below(image_width - width + 1), rng.below(image_height - height + 1), width, height
    aspect = min(max(image_width / image_height, ratio[0]), ratio[1])
    width = min(image_width, max(1, round(image_height * aspect)))
    height = min(image_height, max(1, round(image_width / aspect)))
    return (image_width - width) // 2, (image_height - height) // 2, width, height


def center_crop(image: Image.Image, size: Size, fraction: float) -> Image.Image:
    """Resize (bicubic) until the image just covers `size / fraction`, then cut `size` from its centre."""
    height, width = int(size[0] / fraction), int(size[1] / fraction)
    if image.width * height >= image.height * width:  # the height limits the scale
        width = image.width * height // image.height
    else:
        height = image.height * width // image.width
    left, top = round((width - size[1]) / 2), round((height - size[0]) / 2)
    right, bottom = left + size[1], top + size[0]
    if width * height <= MAX_RESIZED:
        resized = image.resize((width, height), Image.Resampling.BICUBIC)
        return resized.crop((left, top, right, bottom))
    # The same resampling, only of the centre; not used always, since coefficients can round differently.
    x, y = image.width / width, image.height / height
    box = (left * x, top * y, right * x, bottom * y)
    return image.resize((size[1], size[0]), Image.Resampling.BICUBIC, box=box)


def denormalize(
    pixels: npt.NDArray[np.floating], mean: Color = IMAGENET_MEAN, std: Color = IMAGENET_STD
) -> Pixels:
    """Undo the normalisation for pictures: (..., 3) normalised values to (..., 3) uint8, clipped."""
    values = np.round((pixels * np.array(std) + np.array(mean)) * 255)
    return np.asarray(np.clip(values, 0, 255), np.uint8)


def erased_box(size: Size, rng: KeyedRng) -> tuple[Box | None, FloatArray]:
    """A random rectangle of an image of `size`, and its (pixels, 3) standard normal noise.

    None, without noise, if ten draws do not fit into the image.
    """
    image_height, image_width = size
    for _ in range(ERASE_TRIES):
        area = rng.between(*ERASE_AREA) * image_height * image_width
        aspect = math.exp(rng.between(math.log(ERASE_ASPECT[0]), math.log(ERASE_ASPECT[1])))
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if height < image_height and width < image_width:
            top, left = rng.below(image_height - height + 1), rng.below(image_width - width + 1)
            box = Box(top, top + height, left, left + width)
            return box, rng.normal(3 * box.pixels).astype(np.float32).reshape(-1, 3)
    return None, no_noise()


def load_image(
    path: str | os.PathLike[str], size: Size, transform: EvalTransform | None = None
) -> FloatArray:
    """One image file, prepared for a model: (H, W, 3) float32, by default with the official evaluation.

    Raises ValueError, which names the file, if it is missing, unreadable or broken.
    """
    item = Item(image=read_file(Path(path)), label=-1, name=str(path))
    return (transform or EvalTransform())(item, size)
