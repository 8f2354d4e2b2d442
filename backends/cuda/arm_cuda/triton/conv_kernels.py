"""Depthwise causal convolution along each direction's order, then SiLU.

It is a separate kernel and not part of the scan: the projection of dt, B and C reads u from memory in any
case. A scan that reads u moves as many bytes as one that computes u again from x. It needs 18 instead of 20
special-function instructions per token and channel (at 16 states), and their unit limits the scan.

Sizes: K directions, B images, L tokens, D channels, W convolution width. Programs take tiles of
`ROWS` tokens by `BLOCK` channels; neighbouring tokens come from the cache. The backward pass is two kernels.
The first goes along the steps: the gradient before SiLU, and the sums for weight and bias. The second goes
token by token: the gradient of x from all directions.
"""

from __future__ import annotations

import triton
import triton.language as tl

from arm_cuda.triton.arithmetic import sigmoid


@triton.jit(do_not_specialize=["length"])
def conv_forward(
    x, weight, bias, order, u, length, x_image, x_token,
    directions: tl.constexpr, channels: tl.constexpr, W: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """x: (B, L, D), strided.  weight: (K, W, D).  bias: (K, D).  order: (K, L).  u: (K, B, L, D).

    Grid: (B * K * row tiles * channel blocks,).
    """
    blocks: tl.constexpr = (channels + BLOCK - 1) // BLOCK
    tiles = tl.cdiv(length, ROWS)
    program = tl.program_id(0)
    images = tl.num_programs(0) // (directions * blocks * tiles)
    tile = program // blocks % tiles
    k = program // (blocks * tiles) % directions
    image = program // (blocks * tiles * directions)
    channel = program % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = channel < channels
    step = tile * ROWS + tl.arange(0, ROWS)
    x += image.to(tl.int64) * x_image
    u += (k * images + image).to(tl.int64) * length * channels
    order += k * length

    total = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    total += tl.load(bias + k * channels + channel, mask=inside, other=0.0).to(tl.float32)[None, :]
    for j in tl.static_range(W):
        at = step + (j - W + 1)
        there = (at >= 0) & (at < length)
        token = tl.load(order + at, mask=there, other=0)
        mask = there[:, None] & inside[None, :]
        value = tl.load(x + token[:, None] * x_token + channel[None, :], mask=mask, other=0.0).to(tl.float32)
        w = tl.load(weight + (k * W + j) * channels + channel, mask=inside, other=0.0).to(tl.float32)
        total += value * w[None, :]
    # Here at, token and mask are those of the step itself.
    result = total * sigmoid(total)
    tl.store(u + token[:, None] * channels + channel[None, :], result.to(u.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["length"])
def conv_backward_steps(
    x, weight, bias, order, grad_u, grad_sum, partials, length, x_image, x_token,
    directions: tl.constexpr, channels: tl.constexpr, W: tl.constexpr,
    ROWS: tl.constexpr, TILES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Along each direction: the gradient before SiLU, and the sums over tokens for weight and bias.

    grad_u, grad_sum: (K, B, L, D).  partials: (B * spans, K, W + 1, D) float32, weight and then bias, over
    spans of ROWS * TILES steps.  Grid: (B * spans * K * channel blocks,).
    """
    blocks: tl.constexpr = (channels + BLOCK - 1) // BLOCK
    spans = tl.cdiv(length, ROWS * TILES)
    program = tl.program_id(0)
    images = tl.num_programs(0) // (directions * blocks * spans)
    k = program // blocks % directions
    span = program // (blocks * directions) % spans
    image = program // (blocks * directions * spans)
    channel = program % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = channel < channels
    x += image.to(tl.int64) * x_image
    row = (k * images + image).to(tl.int64)
    grad_u += row * length * channels
    grad_sum += row * length * channels
    order += k * length

    offset = tl.load(bias + k * channels + channel, mask=inside, other=0.0).to(tl.float32)
    weights = ()
    sums = ()
    for j in tl.static_range(W):
        w = tl.load(weight + (k * W + j) * channels + channel, mask=inside, other=0.0)
        weights = weights + (w.to(tl.float32),)
        sums = sums + (tl.zeros([ROWS, BLOCK], dtype=tl.float32),)
    sum_bias = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    for tile in range(TILES):
        step = (span * TILES + tile) * ROWS + tl.arange(0, ROWS)
        values = ()
        total = tl.zeros([ROWS, BLOCK], dtype=tl.float32) + offset[None, :]
        for j in tl.static_range(W):
            at = step + (j - W + 1)
            there = (at >= 0) & (at < length)
            token = tl.load(order + at, mask=there, other=0)
            mask = there[:, None] & inside[None, :]
            value = tl.load(x + token[:, None] * x_token + channel[None, :], mask=mask, other=0.0)
            values = values + (value.to(tl.float32),)
            total += values[j] * weights[j][None, :]
        # Here token and mask are those of the step itself.
        place = token[:, None] * channels + channel[None, :]
        grad = tl.load(grad_u + place, mask=mask, other=0.0).to(tl.float32)
        gate = sigmoid(total)
        grad = grad * (gate * (1.0 + total * (1.0 - gate)))
        tl.store(grad_sum + place, grad.to(grad_sum.dtype.element_ty), mask=mask)
        sum_bias += grad
        added = ()
        for j in tl.static_range(W):
            added = added + (sums[j] + grad * values[j],)
        sums = added
    partials += ((image * spans + span) * directions + k).to(tl.int64) * ((W + 1) * channels)
    for j in tl.static_range(W):
        tl.store(partials + j * channels + channel, tl.sum(sums[j], axis=0), mask=inside)
    tl.store(partials + W * channels + channel, tl.sum(sum_bias, axis=0), mask=inside)


@triton.jit(do_not_specialize=["length"])
def conv_backward_tokens(
    grad_sum, weight, order, inverse, grad_x, length,
    directions: tl.constexpr, channels: tl.constexpr, W: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient of x: in every direction, a token contributes to its own step and the W - 1 after it.

    inverse: (K, L), the step at which each direction reads a token.  grad_x: (B, L, D).
    Grid: (B * row tiles * channel blocks,).
    """
    blocks: tl.constexpr = (channels + BLOCK - 1) // BLOCK
    tiles = tl.cdiv(length, ROWS)
    program = tl.program_id(0)
    images = tl.num_programs(0) // (blocks * tiles)
    image = program // (blocks * tiles)
    channel = program % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = channel < channels
    token = program // blocks % tiles * ROWS + tl.arange(0, ROWS)
    exists = token < length
    total = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    for k in range(directions):
        step = tl.load(inverse + k * length + token, mask=exists, other=0)
        rows = grad_sum + (k * images + image).to(tl.int64) * length * channels
        for i in tl.static_range(W):
            there = exists & (step + i < length)
            reader = tl.load(order + k * length + step + i, mask=there, other=0)
            mask = there[:, None] & inside[None, :]
            grad = tl.load(rows + reader[:, None] * channels + channel[None, :], mask=mask, other=0.0)
            w = tl.load(weight + (k * W + W - 1 - i) * channels + channel, mask=inside, other=0.0)
            total += grad.to(tl.float32) * w.to(tl.float32)[None, :]
    target = grad_x + image.to(tl.int64) * length * channels + token[:, None] * channels + channel[None, :]
    tl.store(target, total.to(grad_x.dtype.element_ty), mask=exists[:, None] & inside[None, :])
