"""Times of the selective scan alone, for `arm bench scan`.

Times include the whole operator with softplus, mean over directions and gate. Rates count the bytes that
every implementation has to move: operands and results, each once.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from arm_core.model.spec import ModelSpec
from arm_core.model.tokens import direction_orders

PATIENCE = 3.0
"""Seconds after which a measurement stops repeating."""


@dataclass(frozen=True, kw_only=True)
class ScanShape:
    """Sizes of one scan, as in a layer of a model."""

    spec: ModelSpec
    batch: int
    bfloat16: bool = False
    """Whether the per-token operands are bfloat16; else float32."""

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """Directions, images, tokens, channels, states."""
        encoder = self.spec.encoder
        return self.spec.directions, self.batch, self.spec.tokens, encoder.width, encoder.state

    def __str__(self) -> str:
        return " ".join(f"{name}={size}" for name, size in zip("KBLDN", self.sizes, strict=True))

    @property
    def forward_bytes(self) -> int:
        """u, dt, B, C and z, and the result."""
        K, B, L, D, N = self.sizes
        return (2 if self.bfloat16 else 4) * B * L * (K * (2 * D + 2 * N) + 2 * D)

    @property
    def both_bytes(self) -> int:
        """Bytes of the forward pass plus, for the backward pass, its operands again and all gradients."""
        K, B, L, D, N = self.sizes
        back = (2 if self.bfloat16 else 4) * B * L * (2 * K * (2 * D + 2 * N) + 3 * D)
        return self.forward_bytes + back

    def arrays(self) -> dict[str, npt.NDArray[np.float32]]:
        """Operands by name, float32, with step sizes as in a fresh model."""
        rng = np.random.default_rng(0)
        K, B, L, D, N = self.sizes

        def normal(*shape: int) -> npt.NDArray[np.float32]:
            return rng.standard_normal(shape, dtype=np.float32)

        return {
            "u": normal(K, B, L, D),
            "dt": normal(K, B, L, D) - 4.0,
            "A": -np.broadcast_to(np.arange(1, N + 1, dtype=np.float32), (K, D, N)).copy(),
            "B": normal(K, B, L, N),
            "C": normal(K, B, L, N),
            "D": np.ones((K, D), np.float32),
            "dt_bias": np.zeros((K, D), np.float32),
            "z": normal(B, L, D),
        }

    def order(self) -> npt.NDArray[np.int32]:
        """Tokens of each direction, (K, L)."""
        return direction_orders(self.spec)


BY_TOKEN = ("u", "dt", "B", "C", "z")
"""Operands that are bfloat16 on request; the others are always float32."""


@dataclass(frozen=True, kw_only=True)
class ScanTimes:
    """Seconds of each repeat."""

    forward: list[float]
    """Without saving anything for a backward pass."""
    both: list[float]
    """Forward and backward, with all gradients."""


class ScanTimer(Protocol):
    """Times scans on one device of a backend."""

    device: str
    """The name that is printed."""

    def copy_rate(self) -> float:
        """Bytes per second that the device reads and writes when it copies a large array."""

    def time(self, shape: ScanShape, scan: str, *, repeats: int) -> ScanTimes:
        """Raises ValueError if this scan cannot run on the device."""

    def tune(self, shape: ScanShape, *, repeats: int) -> Iterator[tuple[str, ScanTimes]]:
        """Measure every choice of the kernels' constants, each as an entry of their table.

        Raises ValueError if the kernels have no constants to choose.
        """


def repeat(run: Callable[[], object], repeats: int) -> list[float]:
    """Seconds of each run, after a warm-up run; fewer than `repeats` runs after PATIENCE seconds."""
    run()
    times: list[float] = []
    while not times or (len(times) < repeats and sum(times) < PATIENCE):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return times


def median(times: list[float]) -> float:
    return float(statistics.median(times))
