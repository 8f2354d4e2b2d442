"""Clipping, AdamW and the moving average as MLX operations: the update on a GPU.

On a GPU the whole step is compiled, and the operations below become one kernel per tensor. On a CPU,
`arm_mlx.cpu_update` does the same in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

from arm_core.engine.optimizer import CLIP_EPS, OptimizerSettings, ParameterGroup
from arm_core.engine.protocol import Array

Arrays = dict[str, mx.array]


@dataclass(frozen=True)
class Moments:
    """The optimizer's moments of every trainable parameter, by name; the dicts stay the same objects."""

    exp_avg: Arrays = field(default_factory=dict)
    exp_avg_sq: Arrays = field(default_factory=dict)
    ema: Arrays = field(default_factory=dict)
    """Empty unless an EMA is kept."""


def rates(step: int, lr: float, settings: OptimizerSettings) -> Array:
    """The values in the formula of `OptimizerSettings` that change from step to step: lr, 1 - b1^t, 1 - b2^t.

    They enter a compiled step as an array, so that no step is compiled again.
    """
    beta1, beta2 = settings.betas
    return np.array([lr, 1.0 - beta1**step, 1.0 - beta2**step], np.float32)


def update(
    parameters: Arrays,
    moments: Moments,
    gradients: Arrays,
    *,
    loss: mx.array,
    rates: mx.array,
    groups: Sequence[ParameterGroup],
    settings: OptimizerSettings,
) -> tuple[Arrays, mx.array]:
    """New values of all trainable parameters, and the gradient norm; `moments` is updated.

    rates: the result of the function `rates`.  If loss or norm is not finite, everything keeps its value.
    Nothing waits for the device.
    """
    norm = mx.sqrt(sum((mx.square(g).sum() for g in gradients.values()), mx.zeros(())))
    finite = mx.isfinite(loss + norm)
    factor = mx.array(1.0) if settings.clip is None else mx.minimum(settings.clip / (norm + CLIP_EPS), 1.0)
    lr, *corrections = rates
    new: Arrays = {}
    for group in groups:
        scale = lr * group.lr_scale
        decay, rate = 1.0 - scale * group.weight_decay, scale / corrections[0]
        for name in group.names:
            p, m, v = before = parameters[name], moments.exp_avg[name], moments.exp_avg_sq[name]
            g = gradients[name] * factor
            m = settings.betas[0] * m + (1.0 - settings.betas[0]) * g
            v = settings.betas[1] * v + (1.0 - settings.betas[1]) * mx.square(g)
            p = p * decay - rate * m / (mx.sqrt(v / corrections[1]) + settings.eps)
            new[name], moments.exp_avg[name], moments.exp_avg_sq[name] = (
                mx.where(finite, after, old) for old, after in zip(before, (p, m, v), strict=True)
            )
            if settings.ema_decay is not None:
                ema = moments.ema[name]
                change = (1.0 - settings.ema_decay) * (new[name] - ema)
                moments.ema[name] = mx.where(finite, ema + change, ema)
    return new, norm
