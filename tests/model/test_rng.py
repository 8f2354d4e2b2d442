"""The keyed generator: its distributions by their moments."""

import numpy as np
import pytest

from arm_core.model.rng import KeyedRng

COUNT = 4000


@pytest.mark.parametrize("shape", [0.3, 0.8, 1.0, 2.5])
def test_gamma_numbers_have_mean_and_variance_of_their_shape(shape: float) -> None:
    rng = KeyedRng(0, "gamma", str(shape))
    draws = np.array([rng.gamma(shape) for _ in range(COUNT)])
    error = np.sqrt(shape / COUNT)
    assert abs(draws.mean() - shape) < 4 * error
    assert abs(draws.var() / shape - 1) < 0.2
    skewness = ((draws - shape) ** 3).mean() / shape**1.5
    assert abs(skewness - 2 / np.sqrt(shape)) < 0.4 * (2 / np.sqrt(shape))


@pytest.mark.parametrize("limit", [1.0, 2.0])
def test_truncated_normal_numbers_stay_within_their_limit_on_both_sides(limit: float) -> None:
    draws = KeyedRng(0, "truncated").truncated_normal(COUNT, limit)
    assert -limit < draws.min() < -0.95 * limit
    assert 0.95 * limit < draws.max() < limit
    assert abs(draws.mean()) < 0.05


def test_one_number_is_the_same_as_an_array_of_one() -> None:
    one, many = KeyedRng(3, "one"), KeyedRng(3, "one")
    assert [one.one() for _ in range(1000)] == [float(many.uniform(1)[0]) for _ in range(1000)]
