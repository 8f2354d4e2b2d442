"""The two sequence operators of the mixer on a CPU, forward and backward, the gate of the MLP, and influence.

They compute the functions of `arm_core.model.reference.scan` in float32, with Numba kernels that are
compiled at the first call and cached on disk. Inputs are NumPy arrays, usually zero-copy views of a
framework's tensors. They are never modified, and rows that are slices of longer rows are read in place.
Sizes: K directions, B images, L tokens, D channels, N states, W convolution width. Channels are computed 64
at a time: other D are padded with zeros, which needs copies.

Results are bit-identical for any number of threads: tasks never write to the same memory, and partial
sums are added in a fixed order. Calls from several threads run one at a time.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any, NamedTuple

import numba
import numpy as np
import numpy.typing as npt

from arm_core.cpu_kernels import conv, influence, notice, scan, swiglu  # noqa: F401 (notice registers itself)
from arm_core.cpu_kernels.shapes import F32, Orders, Sizes, dense, new, rows
from arm_core.cpu_kernels.simd import LANES

_turn = threading.Lock()  # Numba's fallback thread pool aborts the process if two threads enter it
_default_threads: int | None = None
_PROCESSORS = int(numba.config.NUMBA_NUM_THREADS)  # type: ignore[attr-defined]


def set_threads(count: int | None) -> None:
    """Set the default number of CPU threads of later calls; None keeps Numba's default.

    More threads than processors make no difference. Only this module is affected, not other Numba code.
    """
    global _default_threads
    if count is not None and count < 1:
        raise ValueError(f"threads: expected 1 or more, found {count}")
    _default_threads = count


def start_threads() -> None:
    """Start Numba's thread pool, if it is not running.

    If the pool is OpenMP's, its start sets the thread count of all code in the process that uses OpenMP.
    An engine whose framework uses OpenMP starts the pool first and sets its own count afterwards.
    """
    numba.get_num_threads()


def conv_forward(x: F32, weight: F32, bias: F32, order: Orders, *, threads: int | None = None) -> F32:
    """Depthwise causal convolution along each direction's order, then SiLU.

    x: (B, L, D).  weight: (K, D, W).  bias: (K, D).  order: (K, L) int32.  Returns u: (K, B, L, D).
    Raises ValueError on a shape or dtype that does not fit.
    """
    sizes = Sizes.of_conv(x, weight, bias, order)
    u = new(sizes.shape("KBLV"))
    run(conv.conv_forward, threads, *_conv_inputs(sizes, x, weight, bias, order), u)
    return sizes.narrow(u)


class ConvGradients(NamedTuple):
    """Gradients of `conv_forward`, each with the shape of its input."""

    x: F32
    weight: F32
    bias: F32


def conv_backward(
    grad_u: F32, x: F32, weight: F32, bias: F32, order: Orders, *, threads: int | None = None
) -> ConvGradients:
    """Gradients of `conv_forward` from that of its result, (K, B, L, D). Raises ValueError as well."""
    sizes = Sizes.of_conv(x, weight, bias, order)
    sizes.check(grad_u=(grad_u, "KBLD"))
    grad_x, part_weight, part_bias = (new(sizes.shape(axes)) for axes in ("BLV", "BKWV", "BKV"))
    inputs = rows(sizes.widen(grad_u)), *_conv_inputs(sizes, x, weight, bias, order)
    run(conv.conv_backward, threads, *inputs, grad_x, part_weight, part_bias)
    grad_weight = part_weight.sum(0).swapaxes(1, 2)
    return ConvGradients(
        sizes.narrow(grad_x), sizes.narrow(grad_weight, axis=1), sizes.narrow(part_bias.sum(0))
    )


@dataclass(frozen=True)
class ScanResiduals:
    """The values that `scan_forward` keeps for `scan_backward`."""

    mean: F32
    """(B, L, D rounded up to 64), the mean over the directions before the gate."""
    states: F32
    """State before every chunk of tokens, in the kernel's layout: N / 16 values per channel."""


