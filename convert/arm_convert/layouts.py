"""Tables of correspondence between the parameter table and foreign formats; one row per tensor.

A foreign format can have other names, one tensor per scan direction instead of a leading axis K, and
another order or number of axes. Tensors are matched by name, never by shape. Letters in shapes: D width,
K directions, W kernel size of the convolution, T tokens, p patch side.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from arm_core.files.safetensors import AnyArray, Shape, Tensor


@dataclass(frozen=True)
class Layout:
    """The layout of a foreign tensor relative to ours (without the direction axis)."""

    shape: Callable[[Shape], Shape]
    """Foreign shape for a shape of ours."""
    to_foreign: Callable[[AnyArray], AnyArray]
    to_canonical: Callable[[AnyArray], AnyArray]


def reshaped(shape: Callable[[Shape], Shape], inverse: Callable[[Shape], Shape]) -> Layout:
    """The same values in the same order under another shape."""
    return Layout(shape, lambda x: x.reshape(shape(x.shape)), lambda x: x.reshape(inverse(x.shape)))


SAME = reshaped(lambda s: s, lambda s: s)


def channels_first_patches(patch: int, channels: int) -> Layout:
    """(D, p * p * channels) in (row, column, channel) order becomes (D, channels, p, p)."""
    return Layout(
        lambda s: (s[0], channels, patch, patch),
        lambda x: x.reshape(-1, patch, patch, channels).transpose(0, 3, 1, 2),
        lambda x: x.transpose(0, 2, 3, 1).reshape(x.shape[0], -1),
    )


@dataclass(frozen=True)
class Row:
    """One of our tensors and the foreign ones that hold it."""

    name: str
    shape: Shape
    names: tuple[str, ...]
    """Foreign names: one per direction if `stacked`, else one."""
    stacked: bool
    layout: Layout

    @property
    def foreign_shape(self) -> Shape:
        return self.layout.shape(self.shape[1:] if self.stacked else self.shape)

    def split(self, value: AnyArray) -> dict[str, AnyArray]:
        """Our tensor as foreign ones, by foreign name."""
        parts = list(value) if self.stacked else [value]
        return {name: self.layout.to_foreign(part) for name, part in zip(self.names, parts, strict=True)}

    def join(self, parts: Sequence[AnyArray]) -> AnyArray:
        """Foreign tensors, in the order of `names`, as ours."""
        values = [self.layout.to_canonical(part) for part in parts]
        return np.stack(values) if self.stacked else values[0]


def foreign_shapes(rows: Sequence[Row]) -> dict[str, Shape]:
    """Names and shapes of a model in the foreign format."""
    return {name: row.foreign_shape for row in rows for name in row.names}


def differences(rows: Sequence[Row], tensors: Mapping[str, Tensor]) -> list[str]:
    """Missing tensors and wrong shapes, one phrase each."""
    shapes = foreign_shapes(rows)
    missing = [f"missing {name} {shape}" for name, shape in shapes.items() if name not in tensors]
    return missing + [
        f"{name}: expected {shape}, found {tensors[name].shape}"
        for name, shape in shapes.items()
        if name in tensors and tensors[name].shape != shape
    ]


def to_canonical(rows: Sequence[Row], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Foreign tensors by our names, read on demand; ValueError for a missing tensor or a wrong shape."""
    if problems := differences(rows, tensors):
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError("; ".join(problems[:3]) + more)
    return {row.name: _joined(row, [tensors[name] for name in row.names]) for row in rows}


def _joined(row: Row, parts: list[Tensor]) -> Tensor:
    if len({part.dtype for part in parts}) > 1:
        found = ", ".join(f"{name} {part.dtype}" for name, part in zip(row.names, parts, strict=True))
        raise ValueError(f"{row.name}: expected one type for all directions, found {found}")
    return Tensor(row.shape, parts[0].dtype, lambda: row.join([part.bits() for part in parts]))


def to_foreign(rows: Sequence[Row], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors by foreign names, read on demand."""
    return {
        name: Tensor(row.foreign_shape, tensors[row.name].dtype, partial(_part, row, tensors[row.name], k))
        for row in rows
        for k, name in enumerate(row.names)
    }


def _part(row: Row, tensor: Tensor, direction: int) -> AnyArray:
    bits = tensor.bits()
    return row.layout.to_foreign(bits[direction] if row.stacked else bits)
