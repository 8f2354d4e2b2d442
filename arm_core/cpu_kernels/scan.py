"""Kernels of the selective scan; see `arm_core.cpu_kernels` for their use.

One task is one image and `LANES` channels, for all directions; tasks never write to the same memory.
Per-token inputs are read through C-ordered arrays whose rows may be longer than D or N, so sizes are
taken from A and the order. Sizes as in `arm_core.model.reference.scan`; J = D / LANES blocks of channels.
"""

# Compiled code has no Python types: Numba finds them from the arrays of the first call.
# mypy: disallow-untyped-defs=False, disallow-untyped-calls=False
# mypy: disable-error-code="call-arg,var-annotated"

from __future__ import annotations

import numba as nb

from arm_core.cpu_kernels.functions import (
    F4,
    INLINE,
    KERNEL,
    LN2,
    LOG2E,
    TASK,
    exp2,
    sigmoid,
    softplus_and_slope,
    vectors,
)
from arm_core.cpu_kernels.simd import LANES, SUMS, fill, fma, load, prefetch, store, store_dot, store_row_sums

HELPERS = "26083f01e77a"
"""Digest of `functions.py` and `simd.py`: Numba's cache checks this file only."""

CHUNK = 16
"""Tokens between two kept states; the backward pass recomputes the states in between, in the second-level
cache. The times for 8 to 64 are within 10 % of each other on a Xeon with AVX-512 and 2 MiB of this cache."""

ROWS = 64
"""Tokens of which one task adds up the partial gradients of B and C."""


@nb.njit(**INLINE)
def _rates(A, k, c, state, field):
    """A log2(e) of `LANES` channels, so that exp(step A) = 2**(step rate)."""
    for lane in range(LANES):
        for n in range(A.shape[2]):
            state[n, field, lane] = A[k, c + lane, n] * LOG2E


