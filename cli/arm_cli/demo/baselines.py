"""Classifiers on raw pixels, to compare a small model with."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating]
Labels = npt.NDArray[np.integer]


def nearest_neighbour(images: Floats, labels: Labels, test: Floats) -> Labels:
    """Label of the training image closest in Euclidean distance. images: (M, ...), test: (Q, ...)."""
    return np.asarray(labels[_squared_distances(test, images).argmin(1)])


def nearest_class_mean(images: Floats, labels: Labels, test: Floats) -> Labels:
    """Class whose mean training image is closest. images: (M, ...), test: (Q, ...)."""
    classes = np.unique(labels)
    means = np.stack([images[labels == label].mean(0) for label in classes])
    return np.asarray(classes[_squared_distances(test, means).argmin(1)])


def _squared_distances(a: Floats, b: Floats) -> npt.NDArray[np.float64]:
    """(len(a), len(b)), up to the constant |a|^2 of each row."""
    x, y = a.reshape(len(a), -1).astype(np.float64), b.reshape(len(b), -1).astype(np.float64)
    return np.asarray((y**2).sum(1) - 2.0 * x @ y.T)
