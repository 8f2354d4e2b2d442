"""AdamW on a CPU in one pass over memory, in place.

MLX runs the update of `arm_mlx.update` as fifteen passes over all parameters, which takes two fifths of a
base model's step. These Numba kernels read and write each value once, in the arrays' own memory. Sums are
taken chunk by chunk, so results do not depend on the number of threads.
"""

# Compiled code has no Python types: Numba finds them from the arrays of the first call.
# mypy: disallow-untyped-defs=False, disallow-untyped-calls=False

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import mlx.core as mx
import numba as nb
import numpy as np

from arm_core import cpu_kernels
from arm_core.engine.optimizer import CLIP_EPS, OptimizerSettings, ParameterGroup
from arm_core.engine.protocol import Array
from arm_mlx.update import Arrays, Moments

CHUNK = 1 << 14
"""Values that one thread processes at a time: five arrays of them fit the second-level cache."""
_KERNEL: dict[str, Any] = {"parallel": True, "cache": True, "boundscheck": False, "error_model": "numpy"}


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
    """Same as `arm_mlx.update.update`, in place: it returns the given arrays with new contents."""
    mx.eval(loss, rates, gradients)
    views = {name: _view(mx.contiguous(gradient)) for name, gradient in gradients.items()}
    norm = gradient_norm(views.values())
    if not np.isfinite(np.asarray(loss) + norm):
        return parameters, mx.array(float(norm))
    factor = 1.0 if settings.clip is None else min(settings.clip / (norm + CLIP_EPS), 1.0)
    lr, *corrections = np.asarray(rates).tolist()
    (beta1, beta2), eps, follow = settings.betas, settings.eps, 1.0 - (settings.ema_decay or 1.0)
    for group in groups:
        rate = lr * group.lr_scale
        decay, rate = 1.0 - rate * group.weight_decay, rate / corrections[0]
        numbers = factor, beta1, 1 - beta1, beta2, 1 - beta2, 1 / corrections[1], eps, decay, rate, follow
        scalars = np.array(numbers, np.float32)
        for name in group.names:
            kept = (_view(a[name]) for a in (parameters, moments.exp_avg, moments.exp_avg_sq))
            ema = _view(moments.ema[name]) if moments.ema else np.empty(0, np.float32)
            cpu_kernels.run(_adamw, None, *kept, ema, views[name], scalars)
    return parameters, mx.array(float(norm))


def gradient_norm(gradients: Iterable[Array]) -> np.float32:
    """L2 norm over all one-dimensional gradients; infinite if the squares are too large for float32."""
    total = np.zeros(1, np.float64)
    for gradient in gradients:
        cpu_kernels.run(_add_squares, None, gradient, total)
    with np.errstate(over="ignore"):
        return np.float32(np.sqrt(total[0].astype(np.float32)))


def _view(array: mx.array) -> Array:
    """A one-dimensional view of a row-contiguous float32 array on the CPU, without a copy."""
    found: Array = np.asarray(array)
    assert found.flags.c_contiguous, "an array to be updated in place is not contiguous"
    return found.reshape(-1)


@nb.njit(**_KERNEL)
def _adamw(p, m, v, ema, gradient, scalars):
    factor, beta1, rest1, beta2, rest2, larger, eps, decay, rate, follow = scalars
    for chunk in nb.prange(-(-p.size // CHUNK)):
        part = slice(chunk * CHUNK, min((chunk + 1) * CHUNK, p.size))
        p_, m_, v_, g_ = p[part], m[part], v[part], gradient[part]
        for i in range(p_.size):
            g = g_[i] * factor
            m_[i] = beta1 * m_[i] + rest1 * g
            v_[i] = beta2 * v_[i] + rest2 * (g * g)
            p_[i] = p_[i] * decay - rate * m_[i] / (np.sqrt(v_[i] * larger) + eps)
        if ema.size:
            e_ = ema[part]
            for i in range(p_.size):
                e_[i] += follow * (p_[i] - e_[i])


@nb.njit(**_KERNEL)
def _add_squares(x, total):
    sums = np.empty(-(-x.size // CHUNK), np.float64)
    for chunk in nb.prange(sums.size):
        sums[chunk] = _squares(x[chunk * CHUNK : (chunk + 1) * CHUNK])
    for part in sums:
        total[0] += part


@nb.njit(fastmath={"reassoc", "contract", "nsz"}, error_model="numpy")  # keeps NaN and infinity
def _squares(x):
    total = np.float32(0.0)
    for i in range(x.size):
        total += x[i] * x[i]
    return total
