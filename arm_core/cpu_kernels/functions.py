"""Shared parts of the kernels: exponentials on vectors, scratch memory, and Numba's options.

The functions are polynomials with a relative error of about 1e-7; they propagate NaN. The compiler may fuse
a product and a sum but never reorders them, so that rounding tricks work and runs are repeatable.
"""

# Compiled code has no Python types: Numba finds them from the arrays of the first call.
# mypy: disallow-untyped-defs=False, disallow-untyped-calls=False
# mypy: disable-error-code="call-arg,var-annotated"

from __future__ import annotations

from typing import Any

import numba as nb
import numpy as np

from arm_core.cpu_kernels.simd import (
    CACHE_LINE,
    LANES,
    add_to_exponent,
    at_least,
    fma,
    minus_abs,
    where_negative,
)

F4 = np.float32
LOG2E, LN2 = F4(1.4426950408889634), F4(0.6931471805599453)
ROUND = F4(1.5 * 2.0**23)  # adding it rounds a float to an integer, which is in the low bits

_OPTIONS: dict[str, Any] = {"boundscheck": False, "error_model": "numpy"}
_INNER: dict[str, Any] = {
    **_OPTIONS,
    "no_cpython_wrapper": True,
    "no_cfunc_wrapper": True,
}  # compiles faster
INLINE: dict[str, Any] = {**_INNER, "forceinline": True}
"""Options of a function that becomes part of its caller."""
TASK = _INNER
"""Options of a function that runs on one thread."""
KERNEL: dict[str, Any] = {**_OPTIONS, "parallel": True, "cache": True}
"""Options of a function that Python calls and that distributes tasks over the threads."""


@nb.njit(**INLINE)
def exp2(x):
    """2**x for x <= 0 to 1e-7; 2**-80 below -80.

    A smaller decay leaves a state that is negligible beside a float32 input, but its products are subnormal
    numbers, for which processors need a hundred times as long.
    """
    x = at_least(x, F4(-80.0))
    shifted = x + ROUND
    f = x - (shifted - ROUND)
    p = fma(f, F4(1.3264727e-3), F4(9.6715126e-3))
    p = fma(p, f, F4(5.5507337e-2))
    p = fma(p, f, F4(2.4022242e-1))
    p = fma(p, f, F4(6.9314698e-1))
    return add_to_exponent(fma(p, f, F4(1.0)), shifted)


@nb.njit(**INLINE)
def exp(x):
    """e**x for x <= 0, with a relative error of 1e-7 even for tiny values; 2**-126 below -87."""
    x = at_least(x, F4(-87.33654))
    shifted = fma(x, LOG2E, ROUND)
    n = shifted - ROUND
    f = fma(n, F4(-0.693359375), x)  # ln 2 in two parts: the first product is exact
    f = fma(n, F4(2.1219444e-4), f)
    p = fma(f, F4(1.3814613e-3), F4(8.3687098e-3))
    p = fma(p, f, F4(4.1668387e-2))
    p = fma(p, f, F4(1.6666521e-1))
    p = fma(p, f, F4(4.9999993e-1))
    p = fma(p, f, F4(1.0))
    return add_to_exponent(fma(p, f, F4(1.0)), shifted)


@nb.njit(**INLINE)
def reciprocal(e):
    """1 / (1 + e) for 0 <= e <= 1: a parabola, then two Newton steps. A division costs 30 products."""
    minus = F4(-1.0) - e
    r = fma(fma(e, F4(0.32323232), F4(-0.80808081)), e, F4(0.98989899))
    r = fma(r, fma(minus, r, F4(1.0)), r)
    return fma(r, fma(minus, r, F4(1.0)), r)


@nb.njit(**INLINE)
def log1p(e):
    """log(1 + e) for 0 <= e <= 1, with a relative error of 2e-7 even for tiny values."""
    p = fma(e, F4(5.232694261e-3), F4(-2.950523877e-2))
    p = fma(p, e, F4(7.822595186e-2))
    p = fma(p, e, F4(-1.366324579e-1))
    p = fma(p, e, F4(1.910600676e-1))
    p = fma(p, e, F4(-2.484298221e-1))
    p = fma(p, e, F4(3.331909681e-1))
    p = fma(p, e, F4(-4.999949314e-1))
    return e * fma(p, e, F4(1.0))


@nb.njit(**INLINE)
def softplus_and_slope(x):
    """log(1 + e**x) and its derivative, the sigmoid."""
    e = exp(minus_abs(x))
    r = reciprocal(e)
    return at_least(x, F4(0.0)) + log1p(e), where_negative(x, e * r, r)


@nb.njit(**INLINE)
def sigmoid(x):
    return softplus_and_slope(x)[1]


@nb.njit(**INLINE)
def vectors(count):
    """Scratch memory of `count` vectors, starting at a cache line."""
    memory = np.empty((count + 1) * LANES, F4)
    skip = (-memory.ctypes.data // 4) % CACHE_LINE
    return memory[skip : skip + count * LANES].reshape((count, LANES))
