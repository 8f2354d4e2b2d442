"""One function per kernel: the shapes and types of its results, its constants and its grid.

Arrays come in the layouts of `arm_mlx.scan`, which has checked their shapes. Sizes: K directions, B images,
L tokens, D channels, N states, W convolution width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import mlx.core as mx

from arm_mlx.metal import sources
from arm_mlx.metal.tuning import CONV_TURNS, MAX_THREADS, SIMD, Tuning

Shape = tuple[int, ...]

CONSTANT_BELOW = 8
"""MLX passes inputs with fewer elements in Metal's `constant` address space, others in `device`."""
MAX_ELEMENTS = 2**31 - 1
"""The kernels index with 32 bits."""


class ScanInputs(NamedTuple):
    """The inputs of the scan's kernels, in the order of `sources.SCAN_INPUTS`."""

    u: mx.array
    dt: mx.array
    A: mx.array
    B: mx.array
    C: mx.array
    D: mx.array
    dt_bias: mx.array
    order: mx.array


def conv_forward(x: mx.array, weight: mx.array, bias: mx.array, order: mx.array) -> mx.array:
    """u: (K, B, L, D) in x.dtype."""
    (u,) = run(
        "conv_forward",
        (x, weight, bias, order),
        [((len(order), *x.shape), x.dtype)],
        **_conv_call(x, weight),
    )
    return u


