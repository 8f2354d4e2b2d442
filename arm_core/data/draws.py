"""Random numbers for data: one stream per purpose and place, so that order and workers do not matter."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from arm_core.parameters import Stream


class Draws(Stream):
    """A Philox stream keyed by (seed, purpose, counters), for example (7, "augment", epoch, index).

    What it yields depends on its key and on how often it was asked, on nothing else: any process can
    make any sample, at any time, and makes the same one.
    """

    def __init__(self, seed: int, purpose: str, *counters: int) -> None:
        super().__init__(seed, "/".join((purpose, *map(str, counters))))

    def between(self, low: float, high: float) -> float:
        """A number in [low, high)."""
        return low + (high - low) * float(self.uniform(1)[0])

    def chance(self, probability: float) -> bool:
        """True with that probability."""
        return float(self.uniform(1)[0]) < probability

    def below(self, count: int) -> int:
        """A whole number in 0..count - 1."""
        return int(float(self.uniform(1)[0]) * count)

    def gaussian(self, mean: float, std: float) -> float:
        return mean + std * float(self.normal(1)[0])

    def gamma(self, shape: float) -> float:
        """A Gamma(shape, 1) number: Marsaglia and Tsang (2000), with their boost for shapes below 1."""
        boost = 1.0 if shape >= 1 else (1.0 - self.between(0, 1)) ** (1.0 / shape)
        d = (shape if shape >= 1 else shape + 1.0) - 1.0 / 3.0
        while True:
            x = self.gaussian(0.0, 1.0)
            v = (1.0 + x / math.sqrt(9.0 * d)) ** 3
            if v > 0 and math.log1p(-self.between(0, 1)) < 0.5 * x * x + d - d * v + d * math.log(v):
                return d * v * boost

    def beta(self, alpha: float) -> float:
        """A Beta(alpha, alpha) number."""
        first, second = self.gamma(alpha), self.gamma(alpha)
        # Both can underflow to 0 where alpha is tiny; the distribution then sits at 0 and 1.
        return first / (first + second) if first + second > 0 else float(self.chance(0.5))

    def permutation(self, count: int) -> npt.NDArray[np.int64]:
        """0..count - 1 in random order; sorting raw draws, whose stream NumPy keeps for good."""
        return np.argsort(self._bits.random_raw(count), kind="stable")


@lru_cache(maxsize=4)
def epoch_order(seed: int, epoch: int, count: int) -> npt.NDArray[np.int64]:
    """The order in which an epoch visits `count` samples: `(count,)`, read-only."""
    order = Draws(seed, "shuffle", epoch).permutation(count)
    order.flags.writeable = False
    return order
