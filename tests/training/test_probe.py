"""Probes of frozen features: accuracies that can be computed by hand, intervals, and messages."""

from __future__ import annotations

import numpy as np
import pytest

from arm_core.training.probe import knn_probe, linear_probe, wilson_interval


def clusters(count, classes=3, width=8, seed=0, spread=0.1):
    rng = np.random.default_rng(seed)
    centers = np.random.default_rng(99).standard_normal((classes, width))
    labels = np.arange(count) % classes
    return (centers[labels] + spread * rng.standard_normal((count, width))).astype(np.float32), labels


def test_both_probes_separate_distinct_clusters():
    pytest.importorskip("sklearn", reason="needs scikit-learn, part of the dev extra")
    train, test = clusters(60), clusters(30, seed=1)
    for probe in (knn_probe, linear_probe):
        result = probe(*train, *test)
        assert result.accuracy == 1.0
        assert 0.88 < result.low < result.high <= 1.0


def test_the_votes_of_neighbours_are_weighted_by_similarity():
    train = np.array([[1, 0], [0.8, 0.6], [0.8, -0.6]], np.float32)
    labels = np.array([0, 1, 1])
    test = np.array([[1, 0.0]], np.float32)
    # Similarities 1, 0.8, 0.8: at a low temperature the closest wins, at a high one the majority.
    cold = knn_probe(train, labels, test, np.array([0]), k=3, temperature=0.05)
    warm = knn_probe(train, labels, test, np.array([0]), k=3, temperature=10.0)
    assert (cold.accuracy, warm.accuracy) == (1.0, 0.0)
    assert knn_probe(train, labels, test, np.array([0]), k=1).accuracy == 1.0


def test_more_than_a_block_of_test_features_is_scored():
    train, test = clusters(60), clusters(600, seed=2)
    wrong = test[1].copy()
    wrong[300:450] = (wrong[300:450] + 1) % 3
    assert knn_probe(*train, test[0], wrong).correct == 450


def test_the_interval_is_wilsons():
    low, high = wilson_interval(8, 10)
    assert (round(low, 4), round(high, 4)) == (0.4902, 0.9433)  # Wilson (1927), as tabulated
    assert wilson_interval(0, 10)[0] == 0.0
    assert wilson_interval(10, 10)[1] == pytest.approx(1.0)


def test_features_with_wrong_sizes_are_refused_with_an_explanation():
    train, labels = clusters(30)
    with pytest.raises(ValueError, match="train and test have 8 and 4 features"):
        knn_probe(train, labels, train[:, :4], labels)
    with pytest.raises(ValueError, match="unlabelled images"):
        knn_probe(train, labels - 1, train, labels)
    with pytest.raises(ValueError, match="NaN or infinite"):
        knn_probe(train * np.nan, labels, train, labels)
    with pytest.raises(ValueError, match="class 2 has one training image"):
        linear_probe(train[:4], np.array([0, 0, 0, 2]), train, labels)
