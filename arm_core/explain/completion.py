"""Predictions of a pretraining model, cluster by cluster, as pictures and errors.

Every image is predicted twice: from the true clusters before each cluster (one pass), and as a rollout, which
starts from the first clusters and continues with its own predictions (a pass for each further cluster).
Predictions are causal, so the content of later clusters has no effect.

A model with normalised targets predicts each patch with mean 0 and variance 1. A picture needs a mean and a
variance for each patch; `Statistics` selects their source.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import numpy.typing as npt

from arm_core.engine.protocol import Array, Engine
from arm_core.model.reference.model import TARGET_EPS, prediction_target, unfold_patches
from arm_core.model.spec import PretrainSpec, Target
from arm_core.model.tokens import patch_order

Floats = npt.NDArray[np.floating]
Integers = npt.NDArray[np.integer]


class Statistics(StrEnum):
    """Mean and variance for a normalised prediction in a rollout."""

    NEAREST = "nearest"
    """Those of the nearest patch in the clusters before; the true patch is not used."""
    TRUE = "true"
    """Those of the true patch: the rollout knows the brightness and contrast of its target."""


@dataclass(frozen=True, kw_only=True)
class Completion:
    """Predictions for some images. B images, C clusters in the order of their prediction."""

    given: int
    """Number of given clusters in the rollout."""
    step_by_step: Array
    """(B, H, W, 3), normalised as the input: each cluster predicted from the true clusters before it. The
    first is the true one."""
    rollout: Array
    """(B, H, W, 3): the given clusters, then predictions from them and the earlier predictions."""
    step_loss: Array
    """(B, C): mean squared error in the units of the training loss; NaN for the first cluster."""
    rollout_loss: Array
    """(B, C), the same for the rollout; NaN for the given clusters."""
    step_pixels: Array
    """(B, C): root mean square error of the normalised pixels of `step_by_step`; NaN for the first
    cluster."""
    rollout_pixels: Array
    """(B, C), the same for `rollout`; NaN for the given clusters."""


def complete(
    engine: Engine, images: Array, *, given: int = 1, statistics: Statistics | str = Statistics.NEAREST
) -> Completion:
    """Predict each cluster of normalised images (B, H, W, 3), step by step and as a rollout.

    given: number of clusters at the start of the rollout, at most all except one.  statistics: for normalised
    targets in the rollout; the step-by-step prediction always uses the true ones. Raises ValueError if the
    model is not a pretraining model or `given` is out of range.
    """
    spec, statistics = engine.spec, Statistics(statistics)
    if not isinstance(spec, PretrainSpec):
        raise ValueError(
            "completion: expected a pretraining model, found a classifier; it predicts no pixels"
        )
    if not 1 <= given < spec.clusters:
        raise ValueError(
            f"given: expected 1 to {spec.clusters - 1} of {spec.clusters} clusters, found {given}"
        )
    exact = unfold_patches(images, spec.encoder.patch)
    true = exact.astype(np.float32)
    target = prediction_target(spec, exact)  # (B, tokens, values)
    clusters = patch_order(spec).reshape(spec.clusters, -1)  # (C, patches of a cluster)

    def folded(patches: Floats) -> Array:
        return fold_patches(patches, spec.grid, spec.encoder.patch).astype(np.float32)

    first = engine.forward(images)["prediction"]
    steps = true.copy()
    steps[:, clusters[1:].ravel()] = restore(spec, first, true[:, clusters[1:].ravel()])
    rollout, guesses = true.copy(), first.copy()
    size = spec.patches_per_cluster
    for c in range(given, spec.clusters):
        tokens = slice((c - 1) * size, c * size)
        if c > given:  # the first predictions of a rollout have true clusters before them
            guesses[:, tokens] = engine.forward(folded(rollout))["prediction"][:, tokens]
        places = clusters[c]
        if statistics is Statistics.NEAREST:
            source = rollout[:, nearest(spec, places, clusters[:c].ravel())]
        else:
            source = true[:, places]
        rollout[:, places] = restore(spec, guesses[:, tokens], source)

    def by_cluster(error: Floats, start: int) -> Array:  # (B, patches in order, values) -> (B, C)
        means = (error**2).reshape(len(error), spec.clusters, -1).mean(-1)
        means[:, :start] = np.nan
        return np.asarray(means.astype(np.float32))

    def loss(prediction: Floats, start: int) -> Array:
        error = np.pad(prediction - target, ((0, 0), (size, 0), (0, 0)))
        return by_cluster(error, start)

    def pixels(patches: Floats, start: int) -> Array:
        return np.asarray(np.sqrt(by_cluster((patches - true)[:, clusters.ravel()], start)))

    return Completion(
        given=given,
        step_by_step=folded(steps),
        rollout=folded(rollout),
        step_loss=loss(first, 1),
        rollout_loss=loss(guesses, given),
        step_pixels=pixels(steps, 1),
        rollout_pixels=pixels(rollout, given),
    )


def restore(spec: PretrainSpec, prediction: Floats, source: Floats) -> Array:
    """Predicted values as pixels, with mean and variance of the source patches if targets are normalised.

    prediction, source: (B, patches, values).
    """
    if spec.target is Target.RAW:
        return np.asarray(prediction, np.float32)
    deviation = np.sqrt(source.var(-1, ddof=1, keepdims=True) + TARGET_EPS)
    return np.asarray(prediction * deviation + source.mean(-1, keepdims=True), np.float32)


def nearest(spec: PretrainSpec, patches: Integers, among: Integers) -> npt.NDArray[np.int32]:
    """The nearest other patch in the grid for each patch, by Euclidean distance; the first of equals.

    patches, among: raster indices. Returns raster indices in the shape of patches.
    """
    columns = spec.grid[1]
    (row, column), (other_row, other_column) = (np.divmod(p, columns) for p in (patches[:, None], among))
    distance = (row - other_row) ** 2 + (column - other_column) ** 2
    return np.asarray(among[distance.argmin(-1)], np.int32)


def fold_patches(patches: Floats, grid: tuple[int, int], patch: int) -> Floats:
    """(B, patches, patch * patch * C) in raster order -> (B, H, W, C): undoes `unfold_patches`."""
    (rows, columns), batch = grid, len(patches)
    x = patches.reshape(batch, rows, columns, patch, patch, -1).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, rows * patch, columns * patch, -1)
