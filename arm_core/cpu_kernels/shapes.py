"""Shapes of the operators' arrays: checks, padding to whole vectors, and the kernels' memory layout."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from arm_core.cpu_kernels.scan import CHUNK
from arm_core.cpu_kernels.simd import CACHE_LINE, LANES, SUMS

F32 = npt.NDArray[np.float32]
Orders = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Sizes:
    """Sizes by letter, read from one operator's inputs.

    Besides the letters of the reference: V is D rounded up to whole vectors, J = V / `LANES`, Q is N
    rounded up to a multiple of `SUMS`, T is the number of chunks of tokens, and E is `LANES`.
    """

    letters: dict[str, int]

    @classmethod
    def of_conv(cls, x: F32, weight: F32, bias: F32, order: Orders) -> Sizes:
        sizes = cls._read(x=(x, "BLD"), weight=(weight, "KDW"))
        sizes.check(x=(x, "BLD"), weight=(weight, "KDW"), bias=(bias, "KD"))
        sizes._check_order(order)
        return sizes

    @classmethod
    def of_scan(
        cls, u: F32, dt: F32, A: F32, B: F32, C: F32, D: F32, dt_bias: F32, z: F32, order: Orders
    ) -> Sizes:
        sizes = cls._read(u=(u, "KBLD"), A=(A, "KDN"))
        sizes.check(u=(u, "KBLD"), dt=(dt, "KBLD"), A=(A, "KDN"), B=(B, "KBLN"), C=(C, "KBLN"))
        sizes.check(D=(D, "KD"), dt_bias=(dt_bias, "KD"), z=(z, "BLD"))
        sizes._check_order(order)
        return sizes

    @classmethod
    def _read(cls, **arrays: tuple[F32, str]) -> Sizes:
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
        blocks = -(-letters["D"] // LANES)
        letters |= {"V": blocks * LANES, "J": blocks, "T": -(-letters["L"] // CHUNK), "E": LANES}
        return cls(letters | {"Q": -(-letters.get("N", 1) // SUMS) * SUMS})

    def shape(self, axes: str) -> tuple[int, ...]:
        return tuple(self.letters[letter] for letter in axes)

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
        if not _are_permutations(order.tobytes(), shape):
            raise ValueError(f"order: expected each row to be a permutation of 0..{shape[1] - 1}")

    def widen(self, array: F32, axis: int = -1) -> F32:
        """The array with channels of 0 appended up to V: a copy if D is not V, else the array."""
        missing = self.letters["V"] - self.letters["D"]
        if missing == 0:
            return array
        widths = [(0, 0)] * array.ndim
        widths[axis] = (0, missing)
        return np.pad(array, widths)

    def narrow(self, array: F32, axis: int = -1) -> F32:
        """The array without the channels that `widen` appended."""
        if self.letters["V"] == self.letters["D"]:
            return array
        return np.ascontiguousarray(array.swapaxes(axis, 0)[: self.letters["D"]].swapaxes(axis, 0))


@lru_cache(maxsize=64)  # a model uses one table for all calls
def _are_permutations(order: bytes, shape: tuple[int, ...]) -> bool:
    rows = np.frombuffer(order, np.int32).reshape(shape)
    return bool((np.sort(rows) == np.arange(shape[1])).all())


def new(shape: tuple[int, ...]) -> F32:
    """Memory for a result, starting at a cache line; its kernel writes every element."""
    size = math.prod(shape)
    memory = np.empty(size + CACHE_LINE, np.float32)
    skip = (-memory.__array_interface__["data"][0] // memory.itemsize) % CACHE_LINE
    return memory[skip : skip + size].reshape(shape)


def dense(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The array in the kernels' layout: C-ordered and read-only, so that one compiled version is enough."""
    view = np.ascontiguousarray(array).view()
    view.flags.writeable = False
    return view


def rows(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """`dense`, without a copy if the rows are slices of longer rows, such as the halves of in_proj's output.

    The last axis of the view is then a whole row, from the start of the slice. Kernels must not read beyond
    the slice, since the end of the last row is outside the array.
    """
    if array.flags.c_contiguous:
        return dense(array)
    row = array.strides[-2] // array.itemsize
    strides = [array.itemsize]
    for size in (row, *array.shape[-2:0:-1]):
        strides.append(strides[-1] * size)
    if row < array.shape[-1] or array.strides != tuple(reversed(strides)):
        return dense(array)
    shape = (*array.shape[:-1], row)
    return np.lib.stride_tricks.as_strided(array, shape, array.strides, writeable=False)
