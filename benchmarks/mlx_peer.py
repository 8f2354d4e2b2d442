"""The scan of mlx-vision-mamba with our signature, for a comparison on a Mac that has it installed.

Its fused kernels scan one direction in memory order, in float32, with softplus outside and no gate; the rest
is plain MLX here, as in its blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import mlx.core as mx

NAME = "mlx-vision-mamba"
Scan = Callable[..., mx.array]


def installed() -> bool:
    return find_spec("mlx_vision_mamba") is not None


def fused_scan() -> Scan:
    """(x, delta (B, L, D), A (D, N), B, C (B, L, N), D (D,)) -> (B, L, D)"""
    from mlx_vision_mamba.mamba_metal_fused import selective_scan_metal_fused

    function: Scan = selective_scan_metal_fused
    return function


def peer_scan(
    u: mx.array, dt: mx.array, A: mx.array, B: mx.array, C: mx.array, D: mx.array, dt_bias: mx.array,
    z: mx.array, order: mx.array, *, save_for_backward: bool = True, scan: Scan | None = None,
) -> mx.array:  # fmt: skip
    """Same as `arm_mlx.scan.selective_scan`, direction by direction. scan: `fused_scan()` by default."""
    scan = scan or fused_scan()
    step = mx.logaddexp(dt.astype(mx.float32) + dt_bias[:, None, None], 0.0)
    total = mx.zeros(z.shape)
    for k, path in enumerate(order):
        x, delta, b, c = (mx.take(a[k], path, axis=1) for a in (u, step, B, C))
        y = scan(x, delta, A[k], b, c, D[k])
        total = total + mx.take(y, mx.argsort(path), axis=1)
    gate = z.astype(mx.float32)
    return (gate * mx.sigmoid(gate) * total / len(order)).astype(u.dtype)
