"""From tensors to kernel launches: tile sizes, buffers, grids, and sums of partials in a fixed order.

`operators` has checked the tensors. The convolution's weight is (K, W, D) and A is (K, N, D) here: channels
last, so that a program reads them in one piece. No sum uses atomic operations, so results are
bit-identical on every run.

Sizes: K directions, B images, L tokens, D channels, N states, W convolution width.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from arm_cuda.nvrtc import launch as native
from arm_cuda.triton import conv_kernels, gate_kernels, scan_kernels

# Chosen from the machine code for sm_80, sm_90 and sm_100 (registers, spills, instructions per token).
LANES = 32
"""Channels of a scan program: one for each lane of a warp."""
STATES_PER_WARP = 16
"""A scan program of N states has N / 16 warps, so that the registers hold any N."""
CHUNK = 16
"""Tokens between the states that the scan's forward keeps for its backward."""
GROUP = {8: 2, 16: 2, 32: 1, 64: 1}
"""Tokens whose states the backward pass holds in registers at a time, by N: as many as fit without spills."""
CONV_BLOCK, CONV_WARPS = 64, 4
CONV_ROWS, CONV_TOKEN_ROWS = 32, 16
CONV_STEP_ROWS, CONV_TILES = 16, 4
GATE_BLOCK = 256

Kernel = Any
"""A function under `triton.jit`."""


def launch(kernel: Kernel, programs: int, *arguments: object, warps: int, **sizes: int) -> None:
    """Launch a grid of programs; nothing for an empty batch, which Triton would refuse."""
    if programs == 0:
        return
    device = next(argument for argument in arguments if isinstance(argument, Tensor))
    with torch.cuda.device_of(device):  # Triton launches on the current device; no effect on a CPU
        kernel[(programs,)](*arguments, num_warps=warps, enable_fp_fusion=True, **sizes)