def scan_forward(
    u: F32, dt: F32, A: F32, B: F32, C: F32, D: F32, dt_bias: F32, z: F32, order: Orders,
    *, save_for_backward: bool, threads: int | None = None,
) -> tuple[F32, ScanResiduals | None]:  # fmt: skip
    """Selective scan over K directions, their mean, and the gate; softplus(dt + dt_bias) is the step.

    u, dt: (K, B, L, D).  A: (K, D, N), negative.  B, C: (K, B, L, N).  D, dt_bias: (K, D).
    z: (B, L, D).  order: (K, L) int32.  save_for_backward: whether a backward pass will follow.
    Returns out: (B, L, D), and the values for the backward pass, None without `save_for_backward`.
    Raises ValueError on a shape or dtype that does not fit.
    """
    sizes = Sizes.of_scan(u, dt, A, B, C, D, dt_bias, z, order)
    out = new(sizes.shape("BLV"))
    mean = new(sizes.shape("BLV")) if save_for_backward else out
    states = new(sizes.shape("KBTJNE") if save_for_backward else (0,) * 6)
    inputs = _scan_inputs(sizes, u, dt, A, B, C, D, dt_bias, z, order)
    run(scan.scan_forward, threads, *inputs, mean, out, states)
    return sizes.narrow(out), ScanResiduals(mean, states) if save_for_backward else None


class ScanGradients(NamedTuple):
    """Gradients of `scan_forward`, each with the shape of its input."""

    u: F32
    dt: F32
    A: F32
    B: F32
    C: F32
    D: F32
    dt_bias: F32
    z: F32


def scan_backward(
    grad_out: F32, residuals: ScanResiduals,
    u: F32, dt: F32, A: F32, B: F32, C: F32, D: F32, dt_bias: F32, z: F32, order: Orders,
    *, threads: int | None = None,
) -> ScanGradients:  # fmt: skip
    """Gradients of `scan_forward` from the gradient of its result, (B, L, D), and the values it kept.

    Raises ValueError on a shape or dtype that does not fit.
    """
    sizes = Sizes.of_scan(u, dt, A, B, C, D, dt_bias, z, order)
    sizes.check(grad_out=(grad_out, "BLD"))
    sizes.check(mean=(residuals.mean, "BLV"), states=(residuals.states, "KBTJNE"))

    gradients = [new(sizes.shape(axes)) for axes in ("KBLV", "KBLV", "KVN", "KBLN", "KBLN", "BLV")]
    parts = [new(sizes.shape(axes)) for axes in ("BKNV", "JKBLQ", "JKBLQ", "BKV", "BKV")]
    inputs = _scan_inputs(sizes, u, dt, A, B, C, D, dt_bias, z, order)
    kept = dense(residuals.mean), dense(residuals.states)
    run(scan.scan_backward, threads, rows(sizes.widen(grad_out)), *inputs, *kept, *gradients, *parts)

    grad_u, grad_dt, grad_A, grad_B, grad_C, grad_z = gradients
    grad_D, grad_bias = (part.sum(0) for part in parts[-2:])
    return ScanGradients(
        u=sizes.narrow(grad_u),
        dt=sizes.narrow(grad_dt),
        A=sizes.narrow(grad_A, axis=1),
        B=grad_B,
        C=grad_C,
        D=sizes.narrow(grad_D),
        dt_bias=sizes.narrow(grad_bias),
        z=sizes.narrow(grad_z),
    )


def swiglu_forward(a: F32, b: F32, *, threads: int | None = None) -> F32:
    """silu(a) * b, element by element; a and b have one shape. Raises ValueError if the shapes differ."""
    _check_alike(a=a, b=b)
    out = new(a.shape)
    run(swiglu.swiglu_forward, threads, *_flat(a, b), out.reshape(-1))
    return out


def swiglu_backward(grad_out: F32, a: F32, b: F32, *, threads: int | None = None) -> tuple[F32, F32]:
    """Gradients of a and b in `swiglu_forward`, from that of its result. Raises ValueError as well."""
    _check_alike(a=a, b=b, grad_out=grad_out)
    grad_a, grad_b = new(a.shape), new(a.shape)
    run(swiglu.swiglu_backward, threads, *_flat(grad_out, a, b), grad_a.reshape(-1), grad_b.reshape(-1))
    return grad_a, grad_b


