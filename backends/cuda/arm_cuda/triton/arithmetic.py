"""Scalar functions that the kernels share, in float32.

On a GPU they are its approximate instructions: `tl.exp2` and division add steps for denormal numbers, on
which no result here depends. Triton's interpreter cannot run assembly; it uses the plain functions.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether the kernels run in Triton's interpreter, on CPU tensors; only for tests."""

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)

if INTERPRETED:

    @triton.jit
    def exp2(x):
        return tl.exp2(x)

    @triton.jit
    def reciprocal(x):
        return 1.0 / x

else:

    @triton.jit
    def exp2(x):
        """2^x, with a relative error up to 2^-22."""
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )

    @triton.jit
    def reciprocal(x):
        """1/x, with a relative error up to 2^-23; 0 for an infinite x."""
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def softplus(x):
    """log(1 + e^x) = max(x, 0) + log1p(e), e = e^-|x|, accurate to a few units in the last place.

    log1p(e) = 2 artanh(s) with s = e / (2 + e) <= 1/3, as a polynomial in s^2. A hardware logarithm would
    lose the digits of small steps, which carry a state's long memory.
    """
    e = exp2(-tl.abs(x) * LOG2_E)
    s = e * reciprocal(2.0 + e)
    q = s * s
    p = 2.0 / 13 * q + 2.0 / 11
    p = p * q + 2.0 / 9
    p = p * q + 2.0 / 7
    p = p * q + 2.0 / 5
    p = p * q + 2.0 / 3
    p = p * q + 2.0
    return tl.maximum(x, 0.0) + p * s


@triton.jit
def sigmoid(x):
    return reciprocal(1.0 + exp2(-x * LOG2_E))