def blocks(size: int, block: int) -> int:
    return -(-size // block)


def state_shape(u: Tensor, A: Tensor) -> tuple[int, ...]:
    """(K, B, chunks, N, D): the states that the forward pass keeps."""
    directions, batch, length, channels = u.shape
    return directions, batch, blocks(length, CHUNK), A.shape[1], channels


def conv_forward(x: Tensor, weight: Tensor, bias: Tensor, order: Tensor) -> Tensor:
    """weight: (K, W, D); otherwise as in `arm_cuda.scan.directional_conv`."""
    batch, length, channels = x.shape
    directions, width, _ = weight.shape
    u = torch.empty((directions, batch, length, channels), dtype=x.dtype, device=x.device)
    launch(
        conv_kernels.conv_forward,
        batch * directions * blocks(length, CONV_ROWS) * blocks(channels, CONV_BLOCK),
        x, weight, bias, order, u, length, x.stride(0), x.stride(1),
        directions=directions, channels=channels, W=width, ROWS=CONV_ROWS, BLOCK=CONV_BLOCK,
        warps=CONV_WARPS,
    )  # fmt: skip
    return u


def conv_backward(
    grad_u: Tensor, x: Tensor, weight: Tensor, bias: Tensor, order: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight (K, W, D) and bias."""
    batch, length, channels = x.shape
    directions, width, _ = weight.shape
    grad_u = grad_u.contiguous()
    channel_blocks = blocks(channels, CONV_BLOCK)
    spans = batch * blocks(length, CONV_STEP_ROWS * CONV_TILES)
    grad_sum = torch.empty_like(grad_u)
    partials = grad_u.new_empty((spans, directions, width + 1, channels), dtype=torch.float32)
    sizes = {"directions": directions, "channels": channels, "W": width, "BLOCK": CONV_BLOCK}
    launch(
        conv_kernels.conv_backward_steps,
        spans * directions * channel_blocks,
        x, weight, bias, order, grad_u, grad_sum, partials, length, x.stride(0), x.stride(1),
        **sizes, ROWS=CONV_STEP_ROWS, TILES=CONV_TILES, warps=CONV_WARPS,
    )  # fmt: skip
    grad_x = x.new_empty(x.shape)
    launch(
        conv_kernels.conv_backward_tokens,
        batch * blocks(length, CONV_TOKEN_ROWS) * channel_blocks,
        grad_sum, weight, order, inverse(order), grad_x, length,
        **sizes, ROWS=CONV_TOKEN_ROWS, warps=CONV_WARPS,
    )  # fmt: skip
    sums = partials.sum(0)  # (K, W + 1, D)
    grad_weight = sums[:, :width].to(weight.dtype, copy=True, memory_format=torch.contiguous_format)
    return grad_x, grad_weight, sums[:, width].to(bias.dtype, copy=True)


_inverses = WeakIdKeyDictionary()
"""order -> (its version, its inverse), kept as long as the order table exists."""


def inverse(order: Tensor) -> Tensor:
    """The step at which each direction reads a token, (K, L) int32; computed once for each order table."""
    if order.is_inference() or (order.is_cuda and torch.cuda.is_current_stream_capturing()):
        return _inverse(order)  # the tensor has no version, or its memory belongs to the graph
    version, found = cast(tuple[int, Tensor] | tuple[None, None], _inverses.get(order, (None, None)))
    if found is None or version != order._version:
        found = _inverse(order)
        _inverses[order] = order._version, found
    return found


def _inverse(order: Tensor) -> Tensor:
    steps = torch.arange(order.shape[1], dtype=torch.int32, device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order.long(), steps)


def scan_forward(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor, z: Tensor,
    order: Tensor, save_for_backward: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """out as in `arm_cuda.scan.selective_scan`, then the inputs of the backward pass, or empty tensors.

    mean: (B, L, D), of y over the directions.  states: see `state_shape`, float32.
    """
    directions, batch, length, channels = u.shape
    y = torch.empty_like(u)
    states = u.new_empty(state_shape(u, A) if save_for_backward else (0,), dtype=torch.float32)
    launch(
        scan_kernels.scan_forward,
        batch * directions * blocks(channels, LANES),
        u, dt, A, B, C, D, dt_bias, order, y, states,
        length, *B.stride()[:3], *C.stride()[:3],
        directions=directions, channels=channels, N=A.shape[1],
        BLOCK=LANES, CHUNK=CHUNK, SAVE=save_for_backward, warps=scan_warps(A),
    )  # fmt: skip
    out = u.new_empty((batch, length, channels))
    several = save_for_backward and directions > 1  # with one direction, y is the mean
    mean = torch.empty_like(out) if several else y[0] if save_for_backward else u.new_empty((0,))
    launch(
        gate_kernels.gate_forward,
        batch * length * blocks(channels, GATE_BLOCK),
        y, z, out, mean, length, z.stride(0), z.stride(1),
        directions=directions, channels=channels, BLOCK=GATE_BLOCK, SAVE=several, warps=1,
    )  # fmt: skip
    return out, mean, states


def scan_backward(
    grad_out: Tensor, mean: Tensor, states: Tensor, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor,
    D: Tensor, dt_bias: Tensor, z: Tensor, order: Tensor,
    kernel: str = "triton",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of u, dt, A (K, N, D), B, C, D, dt_bias and z, each in the type of its tensor.

    kernel: `triton`, or `cuda` for the one in `arm_cuda.nvrtc`.
    """
    directions, batch, length, channels = u.shape
    state = A.shape[1]
    grad_out = grad_out.contiguous()
    grad_y, grad_z = torch.empty_like(grad_out), torch.empty(z.shape, dtype=z.dtype, device=z.device)
    launch(
        gate_kernels.gate_backward,
        batch * length * blocks(channels, GATE_BLOCK),
        grad_out, z, mean, grad_y, grad_z, length, z.stride(0), z.stride(1),
        directions=directions, channels=channels, BLOCK=GATE_BLOCK, warps=1,
    )  # fmt: skip

    def partial(*shape: int) -> Tensor:
        return u.new_empty(shape, dtype=torch.float32)

    channel_blocks = blocks(channels, LANES)
    programs = batch * directions * channel_blocks
    grad_u, grad_dt = torch.empty_like(u), torch.empty_like(dt)
    grad_A = partial(directions, batch, state, channels)
    grad_B = partial(channel_blocks, directions, batch, length, state)
    grad_C = torch.empty_like(grad_B)
    grad_D = partial(directions, batch, channels)
    grad_bias = torch.empty_like(grad_D)
    gradients = grad_u, grad_dt, grad_A, grad_B, grad_C, grad_D, grad_bias
    if kernel == "cuda":
        native.scan_backward(
            u, dt, A, B, C, D, dt_bias, order, states, grad_y, *gradients, chunk=CHUNK
        )  # fmt: skip
    else:
        scratch = partial(programs, CHUNK // GROUP[state], state, LANES)
        launch(
            scan_kernels.scan_backward,
            programs,
            u, dt, A, B, C, D, dt_bias, order, states, scratch, grad_y, *gradients,
            length, *B.stride()[:3], *C.stride()[:3],
            directions=directions, channels=channels, N=state,
            BLOCK=LANES, CHUNK=CHUNK, GROUP=GROUP[state], warps=scan_warps(A),
        )  # fmt: skip
    return (
        grad_u,
        grad_dt,
        grad_A.sum(1).to(A.dtype),
        grad_B.sum(0).to(B.dtype),
        grad_C.sum(0).to(C.dtype),
        grad_D.sum(1).to(D.dtype),
        grad_bias.sum(1).to(dt_bias.dtype),
        grad_z,
    )


def scan_warps(A: Tensor) -> int:
    return max(1, A.shape[1] // STATES_PER_WARP)
