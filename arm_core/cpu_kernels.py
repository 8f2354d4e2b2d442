"""Numba kernels of the convolution and the scan; `arm_core.cpu_scan` is how to call them.

One task is one image and one block of `BLOCK` channels, for all directions: channels are innermost, so
that every loop over them becomes vector instructions, and tasks share nothing that they write.
A kernel works in float32. It reads per-token inputs through C-ordered arrays whose rows may be longer
than D or N, so sizes are taken from parameters and results only. Sizes as in
`arm_core.reference.scan`; J is the number of channel blocks.
"""

# The kernels are typed by Numba, from the arrays of the first call.
# mypy: disallow-untyped-defs=False, disallow-untyped-calls=False

from __future__ import annotations

from typing import Any

import numba as nb
import numpy as np

BLOCK = 32
"""Channels of a task."""
CHUNK = 16
"""Tokens between two kept states; the backward rebuilds the states in between."""

F4 = np.float32
ZERO, ONE = F4(0.0), F4(1.0)
LOG2E, LN2 = F4(1.4426950408889634), F4(0.6931471805599453)

# contract and reassoc: fused multiply-adds, and sums over channels in vector lanes. Not "fast": the kernels
# must carry infinities and NaN through to the guard that reports them.
FLAGS = {"contract", "reassoc", "nsz", "arcp"}
INLINE: dict[str, Any] = {
    "fastmath": FLAGS,
    "error_model": "numpy",
    "boundscheck": False,
    "forceinline": True,
}
TASK: dict[str, Any] = {"fastmath": FLAGS, "error_model": "numpy", "boundscheck": False}
PARALLEL: dict[str, Any] = {
    "fastmath": FLAGS,
    "error_model": "numpy",
    "boundscheck": False,
    "parallel": True,
    "cache": True,
}


@nb.njit(**INLINE)
def _power(n, p):
    """2**n * p for a whole number n >= -126."""
    return p * np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(F4)


@nb.njit(**INLINE)
def _exp2(x):
    """2**x for x <= 0 to 1e-7: round, polynomial on [-1/2, 1/2], exponent bits. 2**-126 below -126."""
    x = max(x, F4(-126.0))
    n = np.floor(x + F4(0.5))
    f = x - n
    p = F4(1.5469732e-4) * f + F4(1.3410001e-3)
    p = p * f + F4(9.6180308e-3)
    p = p * f + F4(5.5502973e-2)
    p = p * f + F4(2.4022651e-1)
    p = p * f + F4(6.9314723e-1)
    return _power(n, p * f + ONE)


@nb.njit(**INLINE)
def _exp(x):
    """e**x for x <= 0 to 1e-7 of itself even where it is tiny; 2**-126 below -87."""
    x = max(x, F4(-87.33654))
    n = np.floor(x * LOG2E + F4(0.5))
    f = (x - n * F4(0.693359375)) + n * F4(2.1219444e-4)  # ln 2 in two parts: the first product is exact
    p = F4(1.3814613e-3) * f + F4(8.3687098e-3)
    p = p * f + F4(4.1668387e-2)
    p = p * f + F4(1.6666521e-1)
    p = p * f + F4(0.5)
    p = p * f + ONE
    return _power(n, p * f + ONE)


@nb.njit(**INLINE)
def _sigmoid(x):
    e = _exp(-abs(x))
    return (ONE if x >= ZERO else e) / (ONE + e)


@nb.njit(**INLINE)
def _log1p(e):
    """log(1 + e) for 0 <= e <= 1, as 2 atanh(e / (2 + e)): exact where e is tiny."""
    s = e / (F4(2.0) + e)
    w = s * s
    p = F4(0.28178335) * w + F4(0.27960603)
    p = p * w + F4(0.40024910)
    p = p * w + F4(0.66666315)
    return s * (p * w + F4(2.0))


@nb.njit(**INLINE)
def _softplus(x):
    return max(x, ZERO) + _log1p(_exp(-abs(x)))


@nb.njit(**INLINE)
def _task(q, channels):
    """Task number -> image, channel block, its first channel, its channels."""
    blocks = (channels + BLOCK - 1) // BLOCK
    j = q % blocks
    return q // blocks, j, j * BLOCK, min(BLOCK, channels - j * BLOCK)


