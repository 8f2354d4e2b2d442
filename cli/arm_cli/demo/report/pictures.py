"""The predictions of a pretraining model, as pictures."""

from __future__ import annotations

import base64
import io

import numpy as np
import numpy.typing as npt
from PIL import Image

from arm_core.explain.completion import fold_patches, restore
from arm_core.model.reference.model import unfold_patches
from arm_core.model.spec import PretrainSpec
from arm_core.model.tokens import patch_order, target_patches

Floats = npt.NDArray[np.floating]


def predicted_images(spec: PretrainSpec, images: Floats, prediction: Floats) -> Floats:
    """The images with every predicted patch in its place, (B, H, W, C), normalised like the input.

    images: (B, H, W, C).  prediction: (B, tokens, patch values), as `Engine.forward` returns it.
    Each cluster was predicted from the true clusters before it. If the target is normalised, the
    true mean and deviation of each patch are restored: the model does not predict them. The first
    cluster in prediction order is given and is not changed.
    """
    patches = unfold_patches(images, spec.encoder.patch)
    places = target_patches(spec)
    patches[:, places] = restore(spec, prediction, patches[:, places])
    return fold_patches(patches, spec.grid, spec.encoder.patch)


def dim_given(spec: PretrainSpec, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Mark the given cluster by fading it to white. pixels: (B, H, W, 3)."""
    patches = unfold_patches(pixels, spec.encoder.patch)
    given = patch_order(spec)[: spec.patches_per_cluster]
    patches[:, given] = 0.45 * patches[:, given] + 0.55 * 255.0
    return fold_patches(patches, spec.grid, spec.encoder.patch).round().astype(np.uint8)


def data_uri(pixels: npt.NDArray[np.uint8]) -> str:
    """An (H, W, 3) picture as a PNG data URI."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
