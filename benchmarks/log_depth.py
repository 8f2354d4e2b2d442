"""The selective scan as a log-depth scan in plain MLX operations, for comparison with the Metal kernels.

The recurrence h_t = a_t h_{t-1} + b_t is associative in pairs (a, b), so that it takes log2 L rounds instead
of L steps. Each round reads and writes the states of every token, which the kernels avoid.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx


def log_depth_scan(
    u: mx.array, dt: mx.array, A: mx.array, B: mx.array, C: mx.array, D: mx.array, dt_bias: mx.array,
    z: mx.array, order: mx.array, *, save_for_backward: bool = True,
) -> mx.array:  # fmt: skip
    """Same as `arm_mlx.scan.selective_scan`, with all gradients; computes in float32."""
    dtype = u.dtype
    u, dt, B, C, z = (a.astype(mx.float32) for a in (u, dt, B, C, z))
    step = mx.logaddexp(dt + dt_bias[:, None, None], 0.0)
    step, x, B, C = (_along(a, order) for a in (step, step * u, B, C))
    decay = mx.exp(step[..., None] * A[:, None, None])  # (K, B, L, D, N)
    states = _recurrence(decay, x[..., None] * B[..., None, :])
    y = _along((states @ C[..., None]).squeeze(-1), mx.argsort(order, axis=1)) + D[:, None, None] * u
    return (z * mx.sigmoid(z) * y.mean(0)).astype(dtype)


def _along(a: mx.array, order: mx.array) -> mx.array:
    return mx.take_along_axis(a, order[:, None, :, None], axis=2)


@mx.custom_function
def _recurrence(a: mx.array, b: mx.array) -> mx.array:
    """h_t = a_t h_{t-1} + b_t along axis 2, by doubling."""
    length, reach = a.shape[2], 1
    while reach < length:
        b = mx.concatenate([b[:, :, :reach], b[:, :, reach:] + a[:, :, reach:] * b[:, :, :-reach]], axis=2)
        if 2 * reach < length:
            a = mx.concatenate([a[:, :, :reach], a[:, :, reach:] * a[:, :, :-reach]], axis=2)
        reach *= 2
    return b


@_recurrence.vjp
def _recurrence_vjp(
    inputs: Sequence[mx.array], grad: mx.array, states: mx.array
) -> tuple[mx.array, mx.array]:
    """The same recurrence backwards in time; autodiff would keep every round."""
    a, _ = inputs
    later = mx.concatenate([a[:, :, 1:], mx.zeros_like(a[:, :, :1])], axis=2)
    total = _recurrence(later[:, :, ::-1], grad[:, :, ::-1])[:, :, ::-1]
    before = mx.concatenate([mx.zeros_like(states[:, :, :1]), states[:, :, :-1]], axis=2)
    return total * before, total
