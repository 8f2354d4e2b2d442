"""Tokens as feature maps: positions and patches. Twin: `arm_cuda.features`."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from arm_core.model.bicubic import interpolation_matrix
from arm_core.model.spec import ClassifierSpec, ModelSpec, PretrainSpec


def positions_for(table: mx.array, spec: ClassifierSpec, target: ClassifierSpec) -> mx.array:
    """A classifier's position table (T, D) for the grid of `target`: bicubic, the class token's row kept."""
    patches, row = without_class_token(table[None], spec)
    assert row is not None
    rows, columns = (
        mx.array(interpolation_matrix(a, b).astype(np.float32))
        for a, b in zip(spec.grid, target.grid, strict=True)
    )
    square = patches[0].reshape(*spec.grid, -1)
    resized = mx.einsum("ra,cb,abd->rcd", rows, columns, square).reshape(target.patches, -1)
    middle = target.class_position
    return mx.concatenate([resized[:middle], row[0], resized[middle:]])


def without_class_token(x: mx.array, spec: ModelSpec) -> tuple[mx.array, mx.array | None]:
    """Tokens of the patches (B, patches, D), and the class token (B, 1, D) if there is one."""
    if isinstance(spec, PretrainSpec):
        return x, None
    middle = spec.class_position
    return mx.concatenate([x[:, :middle], x[:, middle + 1 :]], axis=1), x[:, middle : middle + 1]
