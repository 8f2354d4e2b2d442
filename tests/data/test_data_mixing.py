"""Mixup, CutMix and soft targets: weights agree with pixels, and targets are probabilities."""

from __future__ import annotations

import numpy as np
import pytest

from arm_core.data import OFFICIAL_MIXING, Mixing
from arm_core.data.mixing import draw_mix, soft_targets
from arm_core.engine.byte_images import Mix, mix_images
from arm_core.model.rng import KeyedRng

LABELS = np.array([0, 3, 1, 1, 2])


def images(count: int = 6, size: tuple[int, int] = (20, 30)) -> np.ndarray:
    """Image b holds the number b everywhere."""
    return np.broadcast_to(np.arange(count, dtype=np.float32)[:, None, None, None], (count, *size, 3)).copy()


def test_smoothing_distributes_its_part_over_all_classes() -> None:
    targets = soft_targets(LABELS, 4, smoothing=0.1)
    expected = np.full((5, 4), 0.1 / 4)
    expected[np.arange(5), LABELS] = 1 - 0.1 + 0.1 / 4
    np.testing.assert_allclose(targets, expected, atol=1e-7)
    assert targets.dtype == np.float32
    np.testing.assert_array_equal(soft_targets(LABELS, 4), np.eye(4, dtype=np.float32)[LABELS])


def test_mixed_targets_sum_to_one_and_weigh_both_labels() -> None:
    targets = soft_targets(LABELS, 4, smoothing=0.1, mix=Mix(weight=0.7))
    np.testing.assert_allclose(targets.sum(1), 1, atol=1e-6)
    off = 0.1 / 4
    np.testing.assert_allclose(targets[0], [0.9 * 0.7 + off, off, 0.9 * 0.3 + off, off], atol=1e-6)
    np.testing.assert_allclose(
        targets[2], soft_targets(LABELS, 4, smoothing=0.1)[2], atol=1e-6
    )  # its own partner


def test_mixup_blends_each_image_with_its_mirror_in_the_batch() -> None:
    batch = images()
    mixed = mix_images(batch, Mix(weight=0.75))
    np.testing.assert_allclose(mixed[:, 0, 0, 0], 0.75 * np.arange(6) + 0.25 * np.arange(6)[::-1], atol=1e-6)
    np.testing.assert_array_equal(batch, images())
    assert mixed.dtype == np.float32


def test_the_weight_of_cutmix_is_the_fraction_of_the_image_that_remains() -> None:
    batch, full = images(), 0
    for i in range(200):
        mix = draw_mix(Mixing(cutmix=1.0), (20, 30), KeyedRng(0, "t", i))
        own = mix_images(batch, mix) == batch
        assert mix.box is not None
        assert own.mean() == pytest.approx(mix.weight, abs=1e-6)
        if mix.weight < 1:
            top, bottom, left, right = mix.box
            assert not own[:, top:bottom, left:right].any()
            full += 1
    assert full > 190
    np.testing.assert_array_equal(batch, images())


def test_both_kinds_of_mixing_are_chosen_half_of_the_time_with_their_own_weights() -> None:
    mixes = [draw_mix(OFFICIAL_MIXING, (224, 224), KeyedRng(1, "t", i)) for i in range(3000)]
    cutmix = np.array([mix.weight for mix in mixes if mix.box is not None])
    mixup = np.array([mix.weight for mix in mixes if mix.box is None])
    assert abs(len(cutmix) - 1500) < 140
    assert mixup.mean() == pytest.approx(0.5, abs=0.04)
    assert mixup.var() == pytest.approx(1 / (4 * 2.6), rel=0.1)  # Beta(0.8, 0.8)
    # A uniform weight, but boxes are clipped at the border: their remaining area is 0.31 of the image
    # on average, by the integral over part and centre.
    assert 1 - cutmix.mean() == pytest.approx(expected_pasted_part(), abs=0.02)


def expected_pasted_part() -> float:
    """Mean pasted area for a uniform weight and a uniform centre, by numerical integration."""
    part = np.sqrt(1 - (np.arange(2000) + 0.5) / 2000)[:, None]
    centre = (np.arange(2000) + 0.5)[None] / 2000
    side = np.minimum(centre + part / 2, 1) - np.maximum(centre - part / 2, 0)
    return float((side.mean(1) ** 2).mean())


def test_without_mixing_the_batch_is_unchanged() -> None:
    batch = images()
    mix = draw_mix(Mixing(smoothing=0.1), (20, 30), KeyedRng(0, "t"))
    assert mix == Mix()
    assert mix_images(batch, mix) is batch


def test_a_label_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match="labels must be 0 to 2, found 0 to 3"):
        soft_targets(LABELS, 3)
    with pytest.raises(ValueError, match="labels must be 0 to 3, found -1"):
        soft_targets(np.array([-1, 2]), 4)


@pytest.mark.parametrize(
    "settings", [{"mixup": -1}, {"cutmix": -1}, {"cutmix_probability": 2}, {"smoothing": 1.0}]
)
def test_settings_out_of_range_are_refused_by_name(settings: dict) -> None:
    with pytest.raises(ValueError, match=f"^mixing.{next(iter(settings))}: expected .*, found"):
        Mixing(**settings)
