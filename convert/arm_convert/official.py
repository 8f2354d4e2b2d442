"""Names and shapes of official checkpoints: one table for both directions of conversion.

The official model (OliverRensu/ARM) has one tensor per scan direction, marked by a suffix, instead of a
leading direction axis. It embeds patches with a convolution, and its tokens and tables have additional
axes of size 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from arm_convert.layouts import (
    SAME,
    Row,
    channels_first_patches,
    foreign_shapes,
    reshaped,
    to_canonical,
    to_foreign,
)
from arm_core.files.safetensors import AnyArray, Shape, Tensor
from arm_core.model.parameters import Parameter, parameter_table
from arm_core.model.presets import DECODER_HEAD_WIDTH
from arm_core.model.spec import (
    DIRECTIONS,
    ClassifierSpec,
    Direction,
    EncoderSpec,
    ModelSpec,
    Pooling,
    PretrainSpec,
)
from arm_core.model.tokens import decoder_mask

SUFFIXES: dict[Direction, str] = {
    Direction.ROW: "",
    Direction.ROW_REVERSE: "_b",
    Direction.COLUMN: "_c",
    Direction.COLUMN_REVERSE: "_c_b",
}
"""Suffixes of official names by scan direction."""

MASK = "mask"
"""The decoder's attention mask, a buffer: 0 where a query may attend and -inf elsewhere."""

FROZEN = ("pos_embed", "dec_pos_embed")
"""Official pretraining parameters that are not trained and belong to no optimizer group."""

_NAMES = {
    "patch_embed.weight": "patch_embed.proj.weight",
    "patch_embed.bias": "patch_embed.proj.bias",
    "query_token": "ar_token",
    "decoder_pos_embed": "dec_pos_embed",
    "taps_to_decoder.weight": "enc2dec.weight",
    "taps_to_decoder.bias": "enc2dec.bias",
    "prediction_norm.weight": "ar_norm.weight",
    "prediction_norm.bias": "ar_norm.bias",
    "prediction.weight": "ar_pred.weight",
    "prediction.bias": "ar_pred.bias",
}
_DECODER_NAMES = {
    "norm_query": "norm2_1",
    "norm_latent": "norm2_2",
    "norm_mlp": "norm2",
    "attention.query": "attn2.q",
    "attention.key_value": "attn2.kv",
    "attention.proj": "attn2.proj",
}
_SCAN_NAMES = {
    "conv.weight": "conv1d{}.weight",
    "conv.bias": "conv1d{}.bias",
    "x_proj.weight": "x_proj{}.weight",
    "dt_proj.weight": "dt_proj{}.weight",
    "dt_proj.bias": "dt_proj{}.bias",
    "A_log": "A{}_log",
    "D": "D{}",
}


TOKEN = reshaped(lambda s: (1, 1, *s), lambda s: s[2:])  # (D,) becomes (1, 1, D)
TABLE = reshaped(lambda s: (1, *s), lambda s: s[1:])  # (T, D) becomes (1, T, D)
CONV1D = reshaped(lambda s: (s[0], 1, s[1]), lambda s: (s[0], s[2]))  # (D, W) becomes (D, 1, W)


def _row(parameter: Parameter, spec: ModelSpec) -> Row:
    name = parameter.name
    prefix, _, leaf = name.partition(".mixer.")
    if leaf in _SCAN_NAMES:
        directions = (Direction.ROW,) if isinstance(spec, PretrainSpec) else spec.scan_directions
        names = tuple(f"{prefix}.mixer.{_SCAN_NAMES[leaf].format(SUFFIXES[d])}" for d in directions)
        return Row(name, parameter.shape, names, True, CONV1D if leaf == "conv.weight" else SAME)
    layout = SAME
    if name == "patch_embed.weight":
        layout = channels_first_patches(spec.encoder.patch, spec.encoder.channels)
    elif name in ("cls_token", "query_token"):
        layout = TOKEN
    elif name in ("pos_embed", "decoder_pos_embed"):
        layout = TABLE
    return Row(name, parameter.shape, (_official_name(name),), False, layout)


