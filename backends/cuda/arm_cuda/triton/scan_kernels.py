"""The selective scan over K directions: one warp's lanes hold 32 channels, registers their states.

Sizes: K directions, B images, L tokens, D channels, N states. A program runs `BLOCK` channels of one image
along one direction, in scan order, reading tokens through the order table. One launch runs the programs of
all directions, images and channel blocks. Channel blocks are neighbours, so that they share B and C.

The forward saves the state before every `CHUNK`-th token. The backward pass takes the chunks from
the last to the first. It runs a chunk forward again and keeps the state before every `GROUP`-th token in a
scratch area. Then it takes the groups from the last to the first, with the states of a group in registers.
Sums over channels (gradients of B and C) leave each channel block as partial sums, without atomic operations.
Steps past the end of the last chunk repeat the last token with an input of 0 and a gradient of 0: the state
only decays and cannot overflow, and all sums stay the same.
"""

from __future__ import annotations

import triton
import triton.language as tl

from arm_cuda.triton.arithmetic import LN_2, LOG2_E, exp2, sigmoid, softplus


@triton.jit
def within(channel, channels: tl.constexpr, BLOCK: tl.constexpr):
    """The lanes that have a channel. If all have one, this is a constant, and no access is masked."""
    if channels % BLOCK == 0:
        return tl.full([BLOCK], True, tl.int1)
    else:  # noqa: RET505 (Triton compiles one branch only in this form)
        return channel < channels


@triton.jit
def both(inside, live):
    """inside & live for a vector and a scalar; Triton's interpreter would turn `&` into an integer."""
    return inside & (inside == live)


