"""Intervals, classes, confusions and calibration, against values computed by hand."""

from __future__ import annotations

import numpy as np
import pytest
from thread_ranks import run_ranks

from arm_core.data.loader import EvalBatch
from arm_core.training import predictions
from arm_core.training.predictions import (
    Collector,
    Predictions,
    calibration_error,
    confident_mistakes,
    confusion,
    interval,
    per_class,
    worst_confusions,
)

# Image: 0    1    2    3    4    5
LABELS = [0, 0, 1, 1, 2, 2]
PREDICTED = [0, 1, 1, 1, 1, 0]
CONFIDENCE = [0.9, 0.6, 0.55, 0.95, 0.85, 0.75]


@pytest.fixture
def found() -> Predictions:
    return Predictions(
        indices=np.arange(6),
        labels=np.array(LABELS),
        predicted=np.array(PREDICTED),
        confidence=np.array(CONFIDENCE),
    )


def test_wilson_intervals_equal_published_values() -> None:
    """Newcombe (1998), table I, method 3."""
    table = {(81, 263): (0.2553, 0.3662), (15, 148): (0.0624, 0.1605), (0, 20): (0, 0.1611)}
    table[1, 29] = (0.0061, 0.1718)
    for (successes, count), ends in table.items():
        assert interval(successes / count, count) == pytest.approx(ends, abs=5e-5)
    assert interval(1.0, 10)[1] == pytest.approx(1.0)


def test_classes_are_counted_one_by_one(found: Predictions) -> None:
    assert per_class(found, 4) == [(2, 1), (2, 2), (2, 0), (0, 0)]


def test_confusions_are_counted_and_the_most_frequent_are_first(found: Predictions) -> None:
    assert confusion(found, 3).tolist() == [[1, 1, 0], [0, 2, 0], [1, 1, 0]]
    assert worst_confusions(found, 3) == [(0, 1, 1), (2, 0, 1), (2, 1, 1)]
    twice = Predictions(
        indices=np.arange(3), labels=np.array([2, 0, 2]), predicted=np.array([0, 1, 0]), confidence=np.ones(3)
    )
    assert worst_confusions(twice, 3) == [(2, 0, 2), (0, 1, 1)]


def test_the_calibration_error_is_the_mean_gap_over_bins(found: Predictions) -> None:
    """Of ten bins, (0.5, 0.6] holds 0.6 and 0.55, (0.8, 0.9] holds 0.9 and 0.85."""
    assert calibration_error(found, bins=1) == pytest.approx(abs(sum(CONFIDENCE) - 3) / 6)
    gaps = [abs(0.9 + 0.85 - 1), abs(0.6 + 0.55 - 1), abs(0.95 - 1), 0.75]
    assert calibration_error(found, bins=10) == pytest.approx(sum(gaps) / 6)


def test_the_most_confident_mistakes_are_first(found: Predictions) -> None:
    assert confident_mistakes(found, 2).tolist() == [4, 5]
    assert confident_mistakes(found, 9).tolist() == [4, 5, 1]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_predictions_of_all_ranks_are_in_the_order_of_the_source(
    world: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predictions, "CHUNK", 2)
    logits = np.random.default_rng(0).normal(size=(11, 4)).astype(np.float32)
    labels = np.arange(11) % 4

    def work(ranks):
        collector = Collector()
        for start in range(3 * ranks.rank, 11, 3 * ranks.world):
            part = np.arange(start, min(start + 3, 11))
            collector(EvalBatch(np.zeros((len(part), 1, 1, 3), np.float32), labels[part], part), logits[part])
        return collector.gather(ranks)

    softmax = np.exp(logits.astype(float)) / np.exp(logits.astype(float)).sum(-1, keepdims=True)
    for found in run_ranks(world, work):
        assert found.indices.tolist() == list(range(11))
        np.testing.assert_array_equal(found.labels, labels)
        np.testing.assert_array_equal(found.predicted, logits.argmax(-1))
        np.testing.assert_allclose(found.confidence, softmax.max(-1), rtol=1e-12)
