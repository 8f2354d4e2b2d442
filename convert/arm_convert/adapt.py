"""Changes models: pretraining model to classifier, new head, new image size, other type, average.

The functions return tensors that are computed when they are read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from functools import partial

import numpy as np

from arm_core.files.safetensors import AnyArray, Tensor
from arm_core.model.bicubic import resize_table
from arm_core.model.parameters import Array, Parameter, Shape, initial_value, parameter_table
from arm_core.model.rng import KeyedRng
from arm_core.model.spec import ClassifierSpec, Direction, EncoderSpec, ModelSpec, PretrainSpec

Tensors = dict[str, Tensor]

OFFICIAL_HEAD_STD = 2e-5
"""Standard deviation of a classifier's new head in the official finetuning."""

FLOAT32_ONLY = ("A_log", "D", "dt_proj.bias")
"""Tensors that stay float32: the decays of the scan are products over many steps."""


def to_classifier(
    spec: ModelSpec,
    tensors: Mapping[str, Tensor],
    target: ClassifierSpec,
    *,
    seed: int,
    head_std: float = OFFICIAL_HEAD_STD,
    keep_head: bool = False,
) -> Tensors:
    """The tensors of classifier `target`, from those of a pretraining model or another classifier.

    From a pretraining model, as in the official finetuning: the one direction is copied to all, the
    position table is resized (bicubic) and given a row of zeros for the class token, and class token, last
    norm and head are new, drawn from `seed`. From a classifier only the head is new (with `keep_head`, it
    is kept too) and the rest is kept, and resized if the image size differs.

    Raises ValueError if the encoders differ or the source has no weights for a direction.
    """
    pairs = {f.name: [getattr(s.encoder, f.name) for s in (spec, target)] for f in fields(EncoderSpec)}
    if different := ", ".join(f"{name} {a} and {b}" for name, (a, b) in pairs.items() if a != b):
        raise ValueError(f"the encoders of the model and of the classifier differ: {different}")
    table = parameter_table(target)
    fresh = {"cls_token", "norm_f.weight", "norm_f.bias", "head.weight", "head.bias"}
    if isinstance(spec, ClassifierSpec):
        fresh = set() if keep_head else {"head.weight", "head.bias"}
    origins = _origins(spec, target)
    made: Tensors = {}
    for name, row in table.items():
        if name in fresh:
            made[name] = _fresh(row, seed, head_std).cast(tensors["patch_embed.weight"].dtype)
        elif name == "pos_embed":
            made[name] = _positions(spec, tensors[name], target)
        else:
            made[name] = tensors[name]
            if name.partition(".mixer.")[2] in _PER_DIRECTION and origins != list(range(spec.directions)):
                made[name] = tensors[name].map(row.shape, lambda bits: bits[origins])
    return made


def _fresh(row: Parameter, seed: int, head_std: float) -> Tensor:
    if row.name == "head.weight":
        row = replace(row, init=partial(_normal, head_std))
    return Tensor.of(initial_value(row, seed))


def _normal(std: float, rng: KeyedRng, shape: Shape) -> Array:
    return np.asarray(rng.normal(math.prod(shape)).reshape(shape) * std, np.float32)


_PER_DIRECTION = ("conv.weight", "conv.bias", "x_proj.weight", "dt_proj.weight", "dt_proj.bias", "A_log", "D")


def _origins(spec: ModelSpec, target: ClassifierSpec) -> list[int]:
    """For each direction of the target, the index of the source's direction that it is copied from."""
    have = spec.scan_directions if isinstance(spec, ClassifierSpec) else (Direction.ROW,)
    if len(have) == 1:
        return [0] * target.directions
    if lost := [d for d in target.scan_directions if d not in have]:
        raise ValueError(
            f"the model scans in {', '.join(have)}: there are no weights for direction {lost[0]}; "
            "start from the pretraining model"
        )
    return [have.index(direction) for direction in target.scan_directions]


def _positions(spec: ModelSpec, tensor: Tensor, target: ClassifierSpec) -> Tensor:
    """The position table for the target's grid, with the class token's row in the middle."""
    if isinstance(spec, ClassifierSpec) and spec.grid == target.grid:
        return tensor

    def resized() -> AnyArray:
        table, row = _split(spec, tensor.read())
        table = resize_table(table, spec.grid, target.grid)
        return np.insert(table, target.class_position, row, axis=0)

    return _like(tensor, (target.tokens, target.encoder.width), resized)


def _split(spec: ModelSpec, table: Array) -> tuple[Array, Array]:
    """The patches' rows of a table, and the class token's: zeros in a pretraining model."""
    if isinstance(spec, PretrainSpec):
        return table, np.zeros(table.shape[1], np.float32)
    return np.delete(table, spec.class_position, axis=0), table[spec.class_position]


def _like(tensor: Tensor, shape: Shape, values: Callable[[], AnyArray]) -> Tensor:
    """A float32 tensor computed on demand, in the storage type of another."""
    return Tensor(shape, "F32", values).cast(tensor.dtype)


def resize(
    spec: ModelSpec, tensors: Mapping[str, Tensor], image_size: tuple[int, int]
) -> tuple[ModelSpec, Tensors]:
    """The model for another image size.

    The position table of a classifier is resized (bicubic), except for the class token's row, which moves to
    the new middle. The tables of a pretraining model are fixed and computed for the new grid.
    """
    target = replace(spec, image_size=image_size)
    if isinstance(target, ClassifierSpec):
        return target, to_classifier(spec, tensors, target, seed=0, keep_head=True)
    table = parameter_table(target)
    made = dict(tensors)
    for name in ("pos_embed", "decoder_pos_embed"):
        made[name] = _like(tensors[name], table[name].shape, partial(initial_value, table[name], 0))
    return target, made


def cast(tensors: Mapping[str, Tensor], dtype: str) -> Tensors:
    """All tensors in storage type `F32`, `F16` or `BF16`, except for those in `FLOAT32_ONLY`."""
    return {
        name: tensor.cast("F32" if name.partition(".mixer.")[2] in FLOAT32_ONLY else dtype)
        for name, tensor in tensors.items()
    }


def average(models: Sequence[Mapping[str, Tensor]]) -> Tensors:
    """The mean of several models' tensors, computed in float64 and stored in the types of the first model."""
    return {
        name: _like(tensor, tensor.shape, partial(_mean, [model[name] for model in models]))
        for name, tensor in models[0].items()
    }


def _mean(tensors: Sequence[Tensor]) -> Array:
    total = np.zeros(tensors[0].shape)
    for tensor in tensors:
        total += tensor.read()
    return (total / len(tensors)).astype(np.float32)
