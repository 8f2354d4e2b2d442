"""Matrices in 4 or 8 bits in the format of MLX: groups of integers with a scale and an offset.

    w[o, i] = scales[o, i // g] * q[o, i] + biases[o, i // g]          q: 0 .. 2^bits - 1

A `Quantized` can replace a float32 array that is read through `np.asarray`. An engine with quantized products
uses its parts instead.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from arm_core.files.errors import BadFileError
from arm_core.files.safetensors import Tensor

F32 = npt.NDArray[np.float32]

BITS, GROUP_SIZES = (4, 8), (32, 64, 128)

SCALE_FLOOR = 1e-7
"""Smallest scale; a group of equal values is divided by it."""


@dataclass(frozen=True)
class Quantized:
    """A matrix (out, in) in groups along its rows."""

    packed: npt.NDArray[np.uint32]
    """(out, in * bits / 32), the first value in the lowest bits."""
    scales: F32
    """(out, in / group_size)"""
    biases: F32
    """(out, in / group_size)"""
    bits: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.packed.shape[0], self.packed.shape[1] * 32 // self.bits

    @property
    def group_size(self) -> int:
        return self.shape[1] // int(self.scales.shape[1])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> npt.NDArray[Any]:
        """The float32 values."""
        levels = _unpack(self.packed, self.bits).reshape(*self.scales.shape, -1).astype(np.float32)
        values = (levels * self.scales[..., None] + self.biases[..., None]).reshape(self.shape)
        return values if dtype is None else values.astype(dtype, copy=False)


def quantize(values: F32, bits: int, group_size: int) -> Quantized:
    """Round to each group's grid, which contains 0 and the group's largest magnitude exactly.

    values: (out, in), `in` a multiple of `group_size`.
    """
    rows, columns = values.shape
    if bits not in BITS or group_size not in GROUP_SIZES or columns % group_size:
        raise ValueError(f"cannot quantize {rows}x{columns} values to {bits} bits in groups of {group_size}")
    groups = values.reshape(rows, -1, group_size).astype(np.float32)
    low, high = groups.min(-1), groups.max(-1)
    negative = np.abs(low) > np.abs(high)
    edge = np.where(negative, low, high)
    scale = np.maximum((high - low) / np.float32(2**bits - 1), np.float32(SCALE_FLOOR))
    scale = np.where(negative, scale, -scale)
    steps = np.rint(edge / scale)
    scale = np.where(steps != 0, edge / np.where(steps == 0, 1, steps), scale).astype(np.float32)
    bias = np.where(steps == 0, 0, edge).astype(np.float32)
    levels = np.clip(np.rint((groups - bias[..., None]) / scale[..., None]), 0, 2**bits - 1)
    return Quantized(_pack(levels.reshape(rows, columns).astype(np.uint32), bits), scale, bias, bits)


def _pack(levels: npt.NDArray[np.uint32], bits: int) -> npt.NDArray[np.uint32]:
    each = 32 // bits
    words = levels.reshape(len(levels), -1, each)
    packed = np.zeros(words.shape[:2], np.uint32)
    for i in range(each):
        packed |= words[..., i] << np.uint32(i * bits)
    return packed


def _unpack(packed: npt.NDArray[np.uint32], bits: int) -> npt.NDArray[np.uint32]:
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    return (packed[..., None] >> shifts) & np.uint32(2**bits - 1)


# -- in files: NAME.weight becomes NAME.weight (packed), NAME.scales and NAME.biases ---------------------


@dataclass(frozen=True)
class QuantizedTensor(Tensor):
    """A `Tensor` of float32 values that are stored quantized; `parts` returns the stored form."""

    parts: Callable[[], Quantized]
    bits_each: int
    group_size: int


def as_tensor(
    shape: tuple[int, int], bits: int, group_size: int, parts: Callable[[], Quantized]
) -> QuantizedTensor:
    """A matrix that is quantized when it is read."""

    def values() -> F32:
        return np.asarray(parts(), np.float32)

    return QuantizedTensor(shape, "F32", values, parts, bits, group_size)


def split(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors to store for a model: quantized ones as their parts, the others unchanged."""
    stored: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if not isinstance(tensor, QuantizedTensor):
            stored[name] = tensor
            continue
        rows, columns = tensor.shape
        owner = name.removesuffix("weight")
        stored[name] = _part(tensor, "packed", (rows, columns * tensor.bits_each // 32), "U32")
        for part in ("scales", "biases"):
            stored[owner + part] = _part(tensor, part, (rows, columns // tensor.group_size), "F32")
    return stored


def _part(tensor: QuantizedTensor, name: str, shape: tuple[int, int], dtype: str) -> Tensor:
    return Tensor(shape, dtype, lambda: getattr(tensor.parts(), name))


def join(stored: Mapping[str, Tensor], bits: int, owner: str) -> dict[str, Tensor]:
    """The inverse of `split`. owner: the name of the file in errors."""
    found = {name: tensor for name, tensor in stored.items() if not name.endswith((".scales", ".biases"))}
    for name, packed in found.items():
        if packed.dtype != "U32":
            continue
        prefix = name.removesuffix("weight")
        scales, biases = stored.get(f"{prefix}scales"), stored.get(f"{prefix}biases")
        if scales is None or biases is None or not name.endswith(".weight"):
            raise BadFileError(f"{owner}: {name}: quantized, but scales or biases are missing")
        if not _fit(packed, scales, biases, bits):
            raise BadFileError(
                f"{owner}: {name}: packed {packed.shape}, scales {scales.shape} and biases {biases.shape} "
                f"do not match: expected a matrix of {bits} bits"
            )
        shape = packed.shape[0], packed.shape[1] * 32 // bits
        group_size = shape[1] // scales.shape[1]
        found[name] = as_tensor(shape, bits, group_size, _reader(packed, scales, biases, bits))
    return found


def _fit(packed: Tensor, scales: Tensor, biases: Tensor, bits: int) -> bool:
    if (
        len(packed.shape) != 2
        or len(scales.shape) != 2
        or scales.shape != biases.shape
        or not scales.shape[1]
    ):
        return False
    columns = packed.shape[1] * 32 // bits
    return (
        scales.shape[0] == packed.shape[0]
        and (scales.dtype, biases.dtype) == ("F32", "F32")
        and columns in {size * scales.shape[1] for size in GROUP_SIZES}
    )


def _reader(packed: Tensor, scales: Tensor, biases: Tensor, bits: int) -> Callable[[], Quantized]:
    return lambda: Quantized(packed.bits(), scales.bits(), biases.bits(), bits)
