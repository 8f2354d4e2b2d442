"""The kernels as differentiable MLX functions: eager, compiled, under mx.checkpoint, in value_and_grad."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, cast

import mlx.core as mx

from arm_mlx.metal import launch
from arm_mlx.metal.tuning import Tuning, tuning_for

Gradients = tuple[mx.array | None, ...]


def directional_conv(x: mx.array, weight: mx.array, bias: mx.array, order: mx.array) -> mx.array:
    """Same as `arm_mlx.scan.directional_conv`; x float32, float16 or bfloat16, weight and bias float32."""
    return cast(mx.array, _conv(x, weight, bias, order))


def selective_scan(*inputs: mx.array, save_for_backward: bool) -> mx.array:
    """Same as `arm_mlx.scan.selective_scan`; u, dt, B, C, z of one type, A, D, dt_bias float32.

    Without `save_for_backward` nothing is saved for a backward pass, and there are no gradients.
    """
    tuning = tuning_for(inputs[2].shape[-1], architecture())
    if save_for_backward:
        return cast(tuple[mx.array, ...], scan_function(tuning)(*inputs))[0]
    scanned, z = _apart(inputs)
    y, _ = launch.scan_forward(scanned, tuning, save=False)
    return launch.gate_forward(y, z, save=False)[0]


def _apart(inputs: Sequence[mx.array]) -> tuple[launch.ScanInputs, mx.array]:
    """The inputs of the scan's kernels, and z, the input of the gate."""
    *scanned, z, order = inputs
    return launch.ScanInputs._make((*scanned, order)), z


def architecture() -> str:
    """MLX's name of the GPU's family, such as applegpu_g13g; empty without a GPU."""
    return str(mx.device_info(mx.gpu).get("architecture", ""))


@mx.custom_function
def _conv(x: mx.array, weight: mx.array, bias: mx.array, order: mx.array) -> mx.array:
    return launch.conv_forward(x, weight, bias, order)


@_conv.vjp
def _conv_vjp(inputs: Sequence[mx.array], grad_u: mx.array, u: mx.array) -> Gradients:
    return *launch.conv_backward(grad_u, *inputs), None


@cache
def scan_function(tuning: Tuning) -> Callable[..., Any]:
    """The scan with these constants and its gradients.

    Returns its result, then the mean over the directions and, if there are several chunks, the states
    for the backward pass.
    """

    @mx.custom_function
    def scan(*inputs: mx.array) -> tuple[mx.array, ...]:
        scanned, z = _apart(inputs)
        y, states = launch.scan_forward(scanned, tuning, save=True)
        out, mean = launch.gate_forward(y, z, save=True)
        assert mean is not None
        return (out, mean) if states is None else (out, mean, states)

    @scan.vjp
    def _(
        inputs: Sequence[mx.array], cotangents: Sequence[mx.array], outputs: Sequence[mx.array]
    ) -> Gradients:
        scanned, z = _apart(inputs)
        dz, grad_y = launch.gate_backward(cotangents[0], z, outputs[1], len(scanned.order))
        states = outputs[2] if len(outputs) > 2 else None
        return *launch.scan_backward(grad_y, states, scanned, tuning), dz, None

    return cast(Callable[..., Any], scan)
