"""Stochastic depth (arXiv:1603.09382): the residual branches that each sample skips, drawn in the core."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from arm_core.model.checks import Range
from arm_core.model.rng import KeyedRng

Array = npt.NDArray[np.float32]

RATES = Range(low=0, below=1)

BRANCHES = 2
"""Residual branches of a block: the mixer, then the MLP."""


def drop_rates(rate: float, depth: int) -> npt.NDArray[np.float64]:
    """Drop probability of each block, `(depth,)`: 0, then `linspace(0, rate, depth)` without its last value.

    The official code prepends a 0 and indexes by block, so the rates are shifted by one block: the first
    two blocks never drop, and the last block drops slightly less often than `rate`.
    """
    if rate not in RATES:
        raise ValueError(f"drop_path: expected {RATES}, found {rate!r}")
    return np.concatenate([[0.0], np.linspace(0.0, rate, depth)])[:depth]


def drop_path_scale(rate: float, depth: int, batch: int, *, seed: int, position: int) -> Array:
    """Factors of the branches of one micro-batch, `(depth, 2, B)` float32: 0, or 1 / (1 - rate of the block).

    Each branch of each sample is drawn independently. The draws depend on (seed, position) only, where
    position is the number of the micro-batch in the run, so every backend and machine draws the same.
    """
    keep = 1.0 - drop_rates(rate, depth)[:, None, None]  # (depth, 1, 1)
    draws = KeyedRng(seed, f"drop_path/{position}").uniform(depth * BRANCHES * batch)
    kept = draws.reshape(depth, BRANCHES, batch) < keep
    return np.where(kept, 1.0 / keep, 0.0).astype(np.float32)
