"""The mean over directions and the gate: out = silu(z) * mean_k y_k, in one pass over each tensor.

Sizes: K directions, B images, L tokens, D channels. A program processes `BLOCK` channels of one token.
"""

from __future__ import annotations

import triton
import triton.language as tl

from arm_cuda.triton.arithmetic import sigmoid


@triton.jit(do_not_specialize=["length"])
def gate_forward(
    y, z, out, mean, length, z_image, z_token,
    directions: tl.constexpr, channels: tl.constexpr, BLOCK: tl.constexpr, SAVE: tl.constexpr,
):  # fmt: skip
    """y: (K, B, L, D).  z: (B, L, D), strided.  out, mean: (B, L, D); mean is written only with SAVE.

    Grid: (B * L * channel blocks,).
    """
    blocks: tl.constexpr = (channels + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    rows = (tl.num_programs(0) // blocks).to(tl.int64)
    image, token = program // blocks // length, program // blocks % length
    row = (program // blocks).to(tl.int64)
    channel = program % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = channel < channels
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for k in tl.static_range(directions):
        total += tl.load(y + (k * rows + row) * channels + channel, mask=inside, other=0.0).to(tl.float32)
    total *= 1.0 / directions
    z += image.to(tl.int64) * z_image + token * z_token
    gate = tl.load(z + channel, mask=inside, other=0.0).to(tl.float32)
    result = total * gate * sigmoid(gate)
    tl.store(out + row * channels + channel, result.to(out.dtype.element_ty), mask=inside)
    if SAVE:
        tl.store(mean + row * channels + channel, total.to(mean.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["length"])
def gate_backward(
    grad_out, z, mean, grad_y, grad_z, length, z_image, z_token,
    directions: tl.constexpr, channels: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """grad_out, mean, grad_z: (B, L, D).  grad_y: (B, L, D), the same for every direction.

    Grid: (B * L * channel blocks,).
    """
    blocks: tl.constexpr = (channels + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    image, token = program // blocks // length, program // blocks % length
    row = (program // blocks).to(tl.int64)
    channel = program % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = channel < channels
    at = row * channels + channel
    grad = tl.load(grad_out + at, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(mean + at, mask=inside, other=0.0).to(tl.float32)
    z += image.to(tl.int64) * z_image + token * z_token
    gate = tl.load(z + channel, mask=inside, other=0.0).to(tl.float32)
    opening = sigmoid(gate)
    grad_mean = grad * gate * opening
    tl.store(grad_y + at, (grad_mean * (1.0 / directions)).to(grad_y.dtype.element_ty), mask=inside)
    slope = opening * (1.0 + gate * (1.0 - opening))
    tl.store(grad_z + at, (grad * value * slope).to(grad_z.dtype.element_ty), mask=inside)
