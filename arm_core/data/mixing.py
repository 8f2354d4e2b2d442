"""The draws of Mixup and CutMix per batch, and soft targets, as defined in timm."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from arm_core.engine.byte_images import Box, Mix
from arm_core.model.checks import NOT_NEGATIVE, PART, Range, check_ranges
from arm_core.model.rng import KeyedRng

Array = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Mixing:
    """Settings of a classifier's targets. Official finetuning: mixup 0.8, cutmix 1.0, smoothing 0.1."""

    mixup: float = 0.0
    """Alpha of the Beta(alpha, alpha) for the weight of two blended images; 0 for none."""
    cutmix: float = 0.0
    """Alpha of the Beta(alpha, alpha) for the size of a pasted rectangle; 0 for none."""
    cutmix_probability: float = 0.5
    """Probability of CutMix for a batch if both are enabled."""
    smoothing: float = 0.0
    """Part of each target that is distributed evenly over all classes."""

    def __post_init__(self) -> None:
        check_ranges(
            "mixing",
            self,
            mixup=NOT_NEGATIVE,
            cutmix=NOT_NEGATIVE,
            cutmix_probability=PART,
            smoothing=Range(low=0, below=1),
        )


OFFICIAL_MIXING = Mixing(mixup=0.8, cutmix=1.0, smoothing=0.1)


def draw_mix(settings: Mixing, size: tuple[int, int], rng: KeyedRng) -> Mix:
    """Draw the mixing of a batch of images of `size` (height, width)."""
    if not settings.mixup and not settings.cutmix:
        return Mix()
    both = bool(settings.mixup and settings.cutmix)
    if not (rng.chance(settings.cutmix_probability) if both else settings.cutmix):
        return Mix(weight=rng.beta(settings.mixup))
    part = math.sqrt(1.0 - rng.beta(settings.cutmix))
    half_height, half_width = int(size[0] * part) // 2, int(size[1] * part) // 2
    middle_y, middle_x = rng.below(size[0]), rng.below(size[1])
    top, bottom = max(middle_y - half_height, 0), min(middle_y + half_height, size[0])
    left, right = max(middle_x - half_width, 0), min(middle_x + half_width, size[1])
    # The rectangle is clipped at the border, so the weight follows from its remaining area.
    pasted = (bottom - top) * (right - left) / (size[0] * size[1])
    return Mix(weight=1.0 - pasted, box=Box(top, bottom, left, right))


def soft_targets(labels: Labels, classes: int, *, smoothing: float = 0.0, mix: Mix | None = None) -> Array:
    """(B,) labels to (B, classes) probabilities: smoothed, then mixed like the images.

    A smoothed target is smoothing / classes everywhere, plus 1 - smoothing at the label.
    """
    if labels.size and not 0 <= labels.min() <= labels.max() < classes:
        raise ValueError(f"labels must be 0 to {classes - 1}, found {labels.min()} to {labels.max()}")
    targets = np.full((len(labels), classes), smoothing / classes, np.float64)
    targets[np.arange(len(labels)), labels] += 1.0 - smoothing
    if mix is not None:
        targets = targets * mix.weight + targets[::-1] * (1.0 - mix.weight)
    return targets.astype(np.float32)
