"""Accuracy of frozen features: k nearest neighbours and a linear classifier."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from arm_core.model.rng import KeyedRng

Floats = npt.NDArray[np.floating]
Labels = npt.NDArray[np.integer]

STRENGTHS = tuple(10.0**power for power in range(-5, 3))
"""Inverse regularization strengths C that a linear probe chooses from."""
HELD_OUT = 0.2
"""Fraction of the training set on which a linear probe chooses its strength."""


@dataclass(frozen=True, kw_only=True)
class ProbeResult:
    """Accuracy of a probe on the evaluation set."""

    accuracy: float
    """Top-1, 0 to 1."""
    low: float
    high: float
    """95 % confidence interval of the accuracy (Wilson), over the draw of the evaluation set."""
    correct: int
    total: int
    settings: dict[str, Any]
    """The settings of the probe, and the values that it chose."""


def knn_probe(
    train: Floats,
    train_labels: Labels,
    test: Floats,
    test_labels: Labels,
    *,
    k: int = 20,
    temperature: float = 0.07,
) -> ProbeResult:
    """Weighted k nearest neighbours by cosine similarity, as in DINO (arXiv:2104.14294, section 4.1).

    Each of the k nearest training features votes for its class with weight exp(similarity / temperature).

    train: (M, D), train_labels: (M,) whole numbers from 0.  test: (Q, D), test_labels: (Q,).
    k: neighbours; at most M are used.  Raises ValueError if sizes do not match.
    """
    _check(train, train_labels, test, test_labels)
    if k < 1 or temperature <= 0:
        raise ValueError(f"k-NN: expected k of 1 or more and a temperature above 0, found {k}, {temperature}")
    k = min(k, len(train))
    bank, classes = _unit(train), int(max(train_labels.max(), test_labels.max())) + 1
    correct = 0
    for start in range(0, len(test), 256):  # a block of the similarity matrix at a time
        similarity = _unit(test[start : start + 256]) @ bank.T
        nearest = np.argpartition(-similarity, k - 1, axis=1)[:, :k]
        weight = np.exp(np.take_along_axis(similarity, nearest, 1) / temperature)
        votes = np.zeros((len(similarity), classes))
        rows = np.repeat(np.arange(len(similarity)), k)
        np.add.at(votes, (rows, train_labels[nearest].ravel()), weight.ravel())
        correct += int((votes.argmax(1) == test_labels[start : start + 256]).sum())
    return _result(correct, len(test), k=k, temperature=temperature)


def linear_probe(
    train: Floats,
    train_labels: Labels,
    test: Floats,
    test_labels: Labels,
    *,
    seed: int = 0,
    strengths: tuple[float, ...] = STRENGTHS,
) -> ProbeResult:
    """L2-regularized logistic regression on standardized features (scikit-learn, lbfgs).

    The strength is the best one on a fifth of the training set, drawn by class from `seed`. The classifier
    is then fitted to the whole training set. Arguments as in `knn_probe`.

    `settings` holds the chosen `C`, the accuracy of each C, and `at_edge` if it is the first or last.
    Raises ValueError if sizes do not match, a class has fewer than two features, or scikit-learn is missing.
    """
    _check(train, train_labels, test, test_labels)
    fit, held = _split(train_labels, seed)
    scores = {
        C: float((_fit(train[fit], train_labels[fit], C).predict(train[held]) == train_labels[held]).mean())
        for C in strengths
    }
    best = max(strengths, key=lambda C: scores[C])  # among equals, the strongest regularization
    predicted = _fit(train, train_labels, best).predict(test)
    return _result(
        int((predicted == test_labels).sum()),
        len(test),
        C=best,
        held_out={f"{C:g}": round(score, 4) for C, score in scores.items()},
        at_edge=len(strengths) > 1 and best in (strengths[0], strengths[-1]),
    )


def wilson_interval(correct: int, total: int, z: float = 1.959964) -> tuple[float, float]:
    """95 % confidence interval of a proportion (Wilson 1927): inside [0, 1], valid near its ends as well."""
    if not 0 <= correct <= total or total < 1:
        raise ValueError(
            f"interval: expected 0 <= correct <= total and total >= 1, found {correct} of {total}"
        )
    p, n = correct / total, total
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)
    return max(0.0, low), min(1.0, high)


def _result(correct: int, total: int, **settings: Any) -> ProbeResult:
    low, high = wilson_interval(correct, total)
    accuracy = correct / total
    return ProbeResult(accuracy=accuracy, low=low, high=high, correct=correct, total=total, settings=settings)


def _check(train: Floats, train_labels: Labels, test: Floats, test_labels: Labels) -> None:
    for name, features, labels in (("train", train, train_labels), ("test", test, test_labels)):
        if features.ndim != 2 or labels.shape != (len(features),) or not len(features):
            raise ValueError(
                f"{name}: expected features (M, D) and labels (M,) with M of 1 or more, "
                f"found {features.shape} and {labels.shape}"
            )
        if labels.min() < 0:
            raise ValueError(
                f"{name}: expected labels of 0 or more, found {labels.min()}: unlabelled images?"
            )
        if not np.isfinite(features).all():
            raise ValueError(f"{name}: the features hold NaN or infinite values")
    if train.shape[1] != test.shape[1]:
        raise ValueError(f"train and test have {train.shape[1]} and {test.shape[1]} features; use one model")


def _unit(x: Floats) -> npt.NDArray[np.float32]:
    return np.asarray(x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12), np.float32)


def _split(labels: Labels, seed: int) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """Indices to fit on and to choose on, the same share of each class."""
    fit, held = [], []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        if len(members) < 2:
            raise ValueError(f"linear probe: class {label} has one training image; expected two or more")
        members = members[KeyedRng(seed, "probe", int(label)).permutation(len(members))]
        count = max(1, round(HELD_OUT * len(members)))
        held.append(members[:count])
        fit.append(members[count:])
    return np.sort(np.concatenate(fit)), np.sort(np.concatenate(held))


def _fit(features: Floats, labels: Labels, C: float) -> Any:
    try:
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
    except ImportError:
        raise ValueError("linear probe: needs scikit-learn; pip install 'arm-vision[probe]'") from None
    # float64: the solver's line search stalls on the rounding of float32.
    model = make_pipeline(StandardScaler(), LogisticRegression(C=C, max_iter=2000))
    return model.fit(np.asarray(features, np.float64), labels)
