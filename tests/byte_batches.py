"""A batch of bytes with everything that an engine does to one, and its values computed by hand."""

import numpy as np

from arm_core.data import IMAGENET_MEAN, IMAGENET_STD
from arm_core.engine.byte_images import Box, ByteImages, Mix

MIXES = {
    "plain": Mix(),
    "mixup": Mix(weight=0.7234567),
    "cutmix": Mix(weight=0.9, box=Box(3, 9, 0, 24)),
}


def byte_images(mix: Mix, *, count: int = 5, size: tuple[int, int] = (24, 24)) -> ByteImages:
    """Every value of a byte, two erased boxes in one image, one of them over the other."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (count, *size, 3), np.uint8)
    pixels[0] = np.arange(size[0] * size[1] * 3).reshape(*size, 3) % 256
    erased = ((1, Box(0, 5, 20, 24)), (3, Box(2, 12, 1, 20)), (3, Box(4, 8, 10, 24)))
    noise = rng.standard_normal((sum(box.pixels for _, box in erased), 3)).astype(np.float32)
    return ByteImages(
        pixels=pixels, mean=IMAGENET_MEAN, std=IMAGENET_STD, erased=erased, noise=noise, mix=mix
    )


def by_hand(images: ByteImages) -> np.ndarray:
    """Pixel by pixel, in float32."""
    mean, std = (np.array(color, np.float32) for color in (images.mean, images.std))
    values = np.stack([(image.astype(np.float32) / np.float32(255) - mean) / std for image in images.pixels])
    at = 0
    for image, (top, bottom, left, right) in images.erased:
        for y in range(top, bottom):
            for x in range(left, right):
                values[image, y, x] = images.noise[at]
                at += 1
    mixed = values.copy()
    weight = np.float32(images.mix.weight)
    for i in range(len(values)):
        partner = values[len(values) - 1 - i]
        if images.mix.box is not None:
            top, bottom, left, right = images.mix.box
            mixed[i, top:bottom, left:right] = partner[top:bottom, left:right]
        elif weight != 1:
            mixed[i] = values[i] * weight + partner * (np.float32(1) - weight)
    return mixed
