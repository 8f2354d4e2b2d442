"""RandAugment (arXiv:1909.13719), the same as timm's `rand-m9-mstd0.5-inc1`.

Two of fifteen operations are drawn per image, with replacement, and each is skipped half of the time. A
higher magnitude means a stronger change for every operation ("increasing"). Geometric operations sample
bicubically and fill with the mean colour.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image, ImageChops, ImageEnhance, ImageOps

from arm_core.model.checks import NOT_NEGATIVE, PART, Range, check_ranges, check_whole
from arm_core.model.rng import KeyedRng

LEVELS = 10
"""Largest magnitude."""

MAX_ROTATION, MAX_SHEAR, MAX_SHIFT = 30.0, 0.3, 0.45
"""Values at the largest magnitude: degrees, slope, and fraction of the side."""
MAX_ENHANCE = 0.9
"""Largest change of an enhancement factor, whose neutral value is 1."""
SOLARIZE_ADD_BELOW = 128
"""`solarize_add` increases values below this."""

Fill = tuple[int, int, int]
Operation = Callable[[Image.Image, float, Fill], Image.Image]
"""(image, strength, fill) -> image; strength is magnitude / 10, negated half of the time if `SIGNED`."""


@dataclass(frozen=True, kw_only=True)
class RandAugment:
    """Number and strength of the operations; the defaults are those of official finetuning."""

    operations: int = 2
    """Operations drawn per image."""
    magnitude: float = 9.0
    """Mean strength, 0 to 10."""
    magnitude_std: float = 0.5
    """Standard deviation of the strength from one operation to the next."""
    probability: float = 0.5
    """Probability of applying a drawn operation."""

    def __post_init__(self) -> None:
        check_whole("rand_augment", Range(low=1, high=100), operations=self.operations)
        check_ranges(
            "rand_augment",
            self,
            magnitude=Range(low=0, high=LEVELS),
            magnitude_std=NOT_NEGATIVE,
            probability=PART,
        )


def rand_augment(
    image: Image.Image,
    settings: RandAugment,
    *,
    fill: tuple[float, float, float],
    rng: KeyedRng,
    trace: list[str] | None = None,
) -> Image.Image:
    """Apply randomly drawn operations; `fill` is a colour of values 0..1. `trace` receives their names."""
    color = (round(255 * fill[0]), round(255 * fill[1]), round(255 * fill[2]))
    names = tuple(OPERATIONS)
    for name in [names[rng.below(len(names))] for _ in range(settings.operations)]:
        if rng.chance(settings.probability):
            magnitude = min(max(rng.gaussian(settings.magnitude, settings.magnitude_std), 0.0), LEVELS)
            sign = -1.0 if name in SIGNED and rng.chance(0.5) else 1.0
            image = OPERATIONS[name](image, sign * magnitude / LEVELS, color)
            if trace is not None:
                trace.append(f"{name.replace('_', ' ')} {sign * magnitude:.2g}")
    return image


def _affine(image: Image.Image, matrix: tuple[float, ...], fill: Fill) -> Image.Image:
    return image.transform(
        image.size, Image.Transform.AFFINE, matrix, resample=Image.Resampling.BICUBIC, fillcolor=fill
    )


def auto_contrast(image: Image.Image, strength: float, fill: Fill) -> Image.Image:
    return ImageOps.autocontrast(image)


def equalize(image: Image.Image, strength: float, fill: Fill) -> Image.Image:
    return ImageOps.equalize(image)


def invert(image: Image.Image, strength: float, fill: Fill) -> Image.Image:
    return ImageChops.invert(image)


def rotate(image: Image.Image, strength: float, fill: Fill) -> Image.Image:
    return image.rotate(strength * MAX_ROTATION, Image.Resampling.BICUBIC, fillcolor=fill)


def posterize(image: Image.Image, strength: float, fill: Fill) -> Image.Image:
    """Keep the highest 4 - int(4 strength) bits of each value."""
    bits = 4 - int(4 * strength)
    keep = 0xFF & ~(0xFF >> bits)
    return image.point([value & keep for value in range(256)] * 3)


def solarize(image: Image.Image, strength: float, fill: Fill) -> Image.Image:
    """Invert values from the threshold 256 - int(256 strength) upwards."""
    return ImageOps.solarize(image, 256 - min(256, int(256 * strength)))


def solarize_add(image: Image.Image, strength: float, fill: Fill) -> Image.Image:
    """Add int(110 strength) to the darker half of the values."""
    added = min(128, int(110 * strength))
    return image.point([min(255, v + added) if v < SOLARIZE_ADD_BELOW else v for v in range(256)] * 3)


def _enhance_factor(strength: float) -> float:
    return 1.0 + MAX_ENHANCE * strength


def color(image: Image.Image, strength: float, fill: Fill) -> Image.Image:
    return ImageEnhance.Color(image).enhance(_enhance_factor(strength))


def contrast(image: Image.Image, strength: float, fill: Fill) -> Image.Image:
    return ImageEnhance.Contrast(image).enhance(_enhance_factor(strength))


def brightness(image: Image.Image, strength: float, fill: Fill) -> Image.Image:
    return ImageEnhance.Brightness(image).enhance(_enhance_factor(strength))


def sharpness(image: Image.Image, strength: float, fill: Fill) -> Image.Image:
    return ImageEnhance.Sharpness(image).enhance(_enhance_factor(strength))


def shear_x(image: Image.Image, strength: float, fill: Fill) -> Image.Image:
    return _affine(image, (1, MAX_SHEAR * strength, 0, 0, 1, 0), fill)


def shear_y(image: Image.Image, strength: float, fill: Fill) -> Image.Image:
    return _affine(image, (1, 0, 0, MAX_SHEAR * strength, 1, 0), fill)


def translate_x(image: Image.Image, strength: float, fill: Fill) -> Image.Image:
    return _affine(image, (1, 0, MAX_SHIFT * strength * image.width, 0, 1, 0), fill)


def translate_y(image: Image.Image, strength: float, fill: Fill) -> Image.Image:
    return _affine(image, (1, 0, 0, 0, 1, MAX_SHIFT * strength * image.height), fill)


OPERATIONS: dict[str, Operation] = {
    "auto_contrast": auto_contrast,
    "equalize": equalize,
    "invert": invert,
    "rotate": rotate,
    "posterize": posterize,
    "solarize": solarize,
    "solarize_add": solarize_add,
    "color": color,
    "contrast": contrast,
    "brightness": brightness,
    "sharpness": sharpness,
    "shear_x": shear_x,
    "shear_y": shear_y,
    "translate_x": translate_x,
    "translate_y": translate_y,
}
"""All fifteen; the result of a seed depends on their order."""

SIGNED = frozenset(
    (
        "rotate",
        "color",
        "contrast",
        "brightness",
        "sharpness",
        "shear_x",
        "shear_y",
        "translate_x",
        "translate_y",
    )
)
"""Operations that work in both directions."""