def influence_map(
    x: F32, dt: F32, opening: F32, weight: F32, A: F32, B: F32, C: F32, D: F32, q: F32, order: Orders,
    *, threads: int | None = None,
) -> F32:  # fmt: skip
    """sum_d q[t, d] times the contribution of token s to the scan's output y_k[t, d], for all t, s and k.

    It takes one image. The contribution passes through the convolution, its fixed gate `opening`, and the
    scan with fixed dt, B and C, as in `arm_core.model.reference.influence`. The L x L x D values are never
    stored.
    x: (L, D).  dt: (K, L, D), after softplus.  opening: (K, L, D), sigmoid of the convolution.
    weight: (K, D, W).  A: (K, D, N), negative.  B, C: (K, L, N).  D: (K, D).  q: (L, D).  order: (K, L)
    int32. Returns (K, L, L), [k, t, s].  Raises ValueError on a shape or dtype that does not fit.
    """
    one = (dt[:, None], A, B[:, None], C[:, None], D, D, x[None], order)
    sizes = Sizes.of_scan(opening[:, None], *one)
    sizes.check(q=(q[None], "BLD"))
    width = Sizes.of_conv(x[None], weight, D, order).letters["W"]
    if width > LANES:
        raise ValueError(f"weight: expected a convolution width of at most {LANES}, found {width}")
    directions, length, channels = dt.shape
    padded = -(-length // LANES) * LANES

    def along(array: F32) -> F32:  # (K, L, ...) or (L, ...) by token -> (K, ..., steps), padded by zeros
        steps = [(array if array.ndim == 2 else array[k])[order[k]].T for k in range(directions)]
        return np.pad(np.stack(steps), ((0, 0), (0, 0), (0, padded + LANES - length)))

    in_order = np.take_along_axis(C, order[:, :, None], axis=1)
    ramp = np.repeat(np.array([1, 0], np.float32), padded)
    tasks = -(-channels // influence.CHANNELS)
    parts = new((directions, tasks, length, padded))
    arrays = along(x), along(dt), along(opening), weight, A, along(B), in_order, D, along(q), ramp
    run(influence.influence, threads, length, *(dense(a) for a in arrays), parts)
    out = np.empty((directions, length, length), np.float32)
    for k in range(directions):
        out[k][np.ix_(order[k], order[k])] = parts[k].sum(0)[:, :length]
    return out


def _check_alike(**arrays: F32) -> None:
    shape = arrays["a"].shape
    for name, array in arrays.items():
        if array.shape != shape or array.dtype != "float32":
            raise ValueError(f"{name}: expected float32 {shape}, found {array.dtype} {array.shape}")


def _flat(*arrays: F32) -> list[npt.NDArray[Any]]:
    return [dense(array).reshape(-1) for array in arrays]


def _conv_inputs(sizes: Sizes, x: F32, weight: F32, bias: F32, order: Orders) -> list[npt.NDArray[Any]]:
    transposed = dense(sizes.widen(weight, axis=1).swapaxes(1, 2))
    return [rows(sizes.widen(x)), transposed, dense(sizes.widen(bias)), dense(order)]


def _scan_inputs(
    sizes: Sizes, u: F32, dt: F32, A: F32, B: F32, C: F32, D: F32, dt_bias: F32, z: F32, order: Orders
) -> list[npt.NDArray[Any]]:
    tokens = rows(sizes.widen(u)), rows(sizes.widen(dt)), dense(sizes.widen(A, axis=1)), rows(B), rows(C)
    return [*tokens, *(dense(sizes.widen(a)) for a in (D, dt_bias)), rows(sizes.widen(z)), dense(order)]


def run(kernel: Any, threads: int | None, *arrays: Any) -> None:
    """Call a compiled kernel on this number of threads (None: see `set_threads`), one kernel at a time."""
    wanted = threads if threads is not None else _default_threads
    if wanted is not None and wanted < 1:
        raise ValueError(f"threads: expected 1 or more, found {wanted}")
    with _turn:
        before = numba.get_num_threads()
        numba.set_num_threads(min(wanted or before, _PROCESSORS))
        try:
            kernel(*arrays)
        finally:
            numba.set_num_threads(before)
