"""Tokens as feature maps: positions for other grids, patches without the class token."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 (the field's name for it)
from torch import Tensor

from arm_core.model.spec import ClassifierSpec, ModelSpec, PretrainSpec


def positions_for(table: Tensor, spec: ClassifierSpec, target: ClassifierSpec) -> Tensor:
    """A classifier's position table (T, D) for the grid of `target`: bicubic, the class token's row kept."""
    patches, row = without_class_token(table.float()[None], spec)
    assert row is not None
    square = patches[0].T.reshape(1, -1, *spec.grid)
    resized = F.interpolate(square, target.grid, mode="bicubic", align_corners=False)[0].flatten(1).T
    middle = target.class_position
    return torch.cat([resized[:middle], row[0], resized[middle:]]).to(table.dtype)


def without_class_token(x: Tensor, spec: ModelSpec) -> tuple[Tensor, Tensor | None]:
    """Tokens of the patches (B, patches, D), and the class token (B, 1, D) if there is one."""
    if isinstance(spec, PretrainSpec):
        return x, None
    middle = spec.class_position
    return torch.cat([x[:, :middle], x[:, middle + 1 :]], dim=1), x[:, middle : middle + 1]
