"""int8 weights for the matrix products of an ONNX file, activations quantized at run time."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from arm_convert.onnx_model.file import OnnxModel
from arm_core.files.atomic import new_file

SENSITIVE = ("x_proj.matmul", "dt_proj.matmul", "out_proj.matmul")
"""Matrix products that stay float32. The first two set the step sizes of the recurrence. The input of the
third, gate times scan, has a few large values, and one scale for all of them loses the others."""


def write_int8(model: OnnxModel, path: Path, *, force: bool) -> None:
    """Write a float32 model with int8 weights, one scale per output channel.

    onnxruntime's dynamic quantization of every product of activations and weights except `SENSITIVE`;
    the patch embedding, the convolutions and the recurrence stay float32.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    nodes = model.proto.graph.node
    kept = [node.name for node in nodes if node.op_type == "MatMul" and node.name.endswith(SENSITIVE)]
    with new_file(path, force=force) as draft, tempfile.TemporaryDirectory(dir=path.parent) as folder:
        source = Path(folder) / "float32.onnx"
        model.write(source, force=False)
        with _quiet():
            quantize_dynamic(
                source,
                draft,
                per_channel=True,
                weight_type=QuantType.QInt8,
                op_types_to_quantize=["MatMul"],
                nodes_to_exclude=kept,
            )
        written = onnx.load(draft)
        strings = {prop.key: prop.value for prop in model.proto.metadata_props}
        onnx.helper.set_model_props(written, {**strings, "precision": "int8"})
        draft.write_bytes(written.SerializeToString())


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppresses onnxruntime's advice on the root logger to preprocess the model."""
    root = logging.getLogger()
    before = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(before)