def _official_name(name: str) -> str:
    parts = name.split(".")
    if parts[0] == "tap_norms":
        return f"norm_{int(parts[1]) + 1}.{parts[2]}"
    if parts[0] == "decoder":
        inner = ".".join(parts[2:-1])
        return f"dec_block.{parts[1]}.{_DECODER_NAMES.get(inner, inner)}.{parts[-1]}"
    return _NAMES.get(name, name)


def official_table(spec: ModelSpec) -> list[Row]:
    """The correspondence of all tensors of a model, in the order of the parameter table."""
    return [_row(parameter, spec) for parameter in parameter_table(spec).values()]


def official_shapes(spec: ModelSpec) -> dict[str, Shape]:
    """Names and shapes of the official state dict, buffers included."""
    shapes = foreign_shapes(official_table(spec))
    if isinstance(spec, PretrainSpec):
        shapes[MASK] = (spec.tokens, spec.tokens)
    return shapes


def official_mask(spec: PretrainSpec) -> AnyArray:
    """The `mask` buffer, (tokens, tokens) float32: 0 where a query may attend to a latent, else -inf."""
    return np.where(decoder_mask(spec), np.float32(0), np.float32(-np.inf))


def official_view(spec: ModelSpec, arrays: Mapping[str, AnyArray]) -> dict[str, AnyArray]:
    """Arrays by our names (any part of the model: parameters, gradients, moments) by official ones."""
    rows = [row for row in official_table(spec) if row.name in arrays]
    return {name: part for row in rows for name, part in row.split(np.asarray(arrays[row.name])).items()}


def canonical_view(spec: ModelSpec, arrays: Mapping[str, AnyArray]) -> dict[str, AnyArray]:
    """The inverse of `official_view`; tensors without all their directions are skipped."""
    rows = [row for row in official_table(spec) if all(name in arrays for name in row.names)]
    return {row.name: row.join([np.asarray(arrays[name]) for name in row.names]) for row in rows}


