"""A small layer over `onnx.helper`: nodes with generated names, constants, and shared sizes.

Tensors are named strings, as in ONNX. A `Builder` collects the nodes of one graph; the graph of a `Scan`
body is a separate `Builder` that can read the constants of the outer one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import onnx

AnyArray = npt.NDArray[Any]

FLOAT, UINT8, INT64, HALF = 1, 2, 7, 10
"""Numbers of the types in the ONNX standard (`TensorProto.DataType`)."""
TYPES = {np.dtype(np.float32): FLOAT, np.dtype(np.float16): HALF, np.dtype(np.int64): INT64}


class Builder:
    """Nodes and constants of one graph."""

    def __init__(self, prefix: str = "") -> None:
        self.prefix = prefix
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, AnyArray] = {}
        self._counts: dict[str, int] = {}
        self._shared: dict[tuple[str, tuple[int, ...], bytes], str] = {}

    def __call__(self, op: str, *inputs: str, name: str | None = None, **attributes: Any) -> str:
        """Add a node with one output, and return the name of that output."""
        return self.several(op, *inputs, outputs=1, name=name, **attributes)[0]

    def several(
        self, op: str, *inputs: str, outputs: int, name: str | None = None, **attributes: Any
    ) -> list[str]:
        """Add a node with several outputs, and return their names."""
        from onnx import helper

        name = self._fresh(name or op.lower())
        results = [name] if outputs == 1 else [f"{name}.{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(op, list(inputs), results, name=name, **attributes))
        return results

    def constant(self, name: str, value: AnyArray) -> str:
        """A named tensor that is stored in the file."""
        assert name not in self.constants, f"constant {name} appears twice"
        # `ascontiguousarray` would make a scalar one-dimensional.
        self.constants[name] = np.array(value, order="C", copy=None)
        return name

    def ints(self, *values: int) -> str:
        """A 1-D int64 constant: axes, sizes and split points; equal ones are stored once."""
        return self._share(np.array(values, np.int64))

    def shared(self, value: AnyArray) -> str:
        """A constant without a given name; equal ones are stored once."""
        return self._share(np.asarray(value))

    def _share(self, value: AnyArray) -> str:
        key = (str(value.dtype), value.shape, value.tobytes())
        if key not in self._shared:
            self._shared[key] = self.constant(f"{self.prefix}constant.{len(self._shared)}", value)
        return self._shared[key]

    def _fresh(self, name: str) -> str:
        """A name that no other node has: `layers.0.mixer.scan`, `mul`, `mul.1`, ..."""
        name = f"{self.prefix}{name}"
        count = self._counts.get(name, 0)
        self._counts[name] = count + 1
        return f"{name}.{count}" if count else name


def value(name: str, dtype: int, shape: Sequence[int | str]) -> onnx.ValueInfoProto:
    """Name, type and shape of an input or output; a string stands for a size that is not fixed."""
    from onnx import helper

    return helper.make_tensor_value_info(name, dtype, list(shape))
