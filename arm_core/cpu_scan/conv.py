"""Kernels of the directional convolution; `arm_core.cpu_scan` says how to call them.

One task is one image and `LANES` channels, for all directions; tasks share nothing that they write. x is
read through a C-ordered array whose rows may be longer than D, so sizes are taken from the weight.
"""

# Compiled code has no Python types: Numba finds them from the arrays of the first call.
# mypy: disallow-untyped-defs=False, disallow-untyped-calls=False
# mypy: disable-error-code="call-arg,var-annotated"

from __future__ import annotations

import numba as nb

from arm_core.cpu_scan.functions import F4, INLINE, KERNEL, TASK, sigmoid, vectors
from arm_core.cpu_scan.simd import LANES, fill, fma, load, prefetch, store

AHEAD = 8
"""Tokens between asking for memory and using it."""


@nb.njit(**INLINE)
def _in_scan_order(x, b, order, k, c, before, rows):
    """rows[before + t] = x at step t of direction k, with `before` rows of 0 in front."""
    for t in range(before):
        store(rows, (t, 0), fill(F4(0.0)))
    for t in range(order.shape[1]):
        if t + AHEAD < order.shape[1]:
            prefetch(x, (b, order[k, t + AHEAD], c))
        store(rows, (before + t, 0), load(x, (b, order[k, t], c)))


@nb.njit(**INLINE)
def _taps(weight, k, c, rows):
    """rows[j] = tap j of `LANES` channels."""
    for lane in range(LANES):
        for j in range(weight.shape[2]):
            rows[j, lane] = weight[k, c + lane, j]


@nb.njit(**INLINE)
def _convolve(steps, t, weights, taps, bias):
    total = bias
    for j in range(taps):
        total = fma(load(steps, (t + j, 0)), load(weights, (j, 0)), total)
    return total


@nb.njit(**TASK)
def _conv_forward_task(b, c, x, weight, bias, order, u):
    directions, _, taps = weight.shape
    length = order.shape[1]
    steps, weights = vectors(length + taps - 1), vectors(taps)
    for k in range(directions):
        _in_scan_order(x, b, order, k, c, taps - 1, steps)
        _taps(weight, k, c, weights)
        shift = load(bias, (k, c))
        for t in range(length):
            if t + AHEAD < length:
                prefetch(u, (k, b, order[k, t + AHEAD], c))
            total = _convolve(steps, t, weights, taps, shift)
            store(u, (k, b, order[k, t], c), total * sigmoid(total))


@nb.njit(**KERNEL)
def conv_forward(x, weight, bias, order, u):
    """u (K, B, L, D) = silu(bias + causal convolution of x along each direction)."""
    blocks = weight.shape[1] // LANES
    for task in nb.prange(u.shape[1] * blocks):
        _conv_forward_task(task // blocks, task % blocks * LANES, x, weight, bias, order, u)


@nb.njit(**TASK)
def _conv_backward_task(b, c, grad_u, x, weight, bias, order, grad_x, part_weight, part_bias):
    directions, _, taps = weight.shape
    length = order.shape[1]
    steps, weights = vectors(length + taps - 1), vectors(taps)
    grad_steps, grad_weights, grad_tokens = vectors(length + taps - 1), vectors(taps), vectors(length)
    for t in range(length):
        store(grad_tokens, (t, 0), fill(F4(0.0)))
    for t in range(length, length + taps - 1):  # no outputs after the last
        store(grad_steps, (t, 0), fill(F4(0.0)))
    for k in range(directions):
        _in_scan_order(x, b, order, k, c, taps - 1, steps)
        _taps(weight, k, c, weights)
        for j in range(taps):
            store(grad_weights, (j, 0), fill(F4(0.0)))
        shift, grad_shift = load(bias, (k, c)), fill(F4(0.0))
        for t in range(length):
            if t + AHEAD < length:
                prefetch(grad_u, (k, b, order[k, t + AHEAD], c))
            total = _convolve(steps, t, weights, taps, shift)
            s = sigmoid(total)
            g = load(grad_u, (k, b, order[k, t], c)) * s * fma(total, F4(1.0) - s, F4(1.0))
            store(grad_steps, (t, 0), g)
            grad_shift = grad_shift + g
            for j in range(taps):
                store(grad_weights, (j, 0), fma(g, load(steps, (t + j, 0)), load(grad_weights, (j, 0))))
        for t in range(length):
            p = order[k, t]
            g = load(grad_tokens, (p, 0))
            for j in range(taps):
                g = fma(load(grad_steps, (t + taps - 1 - j, 0)), load(weights, (j, 0)), g)
            store(grad_tokens, (p, 0), g)
        store(part_bias, (b, k, c), grad_shift)
        for j in range(taps):
            store(part_weight, (b, k, j, c), load(grad_weights, (j, 0)))
    for p in range(length):
        store(grad_x, (b, p, c), load(grad_tokens, (p, 0)))


@nb.njit(**KERNEL)
def conv_backward(grad_u, x, weight, bias, order, grad_x, part_weight, part_bias):
    """grad_x (B, L, D); part_weight (B, K, W, D) and part_bias (B, K, D) are to be summed over images."""
    blocks = weight.shape[1] // LANES
    for task in nb.prange(grad_x.shape[0] * blocks):
        b, c = task // blocks, task % blocks * LANES
        _conv_backward_task(b, c, grad_u, x, weight, bias, order, grad_x, part_weight, part_bias)
