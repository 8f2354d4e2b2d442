"""Quantizes the large matrices of a classifier to 4 or 8 bits, in the format of MLX."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from arm_core.files.quantized import Quantized, as_tensor, quantize
from arm_core.files.safetensors import Tensor
from arm_core.model.spec import ClassifierSpec, ModelSpec

QUANTIZED = ("in_proj.weight", "out_proj.weight", "mlp.w1.weight", "mlp.w2.weight", "mlp.w3.weight")
"""Suffixes of the quantized matrices, over 90 % of the base model. The parameters of the scan, the patch
embedding and the head are not quantized: they are small and sensitive to rounding."""


def quantize_model(
    spec: ModelSpec, tensors: Mapping[str, Tensor], *, bits: int, group_size: int
) -> tuple[dict[str, Tensor], list[str]]:
    """The model with its large matrices quantized on reading, and the names of the quantized matrices.

    A matrix whose row length is not divisible by `group_size` is not quantized. Raises ValueError if no
    matrix is quantized, and for a pretraining model.
    """
    if not isinstance(spec, ClassifierSpec):
        raise ValueError(
            "only classifiers can be quantized; convert the model with arm convert to-classifier"
        )
    made, done = dict(tensors), []
    for name, tensor in tensors.items():
        if name.endswith(QUANTIZED) and tensor.shape[1] % group_size == 0:
            rows, columns = tensor.shape
            parts = partial(_parts, tensor, bits, group_size)
            made[name] = as_tensor((rows, columns), bits, group_size, parts)
            done.append(name)
    if not done:
        raise ValueError(
            f"width {spec.encoder.width} is not divisible by the group size {group_size}; "
            "choose a smaller --group-size"
        )
    return made, done


def _parts(tensor: Tensor, bits: int, group_size: int) -> Quantized:
    return quantize(tensor.read(), bits, group_size)
