"""RandAugment: the effect, strength and frequency of each operation."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from PIL import Image

from arm_core.data import IMAGENET_MEAN, RandAugment
from arm_core.data import augment as augment_module
from arm_core.data.augment import OPERATIONS, SIGNED, rand_augment
from arm_core.model.rng import KeyedRng

FILL = (124, 116, 104)
RAMP = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, 2)
"""All 256 values in one row."""


def apply(name: str, pixels: np.ndarray, strength: float) -> np.ndarray:
    return np.asarray(OPERATIONS[name](Image.fromarray(pixels), strength, FILL))


def colours(height: int = 40, width: int = 60) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_all_fifteen_operations_of_the_official_recipe_exist() -> None:
    assert len(OPERATIONS) == 15
    assert set(OPERATIONS) > SIGNED


@pytest.mark.parametrize(
    ("strength", "kept"), [(0.0, 0xF0), (0.25, 0xE0), (0.74, 0xC0), (0.9, 0x80), (1.0, 0x00)]
)
def test_posterize_keeps_fewer_bits_the_stronger_it_is(strength: float, kept: int) -> None:
    np.testing.assert_array_equal(apply("posterize", RAMP, strength), RAMP & kept)


@pytest.mark.parametrize(("strength", "threshold"), [(0.0, 256), (0.5, 128), (0.9, 26), (1.0, 0)])
def test_solarize_inverts_from_its_threshold_upwards(strength: float, threshold: int) -> None:
    np.testing.assert_array_equal(
        apply("solarize", RAMP, strength), np.where(threshold > RAMP, RAMP, 255 - RAMP)
    )


def test_solarize_add_lifts_the_darker_half_only() -> None:
    out = apply("solarize_add", RAMP, 0.9).astype(int)
    np.testing.assert_array_equal(out, np.where(RAMP < 128, RAMP.astype(int) + 99, RAMP))


def test_invert_and_equalize_and_auto_contrast() -> None:
    np.testing.assert_array_equal(apply("invert", RAMP, 0.3), 255 - RAMP)
    dull = np.tile(((np.linspace(0, 1, 256) ** 2) * 100 + 50).astype(np.uint8)[None, :, None], (20, 1, 3))
    stretched, equal = apply("auto_contrast", dull, 0.3), apply("equalize", dull, 0.3)
    assert stretched.max() - stretched.min() > 250
    np.testing.assert_allclose(stretched, (dull - 50.0) * 2.55, atol=2)
    # Equalised values grow with the share of pixels, which is uniform along the row.
    np.testing.assert_allclose(equal[0, 30:, 0], np.arange(30, 256), atol=15)


@pytest.mark.parametrize(("strength", "factor"), [(0.9, 1.81), (-0.9, 0.19), (-1.0, 0.1), (0.0, 1.0)])
def test_brightness_multiplies_by_its_factor(strength: float, factor: float) -> None:
    out = apply("brightness", RAMP, strength).astype(float)
    assert np.abs(out - np.minimum(RAMP * factor, 255)).max() <= 1


def test_color_and_contrast_move_away_from_grey_or_towards_it() -> None:
    pixels = colours() // 4 + 96
    for name, spread in (("color", np.ptp(pixels, axis=-1).mean()), ("contrast", pixels.std())):

        def measure(strength: float, name: str = name) -> float:
            out = apply(name, pixels, strength)
            return float(np.ptp(out, axis=-1).mean() if name == "color" else out.std())

        assert measure(0.5) == pytest.approx(1.45 * spread, rel=0.05)
        assert measure(-0.5) == pytest.approx(0.55 * spread, rel=0.05)
    np.testing.assert_array_equal(apply("color", RAMP, 0.9), RAMP)  # grey has no colour to change
    assert (apply("contrast", RAMP, -0.9) != RAMP).any()


def test_sharpness_sharpens_and_blurs() -> None:
    pixels = colours()

    def detail(out: np.ndarray) -> float:
        return float(np.abs(np.diff(out.astype(float), axis=1)).mean())

    assert detail(apply("sharpness", pixels, 0.9)) > detail(pixels) > detail(apply("sharpness", pixels, -0.9))
    halves = np.repeat(np.array([[[60, 60, 60], [200, 200, 200]]], np.uint8), 8, axis=1).repeat(8, axis=0)
    for strength in (0.9, -0.9):
        changed = (apply("sharpness", halves, strength) != halves).any((0, 2))
        assert np.flatnonzero(changed).tolist() == [7, 8]  # at the edge, and nowhere else


@pytest.mark.parametrize(("name", "axis"), [("translate_x", 1), ("translate_y", 0)])
def test_translate_moves_by_a_part_of_the_side_and_fills_with_the_mean_colour(name: str, axis: int) -> None:
    pixels = colours(40, 60)
    moved = round(0.45 * 0.5 * pixels.shape[axis])
    strength = moved / (0.45 * pixels.shape[axis])
    out = np.moveaxis(apply(name, pixels, strength), axis, 0)
    source = np.moveaxis(pixels, axis, 0)
    np.testing.assert_array_equal(out[: len(source) - moved], source[moved:])
    assert (out[len(source) - moved :] == FILL).all()


@pytest.mark.parametrize(("name", "axis"), [("shear_x", 0), ("shear_y", 1)])
def test_shear_slides_each_line_by_its_distance(name: str, axis: int) -> None:
    line = np.zeros((64, 64, 3), np.uint8)
    if axis == 0:
        line[:, 30:33] = 255
    else:
        line[30:33] = 255
    out = apply(name, line, -1.0)[..., 0].astype(float)
    out[out == FILL[0]] = 0
    out = out if axis == 0 else out.T
    places = (out * np.arange(64)).sum(1) / out.sum(1)
    slopes = np.diff(places[4:60])
    assert slopes.mean() == pytest.approx(0.3, abs=0.02)


def test_rotate_turns_by_up_to_thirty_degrees_about_the_centre() -> None:
    pixels = np.zeros((101, 101, 3), np.uint8)
    pixels[49:52, 80:83] = 255
    out = apply("rotate", pixels, 0.5)[..., 1].astype(float)
    out[out == FILL[1]] = 0
    rows, columns = np.mgrid[:101, :101]
    y, x = (rows * out).sum() / out.sum() - 50, (columns * out).sum() / out.sum() - 50
    assert np.degrees(np.arctan2(-y, x)) == pytest.approx(15, abs=0.5)
    assert np.hypot(x, y) == pytest.approx(31, abs=0.5)


def test_operations_are_drawn_evenly_applied_half_of_the_time_and_near_their_magnitude(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[tuple[str, float]] = []

    def spy(name: str):
        def operation(image: Image.Image, strength: float, fill: tuple[int, int, int]) -> Image.Image:
            assert fill == FILL
            seen.append((name, strength))
            return image

        return operation

    monkeypatch.setattr(augment_module, "OPERATIONS", {name: spy(name) for name in OPERATIONS})
    image, images = Image.new("RGB", (4, 4)), 6000
    for i in range(images):
        rand_augment(image, RandAugment(), fill=IMAGENET_MEAN, rng=KeyedRng(0, "t", i))
    assert len(seen) == pytest.approx(images, rel=0.04)  # two drawn, each with probability one half
    counts = Counter(name for name, _ in seen)
    assert min(counts.values()) > 0.75 * images / 15
    assert max(counts.values()) < 1.25 * images / 15
    strengths = np.array([abs(strength) for _, strength in seen])
    assert strengths.max() == 1.0
    assert np.median(strengths) == pytest.approx(0.9, abs=0.003)
    assert np.quantile(strengths, 0.16) == pytest.approx(0.85, abs=0.005)
    negative = Counter(name for name, strength in seen if strength < 0)
    assert set(negative) == SIGNED
    assert sum(negative.values()) == pytest.approx(len(seen) * 9 / 15 / 2, rel=0.08)


@pytest.mark.parametrize(
    "settings", [{"operations": 0}, {"magnitude": 11}, {"magnitude_std": -1}, {"probability": 2}]
)
def test_settings_out_of_range_are_refused_by_name(settings: dict) -> None:
    with pytest.raises(ValueError, match=f"^rand_augment.{next(iter(settings))}: expected .*, found"):
        RandAugment(**settings)
