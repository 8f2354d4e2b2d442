"""From 8-bit images to the values that the model reads, on the device.

The operations of `arm_core.engine.byte_images.ByteImages`, in the same order and with the same bits.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from arm_core.engine.byte_images import ByteImages, Mix


@torch.no_grad()
def prepare(images: ByteImages, put: Callable[[npt.NDArray[np.generic]], Tensor]) -> Tensor:
    """(B, H, W, 3) float32.  put: copies an array to the device."""
    pixels = put(images.pixels).float()
    # Tensors on the device, since CUDA multiplies by the rounded reciprocal of a number from the host.
    scale, mean, std = put(images.constants)
    pixels.view(-1, len(scale)).div_(scale).sub_(mean).div_(std)
    if images.erased:
        noise = put(images.noise)
        for image, box, part in images.pasted():
            target = pixels[image, box.top : box.bottom, box.left : box.right]
            target.copy_(noise[part].view(target.shape))
    return _mixed(pixels, images.mix)


def _mixed(images: Tensor, mix: Mix) -> Tensor:
    if mix.weight == 1.0:
        return images
    if mix.box is None:
        weight = np.float32(mix.weight)
        partners = images.flip(0).mul_(float(np.float32(1) - weight))
        return images.mul_(float(weight)).add_(partners)
    top, bottom, left, right = mix.box
    images[:, top:bottom, left:right] = images[:, top:bottom, left:right].flip(0)
    return images
