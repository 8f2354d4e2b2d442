"""Intervals over seeds: Student's t, pairs by seed, and no claim from one value."""

import numpy as np
import pytest

from arm_core.training.intervals import Interval, mean_interval, paired_difference, student


@pytest.mark.parametrize("freedom", [1, 2, 4, 20, 21, 40, 200])
def test_quantiles_are_those_of_scipy(freedom):
    stats = pytest.importorskip("scipy.stats")
    assert student(freedom) == pytest.approx(float(stats.t.ppf(0.975, freedom)), abs=5e-4)


def test_the_interval_is_students():
    found = mean_interval([1.0, 2.0, 3.0, 4.0])
    assert found.mean == 2.5
    assert found.half == pytest.approx(3.1824 * np.std([1, 2, 3, 4], ddof=1) / 2)
    assert found.count == 4


def test_95_percent_of_intervals_contain_the_mean():
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(2000):
        found = mean_interval(rng.normal(size=5).tolist())
        assert found.half is not None
        hits += abs(found.mean) <= found.half
    assert 0.935 < hits / 2000 < 0.965


def test_one_value_has_a_mean_and_no_interval():
    assert mean_interval([3.0]) == Interval(mean=3.0, half=None, count=1)
    assert mean_interval([3.0]).sign == 0
    with pytest.raises(ValueError, match="found none"):
        mean_interval([])


def test_differences_are_paired_by_seed():
    values, reference = {0: 11.0, 1: 21.0, 2: 5.0}, {1: 20.0, 0: 10.0, 3: 0.0}
    found = paired_difference(values, reference)
    assert found == Interval(mean=1.0, half=0.0, count=2)
    assert found.sign == 1
    assert paired_difference({0: 1.0}, {1: 1.0}) is None


def test_the_sign_needs_an_interval_without_zero():
    assert Interval(mean=2.0, half=1.0, count=3).sign == 1
    assert Interval(mean=-2.0, half=1.0, count=3).sign == -1
    assert Interval(mean=2.0, half=2.5, count=3).sign == 0
