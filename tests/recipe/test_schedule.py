"""Learning rate over a run, and the draws of drop path."""

import math

import numpy as np
import pytest

from arm_core.model.drop_path import drop_path_scale, drop_rates
from arm_core.recipe.schedule import Schedule, scaled_lr


def test_learning_rates_equal_those_of_the_official_run():
    # The official loop at lr 1e-2 with 40 epochs of warm-up, epochs 39 and 40, one update each.
    schedule = Schedule(lr=1e-2, min_lr=0.0, warmup=40, length=1600)
    assert [schedule.at(39), schedule.at(40)] == [0.00975, 0.01]


def test_learning_rate_starts_at_zero_peaks_after_warm_up_and_ends_at_the_minimum():
    schedule = Schedule(lr=1.0, min_lr=0.1, warmup=5, length=100)
    assert schedule.at(0) == 0.0
    assert schedule.at(2.5) == 0.5
    assert schedule.at(5) == 1.0
    assert schedule.at(52.5) == pytest.approx(0.55)
    assert schedule.at(5 + 95 / 4) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert schedule.at(100) == schedule.at(101) == 0.1


def test_learning_rate_without_warm_up_starts_at_its_peak():
    assert Schedule(lr=1.0, min_lr=0.0, warmup=0, length=10).at(0) == 1.0


def test_base_learning_rate_refers_to_256_images_per_update():
    assert scaled_lr(1.5e-4, 2048) == pytest.approx(1.2e-3)


@pytest.mark.parametrize(("warmup", "min_lr"), [(11, 0.0), (0, 2.0), (-1, 0.0)])
def test_an_invalid_schedule_is_refused(warmup, min_lr):
    with pytest.raises(ValueError, match="schedule: "):
        Schedule(lr=1.0, min_lr=min_lr, warmup=warmup, length=10)


def test_drop_rates_are_shifted_by_one_block_as_in_the_official_code():
    np.testing.assert_allclose(drop_rates(0.3, 4), [0.0, 0.0, 0.1, 0.2])
    np.testing.assert_array_equal(drop_rates(0.0, 3), 0.0)
    with pytest.raises(ValueError, match=r"drop_path: expected 0 or more and below 1, found 1.0"):
        drop_rates(1.0, 4)


def test_branch_factors_keep_the_mean_and_drop_at_the_rate_of_their_block():
    rates = drop_rates(0.4, 6)
    factors = drop_path_scale(0.4, 6, 4096, seed=3, position=0)
    assert factors.shape == (6, 2, 4096)
    assert factors.dtype == np.float32
    np.testing.assert_allclose((factors == 0).mean(-1), np.stack([rates, rates], 1), atol=0.03)
    np.testing.assert_allclose(factors.max(-1), np.stack([1 / (1 - rates)] * 2, 1), rtol=1e-6)
    np.testing.assert_array_equal(factors[:2], 1.0)


def test_branch_draws_are_independent_and_depend_only_on_seed_and_position():
    one = drop_path_scale(0.9, 4, 512, seed=3, position=7)
    np.testing.assert_array_equal(one, drop_path_scale(0.9, 4, 512, seed=3, position=7))
    dropped = one[2:] == 0  # the blocks that may drop: 2, 3
    assert abs(np.corrcoef(dropped[1, 0], dropped[1, 1])[0, 1]) < 0.2  # mixer against MLP
    assert abs(np.corrcoef(dropped[0, 0], dropped[1, 0])[0, 1]) < 0.2  # block against block
    for other in (
        drop_path_scale(0.9, 4, 512, seed=3, position=8),
        drop_path_scale(0.9, 4, 512, seed=4, position=7),
    ):
        assert abs(np.corrcoef(dropped[1, 0], other[3, 0] == 0)[0, 1]) < 0.2
