"""Confidence intervals of a mean over repeated runs, and of paired differences."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

STUDENT = (
    *(12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281),
    *(2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860),
)
"""97.5 % quantiles of Student's t with 1, 2, ... degrees of freedom."""
NORMAL = 1.959964

Key = TypeVar("Key")


@dataclass(frozen=True, kw_only=True)
class Interval:
    """Mean of repeated values and its 95 % confidence interval, mean ± half."""

    mean: float
    half: float | None
    """None for a single value."""
    count: int

    @property
    def sign(self) -> int:
        """1 or -1 if the interval is above or below 0; 0 if it contains 0 or there is one value."""
        if self.half is None or self.half >= abs(self.mean):
            return 0
        return 1 if self.mean > 0 else -1


def mean_interval(values: Sequence[float]) -> Interval:
    """Student's t interval; assumes that the values are about normally distributed.

    values: one or more.  Raises ValueError without values.
    """
    if not len(values):
        raise ValueError("interval: expected one value or more, found none")
    array = np.asarray(values, np.float64)
    if len(array) == 1:
        return Interval(mean=float(array[0]), half=None, count=1)
    half = student(len(array) - 1) * float(array.std(ddof=1)) / math.sqrt(len(array))
    return Interval(mean=float(array.mean()), half=half, count=len(array))


def paired_difference(values: Mapping[Key, float], reference: Mapping[Key, float]) -> Interval | None:
    """Interval of values minus reference, over the keys (seeds) that both have; None if they share none."""
    shared = [key for key in values if key in reference]
    return mean_interval([values[key] - reference[key] for key in shared]) if shared else None


def student(freedom: int) -> float:
    """97.5 % quantile of Student's t, from 1 degree of freedom; accurate to 5e-4."""
    if freedom <= len(STUDENT):
        return STUDENT[freedom - 1]
    # Cornish-Fisher expansion in 1 / freedom (Abramowitz and Stegun 26.7.5).
    z = NORMAL
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
