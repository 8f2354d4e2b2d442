"""An ONNX file: the whole graph with its metadata, checked and written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from arm_convert.onnx_model.builder import FLOAT, HALF, TYPES, UINT8, AnyArray, Builder, value
from arm_convert.onnx_model.mixer import Float
from arm_convert.onnx_model.model import network
from arm_convert.onnx_model.preprocess import preprocess
from arm_core.data.transforms import EvalTransform
from arm_core.files.atomic import new_file
from arm_core.model.parameters import check_parameters
from arm_core.model.spec import ClassifierSpec, ModelSpec, to_json

if TYPE_CHECKING:
    import onnx

MIN_OPSET, DEFAULT_OPSET, MAX_OPSET = 18, 18, 23
"""Operator sets that can be chosen: 18 introduced the antialiased `Resize` and axes as inputs."""

LARGEST_FILE = 1_900_000_000
"""Largest bytes of constants inside the file: the limit of protobuf is 2 GiB."""

NO_LICENSE = "not stated with the model"
"""Value of `license` in the metadata if the model does not name its licence."""

PIXELS, IMAGE = "pixel_values", "image"
"""Names of the input: normalised (B, 3, H, W), or uint8 (B, H, W, 3) with the transform inside."""


@dataclass(frozen=True, kw_only=True)
class OnnxOptions:
    """Options of the conversion to an ONNX file."""

    features: bool = False
    """A classifier's features instead of its logits."""
    influence: bool = False
    """Also output the influence of each patch on a classifier's features in the last block; float32 only."""
    dynamic_batch: bool = False
    """Any number of images at a time; else one."""
    half: bool = False
    """float16 weights and matrix products; the recurrence stays float32."""
    opset: int = DEFAULT_OPSET
    preprocess: EvalTransform | None = None
    """Take uint8 pixels of any size, and apply this transform inside."""

    def __post_init__(self) -> None:
        if not MIN_OPSET <= self.opset <= MAX_OPSET:
            raise ValueError(f"opset: expected {MIN_OPSET} to {MAX_OPSET}, found {self.opset}")


@dataclass(frozen=True)
class OnnxModel:
    """A model's graph, and the constants that it reads."""

    proto: onnx.ModelProto
    constants: dict[str, AnyArray]

    @property
    def nodes(self) -> int:
        """Nodes of the graph and of the bodies of its `Scan`s."""
        return _count(self.proto.graph)

    @property
    def opset(self) -> int:
        return int(self.proto.opset_import[0].version)

    def write(self, path: Path, *, force: bool) -> None:
        """Write the file; constants beyond `LARGEST_FILE` bytes go into PATH.data beside it.

        Raises ValueError if a file exists and `force` is not set.
        """
        import onnx

        data = path.with_name(f"{path.name}.data")
        large = sum(array.nbytes for array in self.constants.values()) > LARGEST_FILE
        proto = onnx.ModelProto()
        proto.CopyFrom(self.proto)
        with new_file(path, force=force) as draft:
            if large:
                with new_file(data, force=force) as data_draft, data_draft.open("wb") as file:
                    for name, array in self.constants.items():
                        if array.dtype == np.int64:  # shapes, which are read before the weights
                            proto.graph.initializer.append(_tensor(name, array, raw_data=array.tobytes()))
                            continue
                        proto.graph.initializer.append(_external(name, array, data.name, file.tell()))
                        file.write(array.tobytes())
            else:
                for name, array in self.constants.items():
                    proto.graph.initializer.append(_tensor(name, array, raw_data=array.tobytes()))
            draft.write_bytes(proto.SerializeToString())