@nb.njit(**TASK)
def _scan_forward_task(b, c, u, dt, A, B, C, D, dt_bias, z, order, mean, out, states):
    directions, _, count = A.shape
    length = order.shape[1]
    save_for_backward = states.size > 0
    share = F4(1.0) / F4(directions)
    state = vectors(count * 2).reshape((count, 2, LANES))  # h, rate
    token = vectors(CHUNK * 3).reshape((CHUNK, 3, LANES))  # step, step * u, D * u
    y = vectors(length)  # summed over directions
    for k in range(directions):
        bias, skip = load(dt_bias, (k, c)), load(D, (k, c))
        _rates(A, k, c, state, 1)
        for n in range(count):
            store(state, (n, 0, 0), fill(F4(0.0)))
        for start in range(0, length, CHUNK):
            end = min(start + CHUNK, length)
            if save_for_backward:
                for n in range(count):
                    store(states, (k, b, start // CHUNK, c // LANES, n, 0), load(state, (n, 0, 0)))
            for t in range(start, end):
                x = load(u, (k, b, order[k, t], c))
                step, _ = softplus_and_slope(load(dt, (k, b, order[k, t], c)) + bias)
                store(token, (t - start, 0, 0), step)
                store(token, (t - start, 1, 0), step * x)
                store(token, (t - start, 2, 0), skip * x)
            for t in range(start, end):
                p = order[k, t]
                if t + CHUNK < length:
                    prefetch(u, (k, b, order[k, t + CHUNK], c))
                    prefetch(dt, (k, b, order[k, t + CHUNK], c))
                    if save_for_backward:
                        for n in range(t - start, count, CHUNK):
                            prefetch(states, (k, b, start // CHUNK + 1, c // LANES, n, 0))
                step, drive = load(token, (t - start, 0, 0)), load(token, (t - start, 1, 0))
                total = load(token, (t - start, 2, 0))
                for n in range(count):
                    decay = exp2(step * load(state, (n, 1, 0)))
                    h = fma(decay, load(state, (n, 0, 0)), drive * B[k, b, p, n])
                    store(state, (n, 0, 0), h)
                    total = fma(h, C[k, b, p, n], total)
                if k > 0:
                    total = total + load(y, (p, 0))
                store(y, (p, 0), total)
    for p in range(length):
        total = load(y, (p, 0)) * share
        if save_for_backward:
            store(mean, (b, p, c), total)
        g = load(z, (b, p, c))
        store(out, (b, p, c), total * g * sigmoid(g))


@nb.njit(**KERNEL)
def scan_forward(u, dt, A, B, C, D, dt_bias, z, order, mean, out, states):
    """out (B, L, D) = silu(z) mean, the mean of y over the directions.

    mean (B, L, D) and states (K, B, chunks, J, N, LANES), the state before every chunk, are for the
    backward pass; if states is empty, neither is written.
    """
    blocks = A.shape[1] // LANES
    for task in nb.prange(out.shape[0] * blocks):
        b, c = task // blocks, task % blocks * LANES
        _scan_forward_task(b, c, u, dt, A, B, C, D, dt_bias, z, order, mean, out, states)


@nb.njit(**TASK)
def _scan_backward_task(
    b, c, grad_out, u, dt, A, B, C, D, dt_bias, z, order, mean, states,
    grad_u, grad_dt, grad_z, part_A, part_B, part_C, part_D, part_bias,
):  # fmt: skip
    directions, _, count = A.shape
    length = order.shape[1]
    block = c // LANES
    share = F4(1.0) / F4(directions)
    state = vectors(count * 3).reshape((count, 3, LANES))  # rate, gradients of h and of rate
    token = vectors(CHUNK * 3).reshape((CHUNK, 3, LANES))  # step, step * u, derivative of step
    past = vectors((CHUNK + 1) * count * 2).reshape((CHUNK + 1, count, 2, LANES))  # h before, decay
    rows = part_B.shape[4]  # count, rounded up
    sums = vectors(2 * rows * SUMS // LANES).reshape((2, rows, SUMS))  # over channels, gradients of B and C
    sums[:] = F4(0.0)
    grad_y = vectors(length)
    for p in range(length):
        g, grad = load(z, (b, p, c)), load(grad_out, (b, p, c))
        s = sigmoid(g)
        store(grad_y, (p, 0), grad * g * s * share)
        store(grad_z, (b, p, c), grad * load(mean, (b, p, c)) * s * fma(g, F4(1.0) - s, F4(1.0)))
    for k in range(directions):
        bias, skip = load(dt_bias, (k, c)), load(D, (k, c))
        grad_bias, grad_skip = fill(F4(0.0)), fill(F4(0.0))
        _rates(A, k, c, state, 0)
        for n in range(count):
            store(state, (n, 1, 0), fill(F4(0.0)))
            store(state, (n, 2, 0), fill(F4(0.0)))
        for chunk in range((length - 1) // CHUNK, -1, -1):
            start = chunk * CHUNK
            end = min(start + CHUNK, length)
            for t in range(start, end):
                p = order[k, t]
                step, slope = softplus_and_slope(load(dt, (k, b, p, c)) + bias)
                store(token, (t - start, 0, 0), step)
                store(token, (t - start, 1, 0), step * load(u, (k, b, p, c)))
                store(token, (t - start, 2, 0), slope)
            for n in range(count):
                store(past, (0, n, 0, 0), load(states, (k, b, chunk, block, n, 0)))
            for i in range(end - start):
                p = order[k, start + i]
                prefetch(grad_u, (k, b, p, c))
                prefetch(grad_dt, (k, b, p, c))
                step, drive = load(token, (i, 0, 0)), load(token, (i, 1, 0))
                for n in range(count):
                    decay = exp2(step * load(state, (n, 0, 0)))
                    h = fma(decay, load(past, (i, n, 0, 0)), drive * B[k, b, p, n])
                    store(past, (i, n, 1, 0), decay)
                    store(past, (i + 1, n, 0, 0), h)
            for i in range(end - start - 1, -1, -1):
                p = order[k, start + i]
                if chunk > 0:
                    prefetch(u, (k, b, order[k, start - CHUNK + i], c))
                    prefetch(dt, (k, b, order[k, start - CHUNK + i], c))
                    for n in range(i, count, CHUNK):
                        prefetch(states, (k, b, chunk - 1, block, n, 0))
                step, drive, gy = load(token, (i, 0, 0)), load(token, (i, 1, 0)), load(grad_y, (p, 0))
                grad_drive, grad_step = fill(F4(0.0)), fill(F4(0.0))
                for n in range(count):
                    g = fma(gy, C[k, b, p, n], load(state, (n, 1, 0)))
                    store_dot(sums, (0, n, 0), g, drive)
                    store_dot(sums, (1, n, 0), gy, load(past, (i + 1, n, 0, 0)))
                    grad_drive = fma(g, B[k, b, p, n], grad_drive)
                    g = g * load(past, (i, n, 1, 0))
                    store(state, (n, 1, 0), g)
                    g = g * load(past, (i, n, 0, 0))
                    grad_step = fma(g, load(state, (n, 0, 0)), grad_step)
                    store(state, (n, 2, 0), fma(g, step, load(state, (n, 2, 0))))
                for n in range(0, rows, SUMS):
                    store_row_sums(part_B, (block, k, b, p, n), sums, (0, n, 0))
                    store_row_sums(part_C, (block, k, b, p, n), sums, (1, n, 0))
                x = load(u, (k, b, p, c))
                store(grad_u, (k, b, p, c), fma(grad_drive, step, gy * skip))
                g = fma(grad_drive, x, grad_step * LN2) * load(token, (i, 2, 0))
                store(grad_dt, (k, b, p, c), g)
                grad_bias = grad_bias + g
                grad_skip = fma(gy, x, grad_skip)
        store(part_D, (b, k, c), grad_skip)
        store(part_bias, (b, k, c), grad_bias)
        for n in range(count):
            store(part_A, (b, k, n, c), load(state, (n, 2, 0)))


@nb.njit(**TASK)
def _add_blocks(start, end, part, total):
    """Rows of total (rows, N) from part (J, rows, Q), over the channel blocks in their order."""
    for row in range(start, end):
        for n in range(total.shape[1]):
            g = part[0, row, n]
            for j in range(1, part.shape[0]):
                g += part[j, row, n]
            total[row, n] = g


@nb.njit(**TASK)
def _add_images(k, start, end, part, total):
    """Channels of total (K, D, N) from part (B, K, N, D), over the images in their order."""
    for c in range(start, end):
        for n in range(total.shape[2]):
            g = F4(0.0)
            for b in range(part.shape[0]):
                g += part[b, k, n, c]
            total[k, c, n] = g


@nb.njit(**KERNEL)
def scan_backward(
    grad_out, u, dt, A, B, C, D, dt_bias, z, order, mean, states,
    grad_u, grad_dt, grad_A, grad_B, grad_C, grad_z, part_A, part_B, part_C, part_D, part_bias,
):  # fmt: skip
    """The gradients by name, and working memory:

    part_A (B, K, N, D), part_B and part_C (J, K, B, L, N rounded up to a multiple of `SUMS`), and part_D
    and part_bias (B, K, D), which are to be summed over images.
    """
    directions, channels, _ = A.shape
    batch, blocks = grad_z.shape[0], channels // LANES
    for task in nb.prange(batch * blocks):
        _scan_backward_task(
            task // blocks, task % blocks * LANES,
            grad_out, u, dt, A, B, C, D, dt_bias, z, order, mean, states,
            grad_u, grad_dt, grad_z, part_A, part_B, part_C, part_D, part_bias,
        )  # fmt: skip
    rows, padded = grad_B.size // grad_B.shape[3], part_B.shape[4]
    parts_B, parts_C = part_B.reshape((blocks, rows, padded)), part_C.reshape((blocks, rows, padded))
    total_B, total_C = grad_B.reshape((rows, grad_B.shape[3])), grad_C.reshape((rows, grad_C.shape[3]))
    for task in nb.prange((rows + ROWS - 1) // ROWS):
        start, end = task * ROWS, min(task * ROWS + ROWS, rows)
        _add_blocks(start, end, parts_B, total_B)
        _add_blocks(start, end, parts_C, total_C)
    for task in nb.prange(directions * blocks):
        start = task % blocks * LANES
        _add_images(task // blocks, start, start + LANES, part_A, grad_A)
