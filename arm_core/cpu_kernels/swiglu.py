"""Kernels of the MLP's gate, silu(a) b; see `arm_core.cpu_kernels` for their use.

They make one pass over memory forward and one backward; a framework makes two and three. Arrays are flat;
one task is `TASK_VECTORS` vectors.
"""

# Compiled code has no Python types: Numba finds them from the arrays of the first call.
# mypy: disallow-untyped-defs=False, disallow-untyped-calls=False
# mypy: disable-error-code="call-arg,var-annotated"

from __future__ import annotations

import numba as nb

from arm_core.cpu_kernels.functions import F4, INLINE, KERNEL, TASK, sigmoid, vectors
from arm_core.cpu_kernels.simd import LANES, fma, load, store

HELPERS = "26083f01e77a"
"""Digest of `functions.py` and `simd.py`: Numba's cache checks this file only."""

TASK_VECTORS = 64


@nb.njit(**INLINE)
def _gate(a, b):
    return a * sigmoid(a) * b


@nb.njit(**INLINE)
def _gate_gradients(grad, a, b):
    """The gradients of a, then of b."""
    s = sigmoid(a)
    gated = grad * s
    return gated * b * fma(a, F4(1.0) - s, F4(1.0)), gated * a


@nb.njit(**TASK)
def _forward_task(start, a, b, out):
    end = min(start + TASK_VECTORS * LANES, out.shape[0])
    whole = start + (end - start) // LANES * LANES
    for i in range(start, whole, LANES):
        store(out, (i,), _gate(load(a, (i,)), load(b, (i,))))
    if whole < end:
        rest = vectors(2)
        for i in range(end - whole):
            rest[0, i], rest[1, i] = a[whole + i], b[whole + i]
        store(rest, (0, 0), _gate(load(rest, (0, 0)), load(rest, (1, 0))))
        for i in range(end - whole):
            out[whole + i] = rest[0, i]


@nb.njit(**TASK)
def _backward_task(start, grad, a, b, grad_a, grad_b):
    end = min(start + TASK_VECTORS * LANES, grad_a.shape[0])
    whole = start + (end - start) // LANES * LANES
    for i in range(start, whole, LANES):
        of_a, of_b = _gate_gradients(load(grad, (i,)), load(a, (i,)), load(b, (i,)))
        store(grad_a, (i,), of_a)
        store(grad_b, (i,), of_b)
    if whole < end:
        rest = vectors(3)
        for i in range(end - whole):
            rest[0, i], rest[1, i], rest[2, i] = grad[whole + i], a[whole + i], b[whole + i]
        of_a, of_b = _gate_gradients(load(rest, (0, 0)), load(rest, (1, 0)), load(rest, (2, 0)))
        store(rest, (0, 0), of_a)
        store(rest, (1, 0), of_b)
        for i in range(end - whole):
            grad_a[whole + i], grad_b[whole + i] = rest[0, i], rest[1, i]


@nb.njit(**KERNEL)
def swiglu_forward(a, b, out):
    span = TASK_VECTORS * LANES
    for task in nb.prange((out.shape[0] + span - 1) // span):
        _forward_task(task * span, a, b, out)


@nb.njit(**KERNEL)
def swiglu_backward(grad, a, b, grad_a, grad_b):
    span = TASK_VECTORS * LANES
    for task in nb.prange((grad_a.shape[0] + span - 1) // span):
        _backward_task(task * span, grad, a, b, grad_a, grad_b)
