"""The two sequence operators of the mixer on a CPU, forward and backward: both engines call these.

They compute what `arm_core.reference.scan` states, in float32, with Numba kernels compiled at the first
call and cached on disk. Inputs are NumPy arrays, as a rule zero-copy views of a framework's tensors;
they are never modified, and rows that are slices of longer rows are read in place. Sizes: K directions,
B images, L tokens, D channels, N states, W convolution taps.

Results are repeatable to the last bit, whatever the number of threads: a task never shares what it
writes, and partial sums are added in a fixed order. Calls from several threads take turns.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any, NamedTuple

import numba
import numpy as np
import numpy.typing as npt

from arm_core import cpu_kernels as kernels

F32 = npt.NDArray[np.float32]
Orders = npt.NDArray[np.int32]

_turn = threading.Lock()  # Numba's fallback thread pool ends the process when two threads enter it
_default_threads: int | None = None
_PROCESSORS = int(numba.config.NUMBA_NUM_THREADS)  # type: ignore[attr-defined]


def set_threads(count: int | None) -> None:
    """CPU threads of later calls that name none; None leaves Numba's own choice.

    More threads than processors make no difference. Only this module is affected, not other Numba code.
    """
    global _default_threads
    if count is not None and count < 1:
        raise ValueError(f"threads: expected 1 or more, found {count}")
    _default_threads = count


def start_threads() -> None:
    """Start Numba's thread pool, if it is not running.

    Where the pool is OpenMP's, its start sets the thread count of everything in the process that uses
    OpenMP: an engine whose framework does so starts the pool first and sets its own count afterwards.
    """
    numba.get_num_threads()


def conv_forward(x: F32, weight: F32, bias: F32, order: Orders, *, threads: int | None = None) -> F32:
    """Depthwise causal convolution along each direction's order, then SiLU.

    x: (B, L, D).  weight: (K, D, W).  bias: (K, D).  order: (K, L) int32.  Returns u: (K, B, L, D).
    Raises ValueError on a shape or dtype that does not fit.
    """
    sizes = _Sizes.of_conv(x, weight, bias, order)
    u = _new(sizes.shape("KBLD"))
    _run(kernels.conv_forward, threads, _rows(x), _dense(weight), _dense(bias), _dense(order), u)
    return u


class ConvGradients(NamedTuple):
    """Gradients of `conv_forward`, each with the shape of its input."""

    x: F32
    weight: F32
    bias: F32


def conv_backward(
    grad_u: F32, x: F32, weight: F32, bias: F32, order: Orders, *, threads: int | None = None
) -> ConvGradients:
    """Gradients of `conv_forward` from that of its result, (K, B, L, D). Raises ValueError likewise."""
    sizes = _Sizes.of_conv(x, weight, bias, order)
    sizes.check(grad_u=(grad_u, "KBLD"))
    grad_x = _new(x.shape)
    part_weight = _new(sizes.shape("BKWD"))
    part_bias = _new(sizes.shape("BKD"))
    inputs = _dense(grad_u), _rows(x), _dense(weight), _dense(bias), _dense(order)
    _run(kernels.conv_backward, threads, *inputs, grad_x, part_weight, part_bias)
    return ConvGradients(grad_x, part_weight.sum(0).swapaxes(1, 2), part_bias.sum(0))


@dataclass(frozen=True)
class ScanResiduals:
    """What `scan_forward` keeps for `scan_backward`."""

    mean: F32
    """(B, L, D), the mean over the directions before the gate."""
    states: F32
    """State before every chunk of tokens, in the kernel's own layout: N / CHUNK values per channel."""


def scan_forward(
    u: F32, dt: F32, A: F32, B: F32, C: F32, D: F32, dt_bias: F32, z: F32, order: Orders,
    *, keep: bool, threads: int | None = None,
) -> tuple[F32, ScanResiduals | None]:  # fmt: skip
    """Selective scan over K directions, their mean, and the gate; softplus(dt + dt_bias) is the step.

    u, dt: (K, B, L, D).  A: (K, D, N), negative.  B, C: (K, B, L, N).  D, dt_bias: (K, D).
    z: (B, L, D).  order: (K, L) int32.  keep: whether a backward will follow.
    Returns out: (B, L, D), and what the backward needs, None without `keep`.
    Raises ValueError on a shape or dtype that does not fit.
    """
    sizes = _Sizes.of_scan(u, dt, A, B, C, D, dt_bias, z, order)
    out = _new(z.shape)
    mean = _new(z.shape) if keep else out
    states = _new(sizes.states if keep else (0,) * 6)
    inputs = _scan_inputs(u, dt, A, B, C, D, dt_bias, z, order)
    _run(kernels.scan_forward, threads, *inputs, mean, out, states)
    return out, ScanResiduals(mean, states) if keep else None


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
    """Gradients of `scan_forward` from that of its result, (B, L, D), and what it kept.

    Raises ValueError on a shape or dtype that does not fit.
    """
    sizes = _Sizes.of_scan(u, dt, A, B, C, D, dt_bias, z, order)
    sizes.check(grad_out=(grad_out, "BLD"))

    def empty(axes: str) -> F32:
        return _new(sizes.shape(axes))

    grad_u, grad_dt, grad_z = empty("KBLD"), empty("KBLD"), empty("BLD")
    part_A, part_B, part_C = empty("BKND"), empty("JKBLN"), empty("JKBLN")
    part_D, part_bias = empty("BKD"), empty("BKD")
    inputs = _scan_inputs(u, dt, A, B, C, D, dt_bias, z, order)
    kept = _dense(residuals.mean), _dense(residuals.states)
    parts = part_A, part_B, part_C, part_D, part_bias
    _run(kernels.scan_backward, threads, _rows(grad_out), *inputs, *kept, grad_u, grad_dt, grad_z, *parts)
    grad_A, grad_B, grad_C, grad_D, grad_bias = (part.sum(0) for part in parts)
    return ScanGradients(grad_u, grad_dt, grad_A.swapaxes(1, 2), grad_B, grad_C, grad_D, grad_bias, grad_z)


