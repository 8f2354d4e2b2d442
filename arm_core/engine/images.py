"""Checks of the images passed to a library model, with the same messages in every engine."""

from __future__ import annotations

from dataclasses import replace

from arm_core.model.spec import ModelSpec

UNNORMALIZED = 16.0
"""Largest absolute value of normalized images that raises no warning; ImageNet's lie within 2.7."""


def spec_for_images(
    spec: ModelSpec, shape: tuple[int, ...], *, channels_last: bool, dynamic: bool
) -> ModelSpec:
    """The spec with the image size of a batch; `spec` itself if the size is the model's.

    shape: of the batch, (B, C, H, W) or with `channels_last` (B, H, W, C).
    dynamic: whether sizes other than the model's are allowed.
    Raises ValueError on a wrong number of axes or channels, and on a size that the model does not take.
    """
    channels = spec.encoder.channels
    height, width = spec.image_size
    layout, other = ("NHWC", "NCHW") if channels_last else ("NCHW", "NHWC")
    sizes = f"(B, {height}, {width}, {channels})" if channels_last else f"(B, {channels}, {height}, {width})"
    if len(shape) != 4:
        raise ValueError(f"images: expected 4 axes {layout} {sizes}, found {len(shape)} axes {shape}")
    found, swapped = (shape[3], shape[1]) if channels_last else (shape[1], shape[3])
    if found != channels:
        swap = "(0, 2, 3, 1)" if channels_last else "(0, 3, 1, 2)"
        hint = f"; the layout looks like {other}: permute the axes by {swap}" if swapped == channels else ""
        raise ValueError(f"images: expected {layout} {sizes}, found {shape}: {found} channels{hint}")
    size = (shape[1], shape[2]) if channels_last else (shape[2], shape[3])
    if size == spec.image_size:
        return spec
    if not dynamic:
        raise ValueError(
            f"images: expected {height}x{width} pixels, found {size[0]}x{size[1]}; resize the images, or "
            f"load the model with image_size=({size[0]}, {size[1]}) or dynamic_image_size=True"
        )
    return replace(spec, image_size=size)
