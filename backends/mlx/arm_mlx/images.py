"""From 8-bit images to the values that the model reads, on the device.

The operations of `arm_core.engine.byte_images.ByteImages`, in the same order and with the same bits. They are
not compiled: a compiler can merge a product and a sum, which rounds differently.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from arm_core.engine.byte_images import ByteImages, Mix


def prepare(images: ByteImages) -> mx.array:
    """(B, H, W, 3) float32."""
    pixels = mx.array(np.ascontiguousarray(images.pixels)).astype(mx.float32)
    scale, mean, std = mx.array(images.constants)
    pixels = ((pixels.reshape(-1, len(scale)) / scale - mean) / std).reshape(images.shape)
    if images.erased:
        noise = mx.array(images.noise)
        for image, box, part in images.pasted():
            patch = noise[part].reshape(box.bottom - box.top, box.right - box.left, 3)
            pixels[image, box.top : box.bottom, box.left : box.right] = patch
    return _mixed(pixels, images.mix)


def _mixed(images: mx.array, mix: Mix) -> mx.array:
    if mix.weight == 1.0:
        return images
    if mix.box is None:
        weight = np.float32(mix.weight)
        own, other = mx.array(np.array([weight, np.float32(1) - weight]))
        return images * own + images[::-1] * other
    top, bottom, left, right = mix.box
    images[:, top:bottom, left:right] = images[::-1, top:bottom, left:right]
    return images