# Without a known alignment of the two-dimensional accesses, each lane gets one channel and all its states:
# y needs no exchange between lanes.
@triton.jit(do_not_specialize=["length"], do_not_specialize_on_alignment=["A", "saved"])
def scan_forward(
    u, dt, A, B, C, D, dt_bias, order, y, saved,
    length, B_direction, B_image, B_token, C_direction, C_image, C_token,
    directions: tl.constexpr, channels: tl.constexpr, N: tl.constexpr,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr, SAVE: tl.constexpr,
):  # fmt: skip
    """u, dt, y: (K, B, L, D).  A: (K, N, D).  B, C: (K, B, L, N), strided.  D, dt_bias: (K, D).
    order: (K, L).  saved: (K, B, chunks, N, D) float32, the state before each chunk; only with SAVE.
    Grid: (B * K * channel blocks,).
    """
    blocks: tl.constexpr = (channels + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    images = tl.num_programs(0) // (directions * blocks)
    k = program // blocks % directions
    image = program // (blocks * directions)
    channel = program % blocks * BLOCK + tl.arange(0, BLOCK)
    state = tl.arange(0, N)
    inside = within(channel, channels, BLOCK)

    row = (k * images + image).to(tl.int64)
    u += row * length * channels
    dt += row * length * channels
    y += row * length * channels
    B += k.to(tl.int64) * B_direction + image.to(tl.int64) * B_image
    C += k.to(tl.int64) * C_direction + image.to(tl.int64) * C_image
    order += k * length
    chunks = tl.cdiv(length, CHUNK)
    saved += row * chunks * (N * channels)
    square = state[:, None] * channels + channel[None, :]  # (N, BLOCK)

    rate = tl.load(A + k * (N * channels) + square, mask=inside[None, :], other=0.0).to(tl.float32) * LOG2_E
    skip = tl.load(D + k * channels + channel, mask=inside, other=0.0).to(tl.float32)
    bias = tl.load(dt_bias + k * channels + channel, mask=inside, other=0.0).to(tl.float32)
    h = tl.zeros([N, BLOCK], dtype=tl.float32)

    # Loads run ahead of their use: a token's index by two tokens, its values by one.
    token = tl.load(order)
    following = tl.load(order + tl.minimum(1, length - 1))
    u_next = tl.load(u + token * channels + channel, mask=inside, other=0.0)
    dt_next = tl.load(dt + token * channels + channel, mask=inside, other=0.0)
    B_next = tl.load(B + token * B_token + state).to(tl.float32)
    C_next = tl.load(C + token * C_token + state).to(tl.float32)
    for chunk in range(chunks):
        if SAVE:
            tl.store(saved + square, h, mask=inside[None, :])
            saved += N * channels  # not chunk * N * channels, which may not fit 32 bits
        for t in range(chunk * CHUNK, tl.minimum(chunk * CHUNK + CHUNK, length)):
            here = token
            x, raw, b, c = u_next.to(tl.float32), dt_next.to(tl.float32), B_next, C_next
            token = following
            following = tl.load(order + tl.minimum(t + 2, length - 1))
            u_next = tl.load(u + token * channels + channel, mask=inside, other=0.0)
            dt_next = tl.load(dt + token * channels + channel, mask=inside, other=0.0)
            B_next = tl.load(B + token * B_token + state).to(tl.float32)
            C_next = tl.load(C + token * C_token + state).to(tl.float32)

            step = softplus(raw + bias)
            decay = exp2(step[None, :] * rate)
            h = decay * h + (step * x)[None, :] * b[:, None]
            out = tl.sum(h * c[:, None], axis=0) + skip * x
            tl.store(y + here * channels + channel, out.to(y.dtype.element_ty), mask=inside)


@triton.jit
def tokens_of(order, first, length, GROUP: tl.constexpr):
    """Indices of the GROUP tokens from step `first` on; past the end, the index of the last token."""
    tokens = ()
    for i in tl.static_range(GROUP):
        tokens = tokens + (tl.load(order + tl.minimum(first + i, length - 1)),)
    return tokens


@triton.jit
def read(values, row_stride, column, tokens, inside, GROUP: tl.constexpr):
    """Rows of a group's tokens, as a tuple of float32 vectors."""
    rows = ()
    for i in tl.static_range(GROUP):
        row = tl.load(values + tokens[i] * row_stride + column, mask=inside, other=0.0)
        rows = rows + (row.to(tl.float32),)
    return rows


@triton.jit
def read_until(values, row_stride, column, tokens, inside, first, length, GROUP: tl.constexpr):
    """The same, with zeros for steps past the end."""
    rows = ()
    for i in tl.static_range(GROUP):
        mask = both(inside, first + i < length)
        row = tl.load(values + tokens[i] * row_stride + column, mask=mask, other=0.0)
        rows = rows + (row.to(tl.float32),)
    return rows


@triton.jit(do_not_specialize=["length"])
def scan_backward(
    u, dt, A, B, C, D, dt_bias, order, saved, scratch, grad_y,
    grad_u, grad_dt, grad_A, grad_B, grad_C, grad_D, grad_bias,
    length, B_direction, B_image, B_token, C_direction, C_image, C_token,
    directions: tl.constexpr, channels: tl.constexpr, N: tl.constexpr,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Inputs and saved as in the forward kernel; grad_y: (B, L, D), the gradient of every direction's y.

    grad_u, grad_dt: (K, B, L, D).  Partials, float32: grad_A (K, B, N, D); grad_B, grad_C (channel blocks,
    K, B, L, N); grad_D, grad_bias (K, B, D).  scratch: (B * K * channel blocks, CHUNK / GROUP, N, BLOCK).
    """
    blocks: tl.constexpr = (channels + BLOCK - 1) // BLOCK
    groups: tl.constexpr = CHUNK // GROUP
    program = tl.program_id(0)
    images = tl.num_programs(0) // (directions * blocks)
    block = program % blocks
    k = program // blocks % directions
    image = program // (blocks * directions)
    lane = tl.arange(0, BLOCK)
    channel = block * BLOCK + lane
    state = tl.arange(0, N)
    inside = within(channel, channels, BLOCK)

    row = (k * images + image).to(tl.int64)
    u += row * length * channels
    dt += row * length * channels
    grad_u += row * length * channels
    grad_dt += row * length * channels
    grad_y += image.to(tl.int64) * length * channels
    B += k.to(tl.int64) * B_direction + image.to(tl.int64) * B_image
    C += k.to(tl.int64) * C_direction + image.to(tl.int64) * C_image
    partial = (block.to(tl.int64) * directions * images + row) * length * N
    grad_B += partial
    grad_C += partial
    order += k * length
    chunks = tl.cdiv(length, CHUNK)
    saved += (row * chunks + chunks - 1) * (N * channels)
    square = state[:, None] * channels + channel[None, :]  # (N, BLOCK)
    every = tl.full([N], True, tl.int1)
    scratch += program.to(tl.int64) * (groups * N * BLOCK) + state[:, None] * BLOCK + lane[None, :]

    rate = tl.load(A + k * (N * channels) + square, mask=inside[None, :], other=0.0).to(tl.float32) * LOG2_E
    skip = tl.load(D + k * channels + channel, mask=inside, other=0.0).to(tl.float32)
    bias = tl.load(dt_bias + k * channels + channel, mask=inside, other=0.0).to(tl.float32)
    carried = tl.zeros([N, BLOCK], dtype=tl.float32)  # the part of h's gradient from later tokens
    sum_A = tl.zeros([N, BLOCK], dtype=tl.float32)
    sum_D = tl.zeros([BLOCK], dtype=tl.float32)
    sum_bias = tl.zeros([BLOCK], dtype=tl.float32)

    for back in range(chunks):
        chunk = chunks - 1 - back
        start = chunk * CHUNK
        h = tl.load(saved + square, mask=inside[None, :], other=0.0)
        saved -= N * channels
        tl.debug_barrier()  # the chunk after this one has been read
        tokens = tokens_of(order, start, length, GROUP)
        xs = read_until(u, channels, channel, tokens, inside, start, length, GROUP)
        bs = read(B, B_token, state, tokens, every, GROUP)
        raws = read(dt, channels, channel, tokens, inside, GROUP)
        for group in range(groups - 1):
            following = start + group * GROUP + GROUP
            tokens = tokens_of(order, following, length, GROUP)
            next_xs = read_until(u, channels, channel, tokens, inside, following, length, GROUP)
            next_bs = read(B, B_token, state, tokens, every, GROUP)
            next_raws = read(dt, channels, channel, tokens, inside, GROUP)
            tl.store(scratch + group * (N * BLOCK), h)
            for i in tl.static_range(GROUP):
                step = softplus(raws[i] + bias)
                h = exp2(step[None, :] * rate) * h + (step * xs[i])[None, :] * bs[i][:, None]
            xs = next_xs
            bs = next_bs
            raws = next_raws
        tl.store(scratch + (groups - 1) * (N * BLOCK), h)
        tl.debug_barrier()  # a lane may read values that another lane wrote

        last = start + CHUNK - GROUP
        cs = read(C, C_token, state, tokens, every, GROUP)
        dys = read_until(grad_y, channels, channel, tokens, inside, last, length, GROUP)
        for back_group in range(groups):
            first = last - back_group * GROUP
            earlier = tl.maximum(first - GROUP, 0)
            near = tokens_of(order, earlier, length, GROUP)
            next_xs = read_until(u, channels, channel, near, inside, earlier, length, GROUP)
            next_bs = read(B, B_token, state, near, every, GROUP)
            next_cs = read(C, C_token, state, near, every, GROUP)
            next_raws = read(dt, channels, channel, near, inside, GROUP)
            next_dys = read_until(grad_y, channels, channel, near, inside, earlier, length, GROUP)
            h = tl.load(scratch + (groups - 1 - back_group) * (N * BLOCK))
            steps = ()
            decays = ()
            before = ()
            for i in tl.static_range(GROUP):
                step = softplus(raws[i] + bias)
                decay = exp2(step[None, :] * rate)
                before = before + (h,)
                h = decay * h + (step * xs[i])[None, :] * bs[i][:, None]
                steps = steps + (step,)
                decays = decays + (decay,)
            for i in tl.static_range(GROUP - 1, -1, -1):
                live = first + i < length
                token, x, step, b, c, dy = tokens[i], xs[i], steps[i], bs[i], cs[i], dys[i]
                grad_h = dy[None, :] * c[:, None] + carried
                dC = tl.sum(h * dy[None, :], axis=1)
                dB = tl.sum(grad_h * (step * x)[None, :], axis=1)
                grad_drive = tl.sum(grad_h * b[:, None], axis=0)
                carried = decays[i] * grad_h
                h = before[i]
                grad_exponent = carried * h
                sum_A += grad_exponent * step[None, :]
                grad_step = tl.sum(grad_exponent * rate, axis=0) * LN_2 + grad_drive * x
                grad_raw = grad_step * sigmoid(raws[i] + bias)
                sum_bias += grad_raw
                sum_D += dy * x
                du = grad_drive * step + skip * dy
                at = token * channels + channel
                tl.store(grad_u + at, du.to(grad_u.dtype.element_ty), mask=both(inside, live))
                tl.store(grad_dt + at, grad_raw.to(grad_dt.dtype.element_ty), mask=both(inside, live))
                tl.store(grad_B + token * N + state, dB, mask=both(every, live))
                tl.store(grad_C + token * N + state, dC, mask=both(every, live))
            tokens = near
            xs = next_xs
            bs = next_bs
            cs = next_cs
            dys = next_dys
            raws = next_raws

    tl.store(grad_A + row * (N * channels) + square, sum_A, mask=inside[None, :])
    tl.store(grad_D + row * channels + channel, sum_D, mask=inside)
    tl.store(grad_bias + row * channels + channel, sum_bias, mask=inside)
