"""The source, grid and threadgroup that MLX would pass to Metal for a kernel call.

MLX's exporter traces a graph without running it, even without Metal. The trace of a custom kernel contains
the source that MLX has generated for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx


@dataclass(frozen=True)
class Launch:
    """One kernel call."""

    name: str
    source: str
    grid: tuple[int, int, int]
    threadgroup: tuple[int, int, int]
    asked: tuple[tuple[bool, bool, bool], ...]
    """Whether the kernel reads shape, strides and rank of each input."""
    rows: bool
    """Whether MLX makes its inputs row-contiguous first."""


def launches(function: Callable[..., Any], *arrays: mx.array) -> list[Launch]:
    """The kernel calls in the graph of `function(*arrays)`, in the order that MLX would run them.

    The arrays' values do not matter; `function` names the stream `mx.gpu` in its calls.
    """
    records: list[dict[str, Any]] = []
    zeros = [mx.zeros(a.shape, a.dtype) for a in arrays]
    mx.export_function(records.append, lambda *inputs: function(*inputs), *zeros)
    found = []
    for record in records:
        if record.get("name") == "CustomKernel":
            name, source, *sizes, asked, rows = record["arguments"][:10]
            found.append(Launch(name, source, tuple(sizes[:3]), tuple(sizes[3:]), tuple(asked), rows))
    return found


def trace(kernel: Any, **call: Any) -> Launch:
    """The one launch of a call to a kernel that `mx.fast.metal_kernel` made."""
    inputs = call.pop("inputs")
    (launch,) = launches(lambda *arrays: kernel(inputs=list(arrays), stream=mx.gpu, **call), *inputs)
    return launch
