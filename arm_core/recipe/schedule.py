"""The learning rate over a run: linear warm-up, then half a cosine."""

from __future__ import annotations

import math
from dataclasses import dataclass

REFERENCE_BATCH = 256
"""Images per update to which `base_lr` of a recipe refers."""


def scaled_lr(base_lr: float, batch_size: int) -> float:
    """Linear scaling rule: `base_lr` * images per update / 256."""
    return base_lr * batch_size / REFERENCE_BATCH


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Learning rate at time t of a run of `length`, both in steps or both in epochs.

        t < warmup:  lr t / warmup
        after that:  min_lr + (lr - min_lr) (1 + cos(pi (t - warmup) / (length - warmup))) / 2

    As in MAE (arXiv:2111.06377) and ARM, t is the time at which an update begins, so with a warm-up the
    first update has learning rate 0.
    """

    lr: float
    """Learning rate at the end of the warm-up."""
    min_lr: float
    """Learning rate at the end of the run."""
    warmup: float
    length: float

    def __post_init__(self) -> None:
        if not 0 <= self.min_lr <= self.lr:
            raise ValueError(
                f"schedule: expected 0 <= min_lr <= lr, found min_lr {self.min_lr:g} and lr {self.lr:g}"
            )
        if not 0 <= self.warmup <= self.length:
            raise ValueError(f"schedule: expected a warm-up of 0 to {self.length:g}, found {self.warmup:g}")

    def at(self, t: float) -> float:
        """Learning rate at time t >= 0; after the end it stays at `min_lr`."""
        if t < self.warmup:
            return self.lr * t / self.warmup
        if t >= self.length:
            return self.min_lr if self.length > self.warmup else self.lr
        progress = (t - self.warmup) / (self.length - self.warmup)
        return self.min_lr + (self.lr - self.min_lr) * 0.5 * (1.0 + math.cos(math.pi * progress))
