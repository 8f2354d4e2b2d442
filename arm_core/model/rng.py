"""Random numbers that depend only on a key: identical on every machine, in any order, in any process."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import numpy.typing as npt


class KeyedRng:
    """A Philox generator keyed by a seed and a name, such as (7, "augment", epoch, index).

    Its output depends only on the key and on earlier calls, so any process can generate any sample or
    initial value at any time, with the same result. It draws raw 32-bit words, a stream that NumPy keeps
    stable, and computes the distributions from them.
    """

    def __init__(self, seed: int, *key: str | int) -> None:
        name = "/".join(map(str, (seed, *key)))
        digest = hashlib.sha256(name.encode()).digest()
        self._bits = np.random.Philox(key=int.from_bytes(digest[:16], "little"))

    def uniform(self, count: int) -> npt.NDArray[np.float64]:
        """`count` numbers in [0, 1), multiples of 2^-32."""
        words = self._bits.random_raw((count + 1) // 2).astype("<u8").view("<u4")
        return np.asarray(words[:count] * 2.0**-32)

    def one(self) -> float:
        """`uniform(1)`, several times faster."""
        return (int(self._bits.random_raw()) & 0xFFFFFFFF) * 2.0**-32

    def normal(self, count: int) -> npt.NDArray[np.float64]:
        """`count` standard normal numbers (Box-Muller)."""
        half = (count + 1) // 2
        radius = np.sqrt(-2.0 * np.log1p(-self.uniform(half)))
        angle = 2.0 * np.pi * self.uniform(half)
        return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]

    def truncated_normal(self, count: int, limit: float) -> npt.NDArray[np.float64]:
        """`count` standard normal numbers within +-`limit`, by rejection."""
        kept = np.empty(0)
        while kept.size < count:
            draws = self.normal(count)
            kept = np.concatenate([kept, draws[np.abs(draws) < limit]])
        return kept[:count]

    def between(self, low: float, high: float) -> float:
        """A uniform number in [low, high)."""
        return low + (high - low) * self.one()

    def chance(self, probability: float) -> bool:
        """True with this probability."""
        return self.one() < probability

    def below(self, count: int) -> int:
        """A whole number from 0 to count - 1."""
        return int(self.one() * count)

    def gaussian(self, mean: float, std: float) -> float:
        return mean + std * float(self.normal(1)[0])

    def gamma(self, shape: float) -> float:
        """A Gamma(shape, 1) number: Marsaglia and Tsang (2000), with their method for shapes below 1."""
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
        # Both can underflow to 0 if alpha is tiny; the distribution is then concentrated at 0 and 1.
        return first / (first + second) if first + second > 0 else float(self.chance(0.5))

    def permutation(self, count: int) -> npt.NDArray[np.int64]:
        """0 to count - 1 in random order; sorts raw words, whose stream NumPy keeps stable."""
        return np.argsort(self._bits.random_raw(count), kind="stable")
