"""The gate of the MLP in MLX: one pass over memory with scan `cpu`, plain operations elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import mlx.core as mx

from arm_core import cpu_kernels
from arm_mlx.scan import evaluated, silu


def swiglu(a: mx.array, b: mx.array, *, impl: str) -> mx.array:
    """silu(a) * b, element by element; a and b have one shape and dtype.

    impl: name of the scan. With `cpu`, which leaves MLX's graph in any case, float32 arrays use the core's
    kernel: MLX's exponential takes five times as long on a CPU.
    """
    if impl == "cpu" and a.dtype == b.dtype == mx.float32:
        return cast(mx.array, _cpu_swiglu(a, b))
    return silu(a) * b


@mx.custom_function
def _cpu_swiglu(a: mx.array, b: mx.array) -> mx.array:
    return mx.array(cpu_kernels.swiglu_forward(*evaluated(a, b)))


@_cpu_swiglu.vjp
def _cpu_swiglu_vjp(inputs: Sequence[mx.array], grad: mx.array, out: mx.array) -> tuple[mx.array, ...]:
    return tuple(map(mx.array, cpu_kernels.swiglu_backward(*evaluated(grad, *inputs))))
