"""The evaluation transform as ONNX nodes: uint8 pixels in, resized, cropped and normalised.

This is the arithmetic of `arm_core.data.transforms.center_crop` and `normalize`: the resized size is
rounded down to whole pixels, the filter is Pillow's antialiased bicubic one (`Resize` since opset 18), and
the result is rounded to 8 bits before it is normalised.
"""

from __future__ import annotations

import numpy as np

from arm_convert.onnx_model.builder import FLOAT, HALF, INT64, Builder
from arm_convert.onnx_model.mixer import Float
from arm_core.data.transforms import EvalTransform

RESIZE_OPSET = 18
"""The first operator set whose `Resize` antialiases."""


def preprocess(
    g: Builder,
    pixels: str,
    transform: EvalTransform,
    size: tuple[int, int],
    dtype: Float,
    *,
    batch: int | None,
) -> str:
    """pixels: (B, H, W, 3) uint8, any H and W. Returns (B, 3, height, width), normalised, for `size`."""
    height, width = size
    covered = np.array([int(side / transform.fraction(size)) for side in size], np.int64)
    image = g("Transpose", pixels, perm=[0, 3, 1, 2])
    found = g("Shape", image, start=2, end=4)  # H, W
    swapped = g("Gather", found, g.ints(1, 0), axis=0)
    # The limiting side gets its size in `covered`; the other one follows, rounded down:
    # [covered width * H // W, covered height * W // H].
    follows = g("Div", g("Mul", found, g.shared(covered[::-1].copy())), swapped)
    resized = g("Max", g.shared(covered), follows)
    # ONNX takes (B, C, height, width); B and C stay.
    kept = g("Shape", image, start=0, end=2)
    target = g("Concat", kept, resized, axis=0)
    image = g(
        "Resize", image, "", "", target,
        mode="cubic", cubic_coeff_a=-0.5, antialias=1, exclude_outside=1,
        coordinate_transformation_mode="half_pixel", name="resize",
    )  # fmt: skip
    margin = g("Cast", g("Sub", resized, g.ints(height, width)), to=FLOAT)
    start = g("Cast", g("Round", g("Mul", margin, g.shared(np.array(0.5, np.float32)))), to=INT64)
    end = g("Add", start, g.ints(height, width))
    image = g("Slice", image, start, end, g.ints(2, 3), name="crop")
    # States the sizes, which shape inference cannot follow through the resizing: onnxruntime fuses more
    # operators if they are known.
    image = g("Reshape", image, g.ints(-1 if batch is None else batch, 3, height, width))
    values = g("Div", g("Cast", image, to=FLOAT), g.shared(np.array(255, np.float32)))
    mean, std = (np.array(color, np.float32)[:, None, None] for color in (transform.mean, transform.std))
    values = g("Div", g("Sub", values, g.shared(mean)), g.shared(std), name="normalize")
    return values if dtype is np.float32 else g("Cast", values, to=HALF)