@dataclass(frozen=True)
class _Sizes:
    """Sizes by letter, read from one operator's inputs; every further array is checked against them."""

    letters: dict[str, int]

    @classmethod
    def of_conv(cls, x: F32, weight: F32, bias: F32, order: Orders) -> _Sizes:
        sizes = cls._read(x=(x, "BLD"), weight=(weight, "KDW"))
        sizes.check(x=(x, "BLD"), weight=(weight, "KDW"), bias=(bias, "KD"))
        sizes._check_order(order)
        return sizes

    @classmethod
    def of_scan(
        cls, u: F32, dt: F32, A: F32, B: F32, C: F32, D: F32, dt_bias: F32, z: F32, order: Orders
    ) -> _Sizes:
        sizes = cls._read(u=(u, "KBLD"), A=(A, "KDN"))
        sizes.check(u=(u, "KBLD"), dt=(dt, "KBLD"), A=(A, "KDN"), B=(B, "KBLN"), C=(C, "KBLN"))
        sizes.check(D=(D, "KD"), dt_bias=(dt_bias, "KD"), z=(z, "BLD"))
        sizes._check_order(order)
        return sizes

    @classmethod
    def _read(cls, **arrays: tuple[F32, str]) -> _Sizes:
        letters: dict[str, int] = {}
        for name, (array, axes) in arrays.items():
            if array.ndim != len(axes):
                raise ValueError(
                    f"{name}: expected {len(axes)} axes ({', '.join(axes)}), found {array.shape}"
                )
            letters = dict(zip(axes, array.shape, strict=True)) | letters
        if empty := [letter for letter, size in letters.items() if size < 1 and letter != "B"]:
            raise ValueError(
                f"{', '.join(empty)}: expected sizes of 1 or more, found 0 in {', '.join(arrays)}"
            )
        return cls(letters | {"J": -(-letters["D"] // kernels.BLOCK)})

    def shape(self, axes: str) -> tuple[int, ...]:
        return tuple(self.letters[letter] for letter in axes)

    @property
    def states(self) -> tuple[int, ...]:
        chunks = -(-self.letters["L"] // kernels.CHUNK)
        return (*self.shape("KB"), chunks, *self.shape("JN"), kernels.BLOCK)

    def check(self, **arrays: tuple[F32, str]) -> None:
        for name, (array, axes) in arrays.items():
            if array.shape != self.shape(axes) or array.dtype != np.float32:
                raise ValueError(
                    f"{name}: expected float32 {self.shape(axes)} ({', '.join(axes)}), "
                    f"found {array.dtype} {array.shape}"
                )

    def _check_order(self, order: Orders) -> None:
        shape = self.shape("KL")
        if order.shape != shape or order.dtype != np.int32:
            raise ValueError(f"order: expected int32 {shape} (K, L), found {order.dtype} {order.shape}")
        seen = np.zeros(shape, np.bool_)
        if order.min() >= 0 and order.max() < shape[1]:
            seen[np.arange(shape[0])[:, None], order] = True
        if not seen.all():
            raise ValueError(f"order: expected each row to be a permutation of 0..{shape[1] - 1}")


def _new(shape: tuple[int, ...]) -> F32:
    """Memory for a result; its kernel writes every element."""
    return np.empty(shape, np.float32)


def _scan_inputs(*arrays: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], ...]:
    u, dt, A, B, C, D, dt_bias, z, order = arrays
    tokens = _rows(u), _rows(dt), _dense(A), _rows(B), _rows(C)
    return (*tokens, _dense(D), _dense(dt_bias), _rows(z), _dense(order))


def _dense(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The array as the kernels take their inputs: C-ordered, read-only (one compiled version serves all)."""
    view = np.ascontiguousarray(array).view()
    view.flags.writeable = False
    return view


def _rows(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """`_dense` without a copy where the rows are slices of longer rows, as the halves of in_proj's output.

    The view then has the whole row as its last axis, beginning at the slice; kernels read no further than
    the slice, since the end of the very last row lies outside of the array.
    """
    row = array.strides[-2] // array.itemsize
    strides = [array.itemsize]
    for size in (row, *array.shape[-2:0:-1]):
        strides.append(strides[-1] * size)
    if row < array.shape[-1] or array.strides != tuple(reversed(strides)):
        return _dense(array)
    shape = (*array.shape[:-1], row)
    return np.lib.stride_tricks.as_strided(array, shape, array.strides, writeable=False)


def _run(kernel: Any, threads: int | None, *arrays: npt.NDArray[Any]) -> None:
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