def conv_backward(
    du: mx.array, x: mx.array, weight: mx.array, bias: mx.array, order: mx.array
) -> tuple[mx.array, mx.array, mx.array]:
    """Gradients of x (in x.dtype), weight and bias."""
    (directions, channels, width), (batch, length, _) = weight.shape, x.shape
    runs = -(-length // (CONV_TURNS * width))
    dx, parts = run(
        "conv_backward",
        (du, x, weight, bias, order),
        [(du.shape, x.dtype), ((directions, batch, runs, width + 1, channels), mx.float32)],
        **_conv_call(x, weight),
    )
    parts = parts.sum((1, 2))  # (K, W + 1, D)
    return _sum_directions(dx), parts[:, :width].swapaxes(1, 2), parts[:, width]


def _sum_directions(parts: mx.array) -> mx.array:
    """(K, B, L, D) -> (B, L, D), in float32 if there is more than one direction."""
    return parts[0] if len(parts) == 1 else parts.astype(mx.float32).sum(0).astype(parts.dtype)


def _conv_call(x: mx.array, weight: mx.array) -> dict[str, Any]:
    (directions, channels, width), (batch, length, _) = weight.shape, x.shape
    runs = -(-length // (CONV_TURNS * width))
    return {
        "template": {
            "T": x.dtype,
            "LENGTH": length,
            "CHANNELS": channels,
            "CONV_WIDTH": width,
            "RUN": CONV_TURNS * width,
        },
        "grid": (channels, directions * runs, batch),
        "threadgroup": (min(channels, MAX_THREADS), 1, 1),
    }


def scan_forward(scan: ScanInputs, tuning: Tuning, *, save: bool) -> tuple[mx.array, mx.array | None]:
    """y: (K, B, L, D) in u.dtype, and the states for the backward pass: (K, B, chunks - 1, D, N).

    The states are None without `save`, and if one chunk holds all tokens.
    """
    directions, batch, length, channels = scan.u.shape
    kept = -(-length // tuning.chunk) - 1
    save = save and kept > 0
    outputs: list[tuple[Shape, mx.Dtype]] = [(scan.u.shape, scan.u.dtype)]
    if save:
        outputs.append(((directions, batch, kept, channels, tuning.states), mx.float32))
    name = "scan_forward_saving" if save else "scan_forward"
    y, *states = run(name, scan, outputs, **_scan_call(scan, tuning))
    return y, states[0] if states else None


def scan_backward(
    grad_y: mx.array, states: mx.array | None, scan: ScanInputs, tuning: Tuning
) -> tuple[mx.array, ...]:
    """Gradients of u, dt, A, B, C, D, dt_bias, each in its array's dtype. grad_y: (B, L, D) float32."""
    directions, batch, length, channels = scan.u.shape
    call = _scan_call(scan, tuning)
    call["template"]["KEEP_DECAYS"] = tuning.keep_decays
    groups = call["grid"][0] // call["threadgroup"][0]
    du, ddt, dA, dBC, dD, ddt_bias = run(
        "scan_backward",
        (grad_y, mx.zeros((1,)) if states is None else states, *scan),
        [
            (scan.u.shape, scan.u.dtype),
            (scan.u.shape, scan.u.dtype),
            ((directions, batch, channels, tuning.states), mx.float32),
            ((directions, batch, groups, length, 2 * tuning.states), mx.float32),
            ((directions, batch, channels), mx.float32),
            ((directions, batch, channels), mx.float32),
        ],
        **call,
    )
    dB, dC = mx.split(dBC.sum(2).astype(scan.B.dtype), 2, axis=-1)
    return du, ddt, dA.sum(1), dB, dC, dD.sum(1), ddt_bias.sum(1)


def _scan_call(scan: ScanInputs, tuning: Tuning) -> dict[str, Any]:
    directions, batch, length, channels = scan.u.shape
    assert scan.A.shape[-1] == tuning.states, "constants for another number of states"
    needed = -(-channels * tuning.lanes // SIMD)  # SIMD groups for all channels
    groups = -(-needed // tuning.simdgroups)
    simdgroups = -(-needed // groups)  # divided evenly, so that few lanes are idle
    return {
        "template": {
            "T": scan.u.dtype,
            "STATES": tuning.states,
            "LANES": tuning.lanes,
            "SIMDGROUPS": simdgroups,
            "CHUNK": tuning.chunk,
            "LENGTH": length,
            "CHANNELS": channels,
        },
        "grid": (groups * simdgroups * SIMD, directions, batch),
        "threadgroup": (simdgroups * SIMD, 1, 1),
    }


def gate_forward(y: mx.array, z: mx.array, *, save: bool) -> tuple[mx.array, mx.array | None]:
    """out: (B, L, D) in z.dtype, and with `save` the mean of y over the directions."""
    write_mean = save and len(y) > 1  # with one direction, y is the mean
    name = "gate_forward_saving" if write_mean else "gate_forward"
    out, *mean = run(name, (y, z), [(z.shape, z.dtype)] * (1 + write_mean), **_gate_call(z, len(y)))
    return out, (mean[0] if write_mean else y[0]) if save else None


def gate_backward(grad: mx.array, z: mx.array, mean: mx.array, directions: int) -> tuple[mx.array, mx.array]:
    """Gradients of z, in its dtype, and of each direction's y, in float32: (B, L, D)."""
    outputs = [(z.shape, z.dtype), (z.shape, mx.float32)]
    dz, grad_y = run("gate_backward", (grad, z, mean), outputs, **_gate_call(z, directions))
    return dz, grad_y


def _gate_call(z: mx.array, directions: int) -> dict[str, Any]:
    batch, length, channels = z.shape
    across = min(channels, MAX_THREADS)
    return {
        "template": {"T": z.dtype, "DIRECTIONS": directions},
        "grid": (channels, length, batch),
        "threadgroup": (across, min(length, MAX_THREADS // across), 1),
    }


def run(
    name: str,
    inputs: Sequence[mx.array],
    outputs: Sequence[tuple[Shape, mx.Dtype]],
    *,
    template: dict[str, Any],
    grid: tuple[int, int, int],
    threadgroup: tuple[int, int, int],
) -> tuple[mx.array, ...]:
    """Launch a kernel of `sources.KERNELS`. Raises ValueError on arrays that 32 bits cannot index."""
    kernel = sources.KERNELS[name]
    names = kernel.inputs + kernel.outputs
    for array, shape in zip(names, [*(a.shape for a in inputs), *(s for s, _ in outputs)], strict=True):
        elements = 1
        for axis in shape:
            elements *= axis
        if elements > MAX_ELEMENTS:
            raise ValueError(
                f"scan 'metal': expected at most {MAX_ELEMENTS} elements in each array, found {elements} in "
                f"{array} {shape}; take a smaller batch"
            )
    return execute(
        sources.load(name),
        inputs=[
            _in_device_memory(array if known == kernel.strided else mx.contiguous(array))
            for known, array in zip(kernel.inputs, inputs, strict=True)
        ],
        template=list(template.items()),
        grid=grid,
        threadgroup=threadgroup,
        output_shapes=[shape for shape, _ in outputs],
        output_dtypes=[dtype for _, dtype in outputs],
    )


def execute(kernel: Any, **call: Any) -> tuple[mx.array, ...]:
    """Pass a call to MLX; the tests replace this by their emulator."""
    return tuple(cast(Sequence[mx.array], kernel(**call)))


def _in_device_memory(array: mx.array) -> mx.array:
    """The array, padded if MLX would pass it as `constant`: one signature for every size."""
    if array.size >= CONSTANT_BELOW:
        return array
    return mx.pad(array, [(0, CONSTANT_BELOW), *[(0, 0)] * (array.ndim - 1)])
