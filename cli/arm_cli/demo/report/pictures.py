"""Pictures of what a pretraining model predicts: in grey, enlarged, with numbered clusters."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from arm_core.explain.completion import fold_patches, restore
from arm_core.model.reference.model import unfold_patches
from arm_core.model.spec import PretrainSpec
from arm_core.model.tokens import patch_order, target_patches

Floats = npt.NDArray[np.floating]

Grey = npt.NDArray[np.uint8]
"""(H, W)."""

FACTOR = 6
"""Enlargement of digits."""
LINE, MARK, BLANK = (150, 160, 190), (224, 96, 16), (238, 239, 244)
"""Colours of borders and numbers, of the cluster that is predicted, and of clusters that are not seen yet."""
FRAME_MS, LAST_MS = 700, 2200
"""Duration of a frame of the animation, and of its last one."""


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


def grey(pixels: npt.NDArray[np.uint8]) -> Grey:
    """(..., 3) colours to their mean: the digits are grey, and a predicted tint would look like damage."""
    return np.asarray(pixels.astype(np.float32).mean(-1).round(), np.uint8)


def cluster_boxes(spec: PretrainSpec) -> list[tuple[int, int, int, int]]:
    """Left, top, right and bottom of each cluster in the order of prediction, pixels; ends excluded."""
    patch, columns = spec.encoder.patch, spec.grid[1]
    boxes = []
    for patches in patch_order(spec).reshape(spec.clusters, -1):
        rows, cols = np.divmod(patches, columns)
        boxes.append(tuple(int(v) * patch for v in (cols.min(), rows.min(), cols.max() + 1, rows.max() + 1)))
    return boxes  # type: ignore[return-value]


def panel(
    spec: PretrainSpec, image: Grey, *, seen: int | None = None, mark: int | None = None, factor: int = FACTOR
) -> Image.Image:
    """An enlarged image with numbered cluster borders.

    seen: number of clusters to show, the others are blank; None for all.  mark: index of a cluster to
    outline.
    """
    picture = Image.fromarray(image).convert("RGB")
    picture = picture.resize((image.shape[1] * factor, image.shape[0] * factor), Image.Resampling.NEAREST)
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(9)
    boxes = [tuple(v * factor for v in box) for box in cluster_boxes(spec)]
    for number, (left, top, right, bottom) in enumerate(boxes):
        if seen is not None and number >= seen:
            draw.rectangle((left, top, right - 1, bottom - 1), fill=BLANK)
        draw.rectangle((left, top, right - 1, bottom - 1), outline=LINE)
        draw.text((left + 3, top + 1), str(number + 1), fill=LINE, font=font)
    if mark is not None:
        left, top, right, bottom = boxes[mark]
        draw.rectangle((left, top, right - 1, bottom - 1), outline=MARK, width=2)
    return picture


def error_image(predicted: Grey, truth: Grey) -> Grey:
    """White where both agree, black where they differ by the full range."""
    return np.asarray(255 - np.abs(predicted.astype(np.int16) - truth.astype(np.int16)), np.uint8)


def with_prediction(spec: PretrainSpec, truth: Grey, predicted: Grey, cluster: int) -> Grey:
    """The true image with one cluster replaced by its prediction."""
    left, top, right, bottom = cluster_boxes(spec)[cluster]
    mixed = truth.copy()
    mixed[top:bottom, left:right] = predicted[top:bottom, left:right]
    return mixed


def beside(pictures: Sequence[Image.Image], gap: int = 8) -> Image.Image:
    """Pictures next to each other on white."""
    width = sum(picture.width for picture in pictures) + gap * (len(pictures) - 1)
    sheet = Image.new("RGB", (width, max(picture.height for picture in pictures)), "white")
    left = 0
    for picture in pictures:
        sheet.paste(picture, (left, 0))
        left += picture.width + gap
    return sheet


def animation(spec: PretrainSpec, truth: Sequence[Grey], predicted: Sequence[Grey]) -> str:
    """A data URI: cluster by cluster, the prediction from the true clusters before it, then the truth."""
    frames = []
    for cluster in range(1, spec.clusters):
        panels = [
            panel(spec, with_prediction(spec, t, p, cluster), seen=cluster + 1, mark=cluster)
            for t, p in zip(truth, predicted, strict=True)
        ]
        frames.append(beside(panels))
    frames.append(beside([panel(spec, image) for image in truth]))
    buffer = io.BytesIO()
    durations = [FRAME_MS] * (len(frames) - 1) + [LAST_MS]
    first, *rest = (frame.convert("P", palette=Image.Palette.ADAPTIVE, colors=64) for frame in frames)
    first.save(buffer, "GIF", save_all=True, append_images=rest, duration=durations, loop=0)
    return f"data:image/gif;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def data_uri(picture: Image.Image) -> str:
    """A picture as a PNG data URI."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
