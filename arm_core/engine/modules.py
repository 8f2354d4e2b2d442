"""Shared parts of the library models: block indices, pooling, parameters without decay."""

from __future__ import annotations

from collections.abc import Sequence

from arm_core.engine.protocol import Array
from arm_core.model.parameters import parameter_table
from arm_core.model.spec import ClassifierSpec, ModelSpec, Pooling

POOLINGS = {"avg": Pooling.MEAN, "mean": Pooling.MEAN, "token": Pooling.CLS, "cls": Pooling.CLS}
"""Names of a classifier's poolings, timm's and this package's."""

FEATURE_POOLINGS = ("default", "mean", "cls", "none")
"""How `extract` reduces tokens."""


def block_indices(depth: int, indices: int | Sequence[int] | None) -> list[int]:
    """Blocks from timm's forms: None for all, n for the last n, or a list (negative: from the end)."""
    if isinstance(indices, int):
        if not 1 <= indices <= depth:
            raise ValueError(f"indices: expected 1 to {depth} last blocks, found {indices}")
        return list(range(depth - indices, depth))
    chosen = range(depth) if indices is None else indices
    if bad := [i for i in chosen if not -depth <= i < depth]:
        raise ValueError(f"indices: expected blocks from {-depth} to {depth - 1}, found {bad[0]}")
    return [i % depth for i in chosen]


def decay_free(spec: ModelSpec) -> set[str]:
    """Names of the parameters that AdamW must not decay, as in the official recipes."""
    return {name for name, row in parameter_table(spec).items() if not row.decay}


def pooled(patches: Array, prefix: Array | None, pool: str, spec: ModelSpec) -> Array:
    """Features of tokens. patches: (B, patches, D) in raster order.  prefix: (B, 1, D), the class token.

    pool: `mean` of the patches (B, D), `cls` the class token (B, D), `none` the patches (B, patches, D),
    `default` the input of the model's head, and the mean in a model without a head.
    Raises ValueError for any other word, and for `cls` without a class token.
    """
    if pool not in FEATURE_POOLINGS:
        raise ValueError(f"pool: expected {', '.join(FEATURE_POOLINGS)}, found {pool!r}")
    if pool == "default":
        pool = "cls" if isinstance(spec, ClassifierSpec) and spec.pooling is Pooling.CLS else "mean"
    if pool == "none":
        return patches
    if pool == "mean":
        mean: Array = patches.mean(1)
        return mean
    if prefix is None:
        raise ValueError("pool: a pretraining model has no class token; choose mean or none")
    token: Array = prefix[:, 0]
    return token