@nb.njit(**INLINE)
def _tasks(batch, channels):
    return batch * ((channels + BLOCK - 1) // BLOCK)


@nb.njit(**TASK)
def _conv_forward_task(q, x, weight, bias, order, u):
    directions, channels, taps = weight.shape
    length = order.shape[1]
    b, _, c0, width = _task(q, channels)
    w = np.empty((taps, BLOCK), F4)
    total = np.empty(BLOCK, F4)
    for k in range(directions):
        for j in range(taps):
            for v in range(width):
                w[j, v] = weight[k, c0 + v, j]
        for t in range(length):
            for v in range(width):
                total[v] = bias[k, c0 + v]
            for j in range(max(0, taps - 1 - t), taps):
                p = order[k, t - taps + 1 + j]
                for v in range(width):
                    total[v] += w[j, v] * x[b, p, c0 + v]
            p = order[k, t]
            for v in range(width):
                u[k, b, p, c0 + v] = total[v] * _sigmoid(total[v])


@nb.njit(**PARALLEL)
def conv_forward(x, weight, bias, order, u):
    """u (K, B, L, D) = silu(bias + causal convolution of x along each direction)."""
    for q in nb.prange(_tasks(u.shape[1], u.shape[3])):
        _conv_forward_task(q, x, weight, bias, order, u)


@nb.njit(**TASK)
def _conv_backward_task(q, grad_u, x, weight, bias, order, grad_x, part_weight, part_bias):
    directions, channels, taps = weight.shape
    length = order.shape[1]
    b, _, c0, width = _task(q, channels)
    w, gw = np.empty((taps, BLOCK), F4), np.empty((taps, BLOCK), F4)
    total, gb = np.empty(BLOCK, F4), np.empty(BLOCK, F4)
    for p in range(length):
        for v in range(width):
            grad_x[b, p, c0 + v] = ZERO
    for k in range(directions):
        gw[:] = ZERO
        gb[:] = ZERO
        for j in range(taps):
            for v in range(width):
                w[j, v] = weight[k, c0 + v, j]
        for t in range(length):
            for v in range(width):
                total[v] = bias[k, c0 + v]
            first = max(0, taps - 1 - t)
            for j in range(first, taps):
                p = order[k, t - taps + 1 + j]
                for v in range(width):
                    total[v] += w[j, v] * x[b, p, c0 + v]
            p = order[k, t]
            for v in range(width):
                s = _sigmoid(total[v])
                total[v] = grad_u[k, b, p, c0 + v] * s * (ONE + total[v] * (ONE - s))
                gb[v] += total[v]
            for j in range(first, taps):
                p = order[k, t - taps + 1 + j]
                for v in range(width):
                    gw[j, v] += total[v] * x[b, p, c0 + v]
                    grad_x[b, p, c0 + v] += total[v] * w[j, v]
        for v in range(width):
            part_bias[b, k, c0 + v] = gb[v]
            for j in range(taps):
                part_weight[b, k, j, c0 + v] = gw[j, v]


@nb.njit(**PARALLEL)
def conv_backward(grad_u, x, weight, bias, order, grad_x, part_weight, part_bias):
    """grad_x (B, L, D); part_weight (B, K, W, D) and part_bias (B, K, D) are to be summed over images."""
    for q in nb.prange(_tasks(grad_x.shape[0], grad_x.shape[2])):
        _conv_backward_task(q, grad_u, x, weight, bias, order, grad_x, part_weight, part_bias)


@nb.njit(**TASK)
def _scan_forward_task(q, u, dt, A, B, C, D, dt_bias, z, order, mean, out, states):
    directions, channels, count = A.shape
    length = order.shape[1]
    keep = states.size > 0
    share = ONE / F4(directions)
    b, j, c0, width = _task(q, channels)
    rate, h = np.zeros((count, BLOCK), F4), np.zeros((count, BLOCK), F4)
    step, drive, y = np.zeros(BLOCK, F4), np.zeros(BLOCK, F4), np.zeros(BLOCK, F4)
    for k in range(directions):
        h[:] = ZERO
        for n in range(count):
            for v in range(width):
                rate[n, v] = A[k, c0 + v, n] * LOG2E
        for t in range(length):
            if keep and t % CHUNK == 0:
                states[k, b, t // CHUNK, j] = h
            p = order[k, t]
            for v in range(width):
                s = _softplus(dt[k, b, p, c0 + v] + dt_bias[k, c0 + v])
                step[v] = s
                drive[v] = s * u[k, b, p, c0 + v]
                y[v] = D[k, c0 + v] * u[k, b, p, c0 + v]
            for n in range(count):
                bn, cn = B[k, b, p, n], C[k, b, p, n]
                for v in range(BLOCK):
                    hn = _exp2(step[v] * rate[n, v]) * h[n, v] + drive[v] * bn
                    h[n, v] = hn
                    y[v] += hn * cn
            for v in range(width):
                if k == 0:
                    mean[b, p, c0 + v] = y[v] * share
                else:
                    mean[b, p, c0 + v] += y[v] * share
    for p in range(length):
        for v in range(width):
            g = z[b, p, c0 + v]
            out[b, p, c0 + v] = g * _sigmoid(g) * mean[b, p, c0 + v]


@nb.njit(**PARALLEL)
def scan_forward(u, dt, A, B, C, D, dt_bias, z, order, mean, out, states):
    """mean (B, L, D) of y over the directions, out = silu(z) mean; they may be one array.

    states (K, B, chunks, J, N, BLOCK) takes the state before every chunk, or is empty: none is kept.
    """
    for q in nb.prange(_tasks(out.shape[0], out.shape[2])):
        _scan_forward_task(q, u, dt, A, B, C, D, dt_bias, z, order, mean, out, states)


@nb.njit(**TASK)
def _scan_backward_task(
    q,
    grad_out,
    u,
    dt,
    A,
    B,
    C,
    D,
    dt_bias,
    z,
    order,
    mean,
    states,
    grad_u,
    grad_dt,
    grad_z,
    part_A,
    part_B,
    part_C,
    part_D,
    part_bias,
):
    directions, channels, count = A.shape
    length = order.shape[1]
    share = ONE / F4(directions)
    b, j, c0, width = _task(q, channels)
    grad_y = np.zeros((length, BLOCK), F4)
    for p in range(length):
        for v in range(width):
            g = z[b, p, c0 + v]
            s = _sigmoid(g)
            go = grad_out[b, p, c0 + v]
            grad_y[p, v] = go * g * s * share
            grad_z[b, p, c0 + v] = go * mean[b, p, c0 + v] * s * (ONE + g * (ONE - s))
    rate, grad_rate = np.zeros((count, BLOCK), F4), np.zeros((count, BLOCK), F4)
    h = np.empty((CHUNK + 1, count, BLOCK), F4)
    decay = np.empty((CHUNK, count, BLOCK), F4)
    step, drive, raw = (
        np.zeros((CHUNK, BLOCK), F4),
        np.zeros((CHUNK, BLOCK), F4),
        np.zeros((CHUNK, BLOCK), F4),
    )
    grad_h = np.empty((count, BLOCK), F4)
    grad_D, grad_bias = np.empty(BLOCK, F4), np.empty(BLOCK, F4)
    grad_drive, grad_step = np.empty(BLOCK, F4), np.empty(BLOCK, F4)
    for k in range(directions):
        grad_h[:], grad_rate[:] = ZERO, ZERO
        grad_D[:], grad_bias[:] = ZERO, ZERO
        for n in range(count):
            for v in range(width):
                rate[n, v] = A[k, c0 + v, n] * LOG2E
        for chunk in range((length - 1) // CHUNK, -1, -1):
            start = chunk * CHUNK
            steps = min(CHUNK, length - start)
            h[0] = states[k, b, chunk, j]
            for i in range(steps):
                p = order[k, start + i]
                for v in range(width):
                    r = dt[k, b, p, c0 + v] + dt_bias[k, c0 + v]
                    s = _softplus(r)
                    raw[i, v] = r
                    step[i, v] = s
                    drive[i, v] = s * u[k, b, p, c0 + v]
                for n in range(count):
                    bn = B[k, b, p, n]
                    for v in range(BLOCK):
                        a = _exp2(step[i, v] * rate[n, v])
                        decay[i, n, v] = a
                        h[i + 1, n, v] = a * h[i, n, v] + drive[i, v] * bn
            for i in range(steps - 1, -1, -1):
                p = order[k, start + i]
                grad_drive[:], grad_step[:] = ZERO, ZERO
                for n in range(count):
                    bn, cn = B[k, b, p, n], C[k, b, p, n]
                    sum_B, sum_C = ZERO, ZERO
                    for v in range(BLOCK):
                        gy = grad_y[p, v]
                        g = grad_h[n, v] + gy * cn
                        sum_C += gy * h[i + 1, n, v]
                        sum_B += g * drive[i, v]
                        grad_drive[v] += g * bn
                        g *= decay[i, n, v]
                        grad_h[n, v] = g
                        g *= h[i, n, v]
                        grad_step[v] += g * rate[n, v]
                        grad_rate[n, v] += g * step[i, v]
                    part_B[j, k, b, p, n] = sum_B
                    part_C[j, k, b, p, n] = sum_C
                for v in range(width):
                    x, gy = u[k, b, p, c0 + v], grad_y[p, v]
                    grad_u[k, b, p, c0 + v] = grad_drive[v] * step[i, v] + gy * D[k, c0 + v]
                    g = grad_drive[v] * x + grad_step[v] * LN2
                    g *= _sigmoid(raw[i, v])
                    grad_dt[k, b, p, c0 + v] = g
                    grad_bias[v] += g
                    grad_D[v] += gy * x
        for v in range(width):
            part_D[b, k, c0 + v] = grad_D[v]
            part_bias[b, k, c0 + v] = grad_bias[v]
            for n in range(count):
                part_A[b, k, n, c0 + v] = grad_rate[n, v]


@nb.njit(**PARALLEL)
def scan_backward(
    grad_out,
    u,
    dt,
    A,
    B,
    C,
    D,
    dt_bias,
    z,
    order,
    mean,
    states,
    grad_u,
    grad_dt,
    grad_z,
    part_A,
    part_B,
    part_C,
    part_D,
    part_bias,
):
    """grad_u, grad_dt (K, B, L, D), grad_z (B, L, D), and parts to be summed:

    part_A (B, K, N, D), part_D and part_bias (B, K, D) over images; part_B and part_C (J, K, B, L, N) over
    channel blocks.
    """
    for q in nb.prange(_tasks(grad_z.shape[0], grad_z.shape[2])):
        _scan_backward_task(
            q,
            grad_out,
            u,
            dt,
            A,
            B,
            C,
            D,
            dt_bias,
            z,
            order,
            mean,
            states,
            grad_u,
            grad_dt,
            grad_z,
            part_A,
            part_B,
            part_C,
            part_D,
            part_bias,
        )