def from_official(spec: ModelSpec, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All official tensors of a model by our names, read on demand.

    Raises ValueError for a missing tensor or a wrong shape; other tensors of the file are ignored.
    """
    return to_canonical(official_table(spec), tensors)


def to_official(spec: ModelSpec, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All tensors of a model by official names, read on demand, including the mask buffer."""
    found = to_foreign(official_table(spec), tensors)
    if isinstance(spec, PretrainSpec):
        found[MASK] = Tensor.of(official_mask(spec))
    return found


def spec_from_official(
    shapes: Mapping[str, Shape],
    args: Mapping[str, Any] | None = None,
    *,
    image_size: tuple[int, int] | None = None,
    pooling: Pooling | None = None,
) -> ModelSpec:
    """The model that official names and shapes belong to.

    args: the checkpoint's training arguments, of which `global_pool` is used.  image_size, pooling:
    settings that the weights do not determine.  Raises ValueError if these are not the names of an
    official model; the message names the architecture if it is known.
    """
    kind = kind_from_official(shapes)
    width, channels, patch, _ = _shape_of(shapes, "patch_embed.proj.weight", 4)
    depth = _count(shapes, "layers.")
    encoder = EncoderSpec(
        width=width,
        depth=depth,
        patch=patch,
        channels=channels,
        state=_shape_of(shapes, "layers.0.mixer.A_log", 2)[1],
        conv_width=_shape_of(shapes, "layers.0.mixer.conv1d.weight", 3)[2],
    )
    positions = _shape_of(shapes, "pos_embed", 3)[1]
    if kind == "pretrain":
        return _pretrain_spec(shapes, encoder, image_size or _square(positions, patch))
    suffixes = [suffix for suffix in SUFFIXES.values() if f"layers.0.mixer.D{suffix}" in shapes]
    if len(suffixes) not in (1, 4):
        raise ValueError(
            f"expected 1 or 4 scan directions, found {len(suffixes)} ({' '.join(suffixes).strip()}); "
            "this is another Vision Mamba, such as Vim, which has 2"
        )
    return ClassifierSpec(
        encoder=encoder,
        classes=_shape_of(shapes, "head.weight", 2)[0],
        image_size=image_size or _square(positions - 1, patch),
        scan_directions=DIRECTIONS[len(suffixes)],
        pooling=pooling or pooling_from_args(args) or Pooling.MEAN,
    )


def kind_from_official(shapes: Mapping[str, Shape]) -> str:
    """`pretrain` or `classifier`; a ValueError names other architectures by their tensors."""
    has_mixer = "layers.0.mixer.A_log" in shapes and "patch_embed.proj.weight" in shapes
    if has_mixer and "ar_token" in shapes:
        return "pretrain"
    if has_mixer and "head.weight" in shapes:
        return "classifier"
    telling = next((f" ({what}: it has {name})" for name, what in _OTHERS.items() if name in shapes), "")
    lacks = "ar_token or head.weight" if has_mixer else "patch_embed.proj.weight and layers.0.mixer.A_log"
    raise ValueError(
        f"these are not the tensors of an official ARM checkpoint{telling}: expected {lacks}, "
        f"found {len(shapes)} tensors like {', '.join(list(shapes)[:3]) or 'none'}"
    )


_OTHERS = {
    "blocks.0.attn.qkv.weight": "a Vision Transformer",
    "layers.0.mixer.A_b_log": "a bidirectional Vision Mamba",
    "backbone.layers.0.mixer.A_log": "a Mamba language model",
    "layers.0.blocks.0.op.x_proj_weight": "a VMamba",
    "layers.0.blocks.0.self_attention.x_proj_weight": "a VMamba",
    "layers.0.blocks.0.attn.qkv.weight": "a Swin Transformer",
    "layer1.0.conv1.weight": "a ResNet",
    "encoder.layer.0.attention.attention.query.weight": "a transformers ViT",
    "visual.conv1.weight": "a CLIP model",
}
"""Tensors that identify other architectures."""


def pooling_from_args(args: Mapping[str, Any] | None) -> Pooling | None:
    """The pooling in the training arguments; None where they do not state it."""
    value = (args or {}).get("global_pool")
    return None if not isinstance(value, bool) else Pooling.MEAN if value else Pooling.CLS


def _pretrain_spec(
    shapes: Mapping[str, Shape], encoder: EncoderSpec, image_size: tuple[int, int]
) -> PretrainSpec:
    patches = _shape_of(shapes, "pos_embed", 3)[1]
    width = _shape_of(shapes, "ar_token", 3)[2]
    cluster = (4, 4)
    if MASK in shapes:  # (tokens, tokens), tokens being all patches but one cluster's
        cluster = _square(patches - _shape_of(shapes, MASK, 2)[0], 1)
    return PretrainSpec(
        encoder=encoder,
        image_size=image_size,
        cluster=cluster,
        decoder_width=width,
        decoder_depth=_count(shapes, "dec_block."),
        decoder_heads=max(1, width // DECODER_HEAD_WIDTH),
    )


def _shape_of(shapes: Mapping[str, Shape], name: str, axes: int) -> Shape:
    if name not in shapes:
        raise ValueError(f"missing {name}")
    if len(shapes[name]) != axes or 0 in shapes[name]:
        raise ValueError(f"{name}: expected {axes} axes of 1 or more, found shape {shapes[name]}")
    return shapes[name]


def _count(shapes: Mapping[str, Shape], prefix: str) -> int:
    """The number of blocks `prefix`0, `prefix`1, ... among the names."""
    found = {name[len(prefix) :].partition(".")[0] for name in shapes if name.startswith(prefix)}
    return next(i for i in range(len(found) + 1) if str(i) not in found)


def _square(positions: int, scale: int) -> tuple[int, int]:
    side = math.isqrt(max(positions, 0))
    if side < 1 or side * side != positions:
        raise ValueError(
            f"the number of position embeddings, {positions}, is not a perfect square; pass --image-size HxW"
        )
    return side * scale, side * scale
