"""How two models differ: names, shapes, types and values, one tensor at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from arm_core.files.safetensors import FLOATS, Tensor


@dataclass(frozen=True)
class Change:
    """A tensor of both with different values."""

    name: str
    largest: float
    """Largest absolute difference; infinite if only one value is NaN."""
    relative: float
    """The same, relative to the largest value of the first."""
    changed: int
    """Number of values that differ."""
    values: int


@dataclass(frozen=True)
class Diff:
    """All differences between two sets of tensors."""

    only_first: list[str]
    only_second: list[str]
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
    types: dict[str, tuple[str, str]]
    """Types that differ; the values are compared in any case."""
    changes: list[Change]
    """Largest relative difference first."""
    equal: int
    """Number of tensors with equal values."""

    @property
    def same(self) -> bool:
        return not (self.only_first or self.only_second or self.shapes or self.types or self.changes)

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "same": self.same}


def diff(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> Diff:
    """Compare two sets of tensors by name."""
    both = [name for name in first if name in second]
    shapes = {n: (first[n].shape, second[n].shape) for n in both if first[n].shape != second[n].shape}
    changes, equal = [], 0
    for name in both:
        if name in shapes:
            continue
        change = _change(name, first[name], second[name])
        if change is None:
            equal += 1
        else:
            changes.append(change)
    return Diff(
        only_first=[name for name in first if name not in second],
        only_second=[name for name in second if name not in first],
        shapes=shapes,
        types={n: (first[n].dtype, second[n].dtype) for n in both if first[n].dtype != second[n].dtype},
        changes=sorted(changes, key=lambda change: -change.relative),
        equal=equal,
    )


def _change(name: str, first: Tensor, second: Tensor) -> Change | None:
    a, b = first.read(), second.read()
    if first.dtype not in FLOATS or second.dtype not in FLOATS:
        a, b = a.astype(np.float64), b.astype(np.float64)
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    if same.all():
        return None
    with np.errstate(invalid="ignore"):
        distance = np.abs(a[~same].astype(np.float64) - b[~same].astype(np.float64))
    largest = float(np.nan_to_num(distance, nan=np.inf).max())
    scale = float(np.nan_to_num(np.abs(a), nan=0.0, posinf=0.0).max(initial=0.0))
    return Change(name, largest, largest / scale if scale else largest, int((~same).sum()), int(same.size))
