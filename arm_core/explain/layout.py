"""Positions of tokens in the image: from values per token to values per patch, and from a name to tokens."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from arm_core.model.spec import ClassifierSpec, ModelSpec, Pooling, PretrainSpec
from arm_core.model.tokens import encoder_patches

Floats = npt.NDArray[np.floating]
Token = str | tuple[int, int]
"""`class`, or the (row, column) of a patch, from 0."""

CLASS = "class"


def token_patches(spec: ModelSpec) -> npt.NDArray[np.int32]:
    """(T,): the patch of each token, a raster index; -1 for the class token."""
    if isinstance(spec, PretrainSpec):
        return encoder_patches(spec)
    return np.insert(np.arange(spec.patches, dtype=np.int32), spec.class_position, -1)


def on_grid(spec: ModelSpec, values: Floats) -> npt.NDArray[np.float32]:
    """(..., T) values per token -> (..., rows, columns); NaN for a patch that the model does not read."""
    grid = np.full((*values.shape[:-1], spec.patches), np.nan, np.float32)
    patches = token_patches(spec)
    grid[..., patches[patches >= 0]] = values[..., patches >= 0]
    return grid.reshape(*values.shape[:-1], *spec.grid)


def token_weights(spec: ModelSpec, token: Token) -> npt.NDArray[np.float32]:
    """(T,) weights, sum 1, of the selected tokens.

    `class` selects the pooled tokens: with mean pooling the two halves of the patches, with equal weight for
    each half; with class-token pooling the class token. A ValueError explains a token that does not
    exist in this model.
    """
    weights = np.zeros(spec.tokens, np.float32)
    if token == CLASS:
        if not isinstance(spec, ClassifierSpec):
            raise ValueError("token: a pretraining model has no class token; expected ROW,COLUMN of a patch")
        middle = spec.class_position
        if spec.pooling is Pooling.CLS:
            weights[middle] = 1
        else:
            weights[:middle] = 0.5 / middle
            weights[middle + 1 :] = 0.5 / (spec.patches - middle)
        return weights
    rows, columns = spec.grid
    row, column = _patch(token)
    if not (0 <= row < rows and 0 <= column < columns):
        raise ValueError(
            f"token: patch {row},{column} is outside the grid; rows go from 0 to {rows - 1} "
            f"and columns from 0 to {columns - 1}"
        )
    (found,) = np.nonzero(token_patches(spec) == row * columns + column)
    if not len(found):
        raise ValueError(
            f"token: patch {row},{column} is in the last cluster, which the model predicts but never reads"
        )
    weights[found] = 1
    return weights


def _patch(token: Token) -> tuple[int, int]:
    if isinstance(token, str):
        parts = token.split(",")
        if len(parts) == 2 and all(part.strip().isdecimal() for part in parts):
            return int(parts[0]), int(parts[1])
    elif len(token) == 2:
        return int(token[0]), int(token[1])
    raise ValueError(f"token: expected {CLASS!r} or ROW,COLUMN counted from 0, found {token!r}")
