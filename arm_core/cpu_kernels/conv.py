"""Kernels of the directional convolution; see `arm_core.cpu_kernels` for their use.

Tokens are read in scan order, their channels in memory order. Tasks never write to the same memory. Weights
are (K, W, D). x is read through a C-ordered array whose rows may be longer than D, so sizes are taken from
the weights.
"""

# Compiled code has no Python types: Numba finds them from the arrays of the first call.
# mypy: disallow-untyped-defs=False, disallow-untyped-calls=False
# mypy: disable-error-code="call-arg,var-annotated"

from __future__ import annotations

import numba as nb

from arm_core.cpu_kernels.functions import F4, INLINE, KERNEL, TASK, sigmoid, vectors
from arm_core.cpu_kernels.simd import LANES, fill, fma, load, prefetch, store

HELPERS = "26083f01e77a"
"""Digest of `functions.py` and `simd.py`: Numba's cache checks this file only."""

TOKENS = 32
"""Tokens of a forward task, which computes all channels of one direction."""
CHANNELS = 4 * LANES
"""Channels of a backward task, which computes all tokens and directions of an image."""


@nb.njit(**INLINE)
def _convolve(x, weight, bias, order, b, k, t, c):
    """bias + sum_j weight[k, j] x[p_(t - W + 1 + j)] for `LANES` channels; 0 before the first token."""
    width = weight.shape[1]
    total = load(bias, (k, c))
    for j in range(max(width - 1 - t, 0), width):
        total = fma(load(x, (b, order[k, t - width + 1 + j], c)), load(weight, (k, j, c)), total)
    return total


@nb.njit(**TASK)
def _conv_forward_task(b, k, start, x, weight, bias, order, u):
    length = order.shape[1]
    for t in range(start, min(start + TOKENS, length)):
        after = order[k, min(t + 1, length - 1)]
        for c in range(0, weight.shape[2], LANES):
            prefetch(x, (b, after, c))
            prefetch(u, (k, b, after, c))
            total = _convolve(x, weight, bias, order, b, k, t, c)
            store(u, (k, b, order[k, t], c), total * sigmoid(total))


@nb.njit(**KERNEL)
def conv_forward(x, weight, bias, order, u):
    """u (K, B, L, D) = silu(bias + causal convolution of x along each direction)."""
    directions, batch, length, _ = u.shape
    chunks = (length + TOKENS - 1) // TOKENS
    for task in nb.prange(batch * directions * chunks):
        row, start = task // chunks, task % chunks * TOKENS
        _conv_forward_task(row // directions, row % directions, start, x, weight, bias, order, u)


@nb.njit(**TASK)
def _conv_backward_task(b, first, grad_u, x, weight, bias, order, grad_x, part_weight, part_bias):
    directions, width, channels = weight.shape
    length = order.shape[1]
    last = min(first + CHANNELS, channels)
    grad_steps = vectors((length + width - 1) * (CHANNELS // LANES)).reshape((length + width - 1, CHANNELS))
    for t in range(length, length + width - 1):  # no outputs after the last
        for c in range(0, CHANNELS, LANES):
            store(grad_steps, (t, c), fill(F4(0.0)))
    for k in range(directions):
        for c in range(first, last, LANES):
            store(part_bias, (b, k, c), fill(F4(0.0)))
            for j in range(width):
                store(part_weight, (b, k, j, c), fill(F4(0.0)))
        for t in range(length - 1, -1, -1):
            p, before = order[k, t], order[k, max(t - 1, 0)]
            for c in range(first, last, LANES):
                prefetch(grad_u, (k, b, before, c))
                total = _convolve(x, weight, bias, order, b, k, t, c)
                s = sigmoid(total)
                g = load(grad_u, (k, b, p, c)) * s * fma(total, F4(1.0) - s, F4(1.0))
                store(grad_steps, (t, c - first), g)
                store(part_bias, (b, k, c), load(part_bias, (b, k, c)) + g)
                for j in range(max(width - 1 - t, 0), width):
                    step = load(x, (b, order[k, t - width + 1 + j], c))
                    store(part_weight, (b, k, j, c), fma(g, step, load(part_weight, (b, k, j, c))))
                total = fill(F4(0.0)) if k == 0 else load(grad_x, (b, p, c))
                for j in range(width):
                    g = load(grad_steps, (t + width - 1 - j, c - first))
                    total = fma(g, load(weight, (k, j, c)), total)
                store(grad_x, (b, p, c), total)


@nb.njit(**KERNEL)
def conv_backward(grad_u, x, weight, bias, order, grad_x, part_weight, part_bias):
    """grad_x (B, L, D); part_weight (B, K, W, D) and part_bias (B, K, D) are to be summed over images."""
    groups = (weight.shape[2] + CHANNELS - 1) // CHANNELS
    for task in nb.prange(grad_x.shape[0] * groups):
        b, first = task // groups, task % groups * CHANNELS
        _conv_backward_task(b, first, grad_u, x, weight, bias, order, grad_x, part_weight, part_bias)
