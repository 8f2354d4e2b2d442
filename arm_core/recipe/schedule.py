"""The learning rate over a run: linear warm-up, then half a cosine."""

from __future__ import annotations

import math
from dataclasses import dataclass

REFERENCE_BATCH = 256
"""Images per update that a recipe's `base_lr` is quoted for."""


def scaled_lr(base_lr: float, batch_size: int) -> float:
    """The linear scaling rule: `base_lr` times images per update / 256."""
    return base_lr * batch_size / REFERENCE_BATCH


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Learning rate at a moment t of a run that lasts `length`, in epochs or in steps alike.

        t < warmup:  lr t / warmup
        after that:  min_lr + (lr - min_lr) (1 + cos(pi (t - warmup) / (length - warmup))) / 2

    As in MAE (arXiv:2111.06377) and ARM, t is the fractional moment at which an update begins: the first
    update of a run with warm-up has rate 0.
    """

    lr: float
    """Rate at the end of the warm-up."""
    min_lr: float
    """Rate at the end of the run."""
    warmup: float
    length: float

    def __post_init__(self) -> None:
        if not 0 <= self.min_lr <= self.lr:
            raise ValueError(
                f"schedule: expected 0 <= min_lr <= lr, found min_lr {self.min_lr:g} and lr {self.lr:g}"
            )
        if not 0 <= self.warmup <= self.length:
            raise ValueError(f"schedule: a warm-up of {self.warmup:g} does not fit a run of {self.length:g}")

    def at(self, t: float) -> float:
        """Learning rate at moment t, 0 <= t; past the end it stays at `min_lr`."""
        if t < self.warmup:
            return self.lr * t / self.warmup
        if t >= self.length:
            return self.min_lr if self.length > self.warmup else self.lr
        progress = (t - self.warmup) / (self.length - self.warmup)
        return self.min_lr + (self.lr - self.min_lr) * 0.5 * (1.0 + math.cos(math.pi * progress))
