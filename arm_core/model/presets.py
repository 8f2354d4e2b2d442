"""Named model sizes: the official base, large and huge, and two smaller ones for development."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from arm_core.model.checks import near_match
from arm_core.model.spec import ClassifierSpec, EncoderSpec, PretrainSpec


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A named model: the official sizes, two for development, and the one of the built-in digits."""

    width: int
    depth: int
    decoder_width: int
    decoder_depth: int = 4
    patch: int = 16
    cluster: tuple[int, int] = (4, 4)
    pretrain_size: tuple[int, int] = (192, 192)
    """Image size in pretraining, pixels."""
    image_size: tuple[int, int] = (224, 224)
    """Image size of the classifier, pixels."""
    classes: int = 1000


PRESETS: dict[str, Preset] = {
    "digits": Preset(
        width=64,
        depth=6,
        decoder_width=64,
        decoder_depth=2,
        patch=4,
        cluster=(2, 2),
        pretrain_size=(24, 24),
        image_size=(24, 24),
        classes=10,
    ),
    "tiny": Preset(width=192, depth=12, decoder_width=256),
    "small": Preset(width=384, depth=12, decoder_width=512),
    "base": Preset(width=768, depth=12, decoder_width=512),
    "large": Preset(width=1024, depth=24, decoder_width=512),
    "huge": Preset(width=1536, depth=24, decoder_width=512),
}
"""The presets by name; each has the recipes `pretrain-NAME` and `finetune-NAME`."""

DECODER_HEAD_WIDTH = 64
"""Channels of a decoder attention head in the presets (and in the official code at any width)."""


def preset(name: str) -> Preset:
    """The preset with this name; a ValueError names the most similar one."""
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}{near_match(name, PRESETS)}")
    return PRESETS[name]


def pretrain_preset(name: str, **changes: Any) -> PretrainSpec:
    """The pretraining model of a preset; `changes` replace fields of `PretrainSpec`."""
    size = preset(name)
    fields: dict[str, Any] = {
        "encoder": EncoderSpec(width=size.width, depth=size.depth, patch=size.patch),
        "image_size": size.pretrain_size,
        "cluster": size.cluster,
        "decoder_width": size.decoder_width,
        "decoder_depth": size.decoder_depth,
        "decoder_heads": size.decoder_width // DECODER_HEAD_WIDTH,
    }
    return PretrainSpec(**{**fields, **changes})


def classifier_preset(name: str, *, classes: int | None = None, **changes: Any) -> ClassifierSpec:
    """The classifier of a preset; `changes` replace fields of `ClassifierSpec`."""
    size = preset(name)
    fields: dict[str, Any] = {
        "encoder": EncoderSpec(width=size.width, depth=size.depth, patch=size.patch),
        "classes": size.classes if classes is None else classes,
        "image_size": size.image_size,
    }
    return ClassifierSpec(**{**fields, **changes})
