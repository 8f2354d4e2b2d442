"""A classifier whose large matrices take 4 or 8 bits, for MLX to multiply as they are."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from arm_core.files.quantized import Quantized, as_tensor, quantize
from arm_core.files.safetensors import Tensor
from arm_core.model.spec import ClassifierSpec, ModelSpec

QUANTIZED = ("in_proj.weight", "out_proj.weight", "mlp.w1.weight", "mlp.w2.weight", "mlp.w3.weight")
"""Ends of the names of what is quantized: the matrices shared by all tokens and directions, over nine
tenths of a base model. The scan's own parameters, embedding and head stay as they are: small, and the
first to suffer."""


def quantize_model(
    spec: ModelSpec, tensors: Mapping[str, Tensor], *, bits: int, group_size: int
) -> tuple[dict[str, Tensor], list[str]]:
    """The model with its large matrices quantized when they are read, and the names of those that are.

    Matrices whose rows are no whole number of groups stay as they are. Raises ValueError where all do, and
    for a pretraining model.
    """
    if not isinstance(spec, ClassifierSpec):
        raise ValueError("only a classifier is quantized; make one with arm convert to-classifier")
    made, done = dict(tensors), []
    for name, tensor in tensors.items():
        if name.endswith(QUANTIZED) and tensor.shape[1] % group_size == 0:
            rows, columns = tensor.shape
            parts = partial(_parts, tensor, bits, group_size)
            made[name] = as_tensor((rows, columns), bits, group_size, parts)
            done.append(name)
    if not done:
        raise ValueError(
            f"no matrix of width {spec.encoder.width} has rows of whole groups of {group_size}; "
            "choose a smaller --group-size"
        )
    return made, done


def _parts(tensor: Tensor, bits: int, group_size: int) -> Quantized:
    return quantize(tensor.read(), bits, group_size)