def build(
    spec: ModelSpec,
    parameters: Mapping[str, AnyArray],
    *,
    options: OnnxOptions,
    classes: tuple[str, ...] = (),
    metadata: Mapping[str, str] | None = None,
) -> OnnxModel:
    """A model as an ONNX graph, checked by `onnx.checker`.

    parameters: by the names of the parameter table.  classes: names in the order of the logits.
    metadata: more strings to store with the file.
    Raises ValueError for parameters that are not the spec's, and for a pretraining model without
    `options.features`.
    """
    from onnx import helper

    check_parameters(spec, parameters)
    if not isinstance(spec, ClassifierSpec) and not options.features:
        raise ValueError("a pretraining model has no classes; pass --features to export its encoder")
    batch = None if options.dynamic_batch else 1
    size: int | str = "batch" if batch is None else batch
    dtype: Float = np.float16 if options.half else np.float32
    parameters = {name: np.asarray(array, np.float32) for name, array in parameters.items()}

    g = Builder()
    if options.preprocess is None:
        images, channels = PIXELS, spec.encoder.channels
        entry = value(PIXELS, FLOAT, (size, channels, *spec.image_size))
        if options.half:
            images = g("Cast", images, to=HALF)
    else:
        if spec.encoder.channels != 3:
            raise ValueError(f"preprocessing takes 3 colours, the model reads {spec.encoder.channels}")
        entry = value(IMAGE, UINT8, (size, "height", "width", 3))
        images = preprocess(g, IMAGE, options.preprocess, spec.image_size, dtype, batch=batch)
    if options.influence and (options.half or not isinstance(spec, ClassifierSpec)):
        raise ValueError("influence maps are of float32 classifiers")
    found = network(
        g, spec, parameters, images,
        batch=batch, dtype=dtype, features=options.features, influence=options.influence,
    )  # fmt: skip
    outputs = []
    for name, (tensor, shape) in found.items():
        g.nodes.append(helper.make_node("Identity", [tensor], [name], name=f"output.{name}"))
        outputs.append(value(name, FLOAT, shape))
    graph = helper.make_graph(g.nodes, "arm", [entry], outputs)
    opset = helper.make_opsetid("", options.opset)
    proto = helper.make_model(
        graph,
        opset_imports=[opset],
        ir_version=helper.find_min_ir_version_for([opset]),
        producer_name="arm-vision",
        producer_version=version("arm-vision"),
        doc_string="Vision Mamba of ARM (arXiv:2406.07537)",
    )
    strings = {
        "license": NO_LICENSE,
        **(metadata or {}),
        "spec": json.dumps(to_json(spec)),
        "precision": "float16" if options.half else "float32",
    }
    if classes and "logits" in found:
        strings["classes"] = json.dumps(list(classes))
    helper.set_model_props(proto, strings)
    model = OnnxModel(proto, g.constants)
    check(model)
    return model


def check(model: OnnxModel) -> None:
    """Check a graph against the ONNX standard, with shape inference; a refusal is our error."""
    import onnx

    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    # Weights are inputs here: the checker needs their types, not their bytes.
    for name, array in model.constants.items():
        if array.dtype == np.int64:  # shapes and axes, which shape inference reads
            proto.graph.initializer.append(_tensor(name, array, raw_data=array.tobytes()))
        else:
            proto.graph.input.append(value(name, TYPES[array.dtype], array.shape))
    onnx.checker.check_model(proto, full_check=True)


def _count(graph: onnx.GraphProto) -> int:
    bodies = [a.g for node in graph.node for a in node.attribute if a.HasField("g")]
    return len(graph.node) + sum(_count(body) for body in bodies)


def _tensor(name: str, array: AnyArray, **content: bytes) -> onnx.TensorProto:
    from onnx import TensorProto

    return TensorProto(name=name, dims=array.shape, data_type=TYPES[array.dtype], **content)  # type: ignore[arg-type]


def _external(name: str, array: AnyArray, file: str, offset: int) -> onnx.TensorProto:
    from onnx import TensorProto

    tensor = _tensor(name, array)
    tensor.data_location = TensorProto.EXTERNAL
    for key, text in {"location": file, "offset": str(offset), "length": str(array.nbytes)}.items():
        tensor.external_data.add(key=key, value=text)
    return tensor
