"""A classifier's prediction for each image, and statistics: intervals, classes, calibration."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from arm_core.data.loader import EvalBatch
from arm_core.engine.protocol import Array
from arm_core.engine.ranks import Ranks

Z95 = 1.959963984540054
"""Quantile of the normal distribution for a 95 % interval."""
BINS = 15
"""Bins of confidence for the calibration error, as in arXiv:1706.04599."""
CHUNK = 1000
"""Number of images whose predictions ranks exchange at a time."""


Row = tuple[int, int, int, float]
"""Of one image: its index, its label, the predicted class and its probability."""


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """One entry per image, in the order of the source."""

    indices: npt.NDArray[np.int64]
    """Indices of the images in the source."""
    labels: npt.NDArray[np.int64]
    predicted: npt.NDArray[np.int64]
    """The most probable class."""
    confidence: npt.NDArray[np.float64]
    """Its probability."""

    @property
    def correct(self) -> npt.NDArray[np.bool_]:
        return np.asarray(self.labels == self.predicted)


class Collector:
    """Collects the predictions for a rank's images; pass it to `evaluate` as `each`.

    rows: those of an earlier, interrupted call; receives an entry per image.
    """

    def __init__(self, rows: list[Row] | None = None) -> None:
        self._rows = [] if rows is None else rows

    def __call__(self, batch: EvalBatch, logits: Array) -> None:
        shifted = logits.astype(np.float64)
        shifted -= shifted.max(-1, keepdims=True)
        predicted = np.argmax(shifted, -1)  # the class with the smaller index for equal logits
        confidence = 1.0 / np.exp(shifted).sum(-1)
        columns = (batch.indices, batch.labels, predicted, confidence)
        self._rows += zip(*(column.tolist() for column in columns), strict=True)

    def gather(self, ranks: Ranks) -> Predictions:
        """The predictions of all ranks; all ranks call this at the same point."""
        rounds = max(ranks.gather(-(-len(self._rows) // CHUNK)))
        rows: list[Row] = []
        for i in range(rounds):
            for part in ranks.gather(self._rows[i * CHUNK : (i + 1) * CHUNK]):
                rows += [tuple(row) for row in part]
        rows.sort()
        indices, labels, predicted = (
            np.array([row[column] for row in rows], np.int64) for column in range(3)
        )
        confidence = np.array([row[3] for row in rows], np.float64)
        return Predictions(indices=indices, labels=labels, predicted=predicted, confidence=confidence)


def interval(part: float, count: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of a fraction of `count` images (Wilson, 1927)."""
    square = Z95**2 / count
    centre = (part + square / 2) / (1 + square)
    half = Z95 / (1 + square) * math.sqrt(part * (1 - part) / count + square / (4 * count))
    return max(0.0, centre - half), min(1.0, centre + half)


def per_class(found: Predictions, classes: int) -> list[tuple[int, int]]:
    """Images of each class, and how many of them are predicted correctly."""
    images = np.bincount(found.labels, minlength=classes)
    correct = np.bincount(found.labels[found.correct], minlength=classes)
    return list(zip(images.tolist(), correct.tolist(), strict=True))


def confusion(found: Predictions, classes: int) -> npt.NDArray[np.int64]:
    """`(classes, classes)` images by true and by predicted class."""
    counts = np.bincount(found.labels * classes + found.predicted, minlength=classes**2)
    return np.asarray(counts.reshape(classes, classes), np.int64)


def worst_confusions(found: Predictions, classes: int, most: int = 10) -> list[tuple[int, int, int]]:
    """True class, predicted class and count of the most frequent mistakes."""
    wrong = ~found.correct
    pairs, counts = np.unique(found.labels[wrong] * classes + found.predicted[wrong], return_counts=True)
    order = np.argsort(-counts, kind="stable")[:most]
    return [(int(pairs[i]) // classes, int(pairs[i]) % classes, int(counts[i])) for i in order]


def calibration_error(found: Predictions, bins: int = BINS) -> float:
    """Expected calibration error: mean distance of confidence and accuracy over bins of confidence.

    Guo et al., arXiv:1706.04599, eq. 3, bins of equal width (m - 1) / M < confidence <= m / M.
    """
    which = np.clip(np.ceil(found.confidence * bins).astype(np.int64) - 1, 0, bins - 1)
    gaps = np.bincount(which, found.confidence - found.correct, minlength=bins)
    return float(np.abs(gaps).sum() / len(found.labels))


def confident_mistakes(found: Predictions, most: int) -> npt.NDArray[np.int64]:
    """Positions of the mistakes with the highest confidence, the highest first."""
    wrong = np.flatnonzero(~found.correct)
    return np.asarray(wrong[np.argsort(-found.confidence[wrong], kind="stable")][:most], np.int64)
