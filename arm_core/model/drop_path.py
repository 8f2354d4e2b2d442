"""Stochastic depth (arXiv:1603.09382): which residual branches a sample skips, drawn outside the engines."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from arm_core.model.rng import KeyedRng

Array = npt.NDArray[np.float32]

BRANCHES = 2
"""Residual branches of a block: the mixer, then the MLP."""


def drop_rates(rate: float, depth: int) -> npt.NDArray[np.float64]:
    """Probability of a drop in each block, `(depth,)`: 0, then `linspace(0, rate, depth)` without its end.

    The official code prepends a 0 and indexes by block, so the rates stand one block late: the first
    two blocks never drop, and the last one drops a little less than `rate`.
    """
    if not 0 <= rate < 1:
        raise ValueError(f"drop path: expected a rate of 0 or more and below 1, found {rate!r}")
    return np.concatenate([[0.0], np.linspace(0.0, rate, depth)])[:depth]


def drop_path_scale(rate: float, depth: int, batch: int, *, seed: int, position: int) -> Array:
    """Factors of the branches of one micro-batch, `(depth, 2, B)` float32: 0, or 1 / (1 - rate of the block).

    Every branch of every sample is drawn for itself, by (seed, position) alone: position is the number of
    the micro-batch within the run, so a resumed run, another backend or another machine draws the same.
    """
    keep = 1.0 - drop_rates(rate, depth)[:, None, None]  # (depth, 1, 1)
    draws = KeyedRng(seed, f"drop_path/{position}").uniform(depth * BRANCHES * batch)
    kept = draws.reshape(depth, BRANCHES, batch) < keep
    return np.where(kept, 1.0 / keep, 0.0).astype(np.float32)
