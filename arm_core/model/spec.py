"""What an ARM model is: sizes, token layout and the choices of the paper, as plain frozen values.

Two models share one encoder (ARM, arXiv:2406.07537): `PretrainSpec` predicts an image cluster by
cluster, `ClassifierSpec` reads it in several directions and names its class. Everything that a
backend, a converter or a checkpoint must agree on follows from a spec alone.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

FORMAT = "arm-vision/1"
"""Value of the `format` key in `config.json`; the number changes when old readers would be wrong."""


class Direction(StrEnum):
    """One token order of the 2-D patch grid, scanned one way."""

    ROW = "row"
    ROW_REVERSE = "row_reverse"
    COLUMN = "column"
    COLUMN_REVERSE = "column_reverse"


class PredictionOrder(StrEnum):
    """The order in which clusters are predicted (the paper's ablation; `row` is the official one)."""

    ROW = "row"
    ROW_REVERSE = "row_reverse"
    COLUMN = "column"
    COLUMN_REVERSE = "column_reverse"
    RANDOM = "random"


class Target(StrEnum):
    """What the decoder regresses: pixels normalised per patch, or the pixels as they are."""

    NORMALIZED = "normalized"
    RAW = "raw"


class Pooling(StrEnum):
    """How a classifier reduces its tokens: the mean of both halves, or the class token."""

    MEAN = "mean"
    CLS = "cls"


DIRECTIONS: dict[int, tuple[Direction, ...]] = {
    1: (Direction.ROW,),
    2: (Direction.ROW, Direction.ROW_REVERSE),
    4: tuple(Direction),
}
"""The scan directions meant by a count."""

TAP_DEPTHS = ((1, 2), (2, 3), (5, 6), (1, 1))
"""Encoder depths read by the decoder, as fractions of the whole: layers 6, 8, 10, 12 of 12."""


def _require(condition: bool, sentence: str) -> None:
    if not condition:
        raise ValueError(sentence)


def _require_positive(owner: str, **values: int) -> None:
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{owner}: {name} must be a whole number of 1 or more, found {value!r}")


@dataclass(frozen=True, kw_only=True)
class EncoderSpec:
    """The Vision Mamba trunk that both models share.

    A block is `x + mixer(norm1(x))`, then `x + swiglu(norm2(x))`; the mixer is Mamba-1 with as many
    channels as the trunk is wide (`expand=1`).
    """

    width: int
    """Channels D of the trunk and of the mixer."""
    depth: int
    """Blocks."""
    patch: int = 16
    """Side of a patch, pixels."""
    channels: int = 3
    """Colours of a pixel."""
    state: int = 16
    """States N per channel of the scan."""
    conv_width: int = 4
    """Taps of the depthwise causal convolution, tokens."""
    norm_eps: float = 1e-5
    """Added to the variance in every LayerNorm."""

    def __post_init__(self) -> None:
        _require_positive(
            "encoder",
            width=self.width,
            depth=self.depth,
            patch=self.patch,
            channels=self.channels,
            state=self.state,
            conv_width=self.conv_width,
        )
        _require(self.norm_eps > 0, f"encoder: norm_eps must be above 0, found {self.norm_eps!r}")

    @property
    def dt_rank(self) -> int:
        """Rank R of the step-size projection: width / 16, rounded up."""
        return math.ceil(self.width / 16)

    @property
    def mlp_width(self) -> int:
        """Hidden channels of the SwiGLU: two thirds of four times the width, rounded down."""
        return self.width * 4 * 2 // 3

    @property
    def patch_values(self) -> int:
        """Numbers in one patch, ordered (row, column, channel)."""
        return self.patch * self.patch * self.channels


class _Patched:
    """An image cut into patches: what both models know of it."""

    encoder: EncoderSpec
    image_size: tuple[int, int]

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches; a ValueError where they do not tile the image."""
        (height, width), patch = self.image_size, self.encoder.patch
        _require_positive("image_size", height=height, width=width)
        nearest = [max(1, round(side / patch)) * patch for side in (height, width)]
        _require(
            [height, width] == [side // patch * patch for side in (height, width)],
            f"image_size {height}x{width} is not a whole number of {patch}-pixel patches; "
            f"the nearest is {nearest[0]}x{nearest[1]}",
        )
        return height // patch, width // patch

    @property
    def patches(self) -> int:
        return math.prod(self.grid)


@dataclass(frozen=True, kw_only=True)
class PretrainSpec(_Patched):
    """Autoregressive pretraining: predict cluster i + 1 from clusters 1..i (paper, section 3.2)."""

    encoder: EncoderSpec
    image_size: tuple[int, int] = (192, 192)
    """Height and width, pixels."""
    cluster: tuple[int, int] = (4, 4)
    """Height and width of a cluster, patches."""
    prediction_order: PredictionOrder = PredictionOrder.ROW
    order_seed: int = 0
    """Seed of the `random` order; it has no effect on the others."""
    decoder_width: int = 512
    decoder_depth: int = 4
    decoder_heads: int = 8
    target: Target = Target.NORMALIZED

    def __post_init__(self) -> None:
        object.__setattr__(self, "image_size", tuple(self.image_size))
        object.__setattr__(self, "cluster", tuple(self.cluster))
        object.__setattr__(self, "prediction_order", PredictionOrder(self.prediction_order))
        object.__setattr__(self, "target", Target(self.target))
        rows, columns = self.grid
        _require_positive("cluster", height=self.cluster[0], width=self.cluster[1])
        _require(
            rows % self.cluster[0] == 0 and columns % self.cluster[1] == 0,
            f"clusters of {self.cluster[0]}x{self.cluster[1]} patches do not tile "
            f"the grid of {rows}x{columns} patches",
        )
        _require(
            self.clusters >= 2,
            f"one cluster of {self.cluster[0]}x{self.cluster[1]} patches covers the whole image: "
            "there is nothing to predict, choose smaller clusters or a larger image",
        )
        _require(
            self.encoder.depth % 6 == 0,
            f"pretraining taps the encoder at 1/2, 2/3, 5/6 and all of its depth: "
            f"depth must be a multiple of 6, found {self.encoder.depth}",
        )
        _require(
            isinstance(self.order_seed, int) and self.order_seed >= 0,
            f"order_seed must be a whole number of 0 or more, found {self.order_seed!r}",
        )
        _require_positive(
            "decoder",
            decoder_width=self.decoder_width,
            decoder_depth=self.decoder_depth,
            decoder_heads=self.decoder_heads,
        )
        _require(
            self.decoder_width % self.decoder_heads == 0,
            f"decoder_width {self.decoder_width} is not a multiple of decoder_heads {self.decoder_heads}",
        )
        for name, width in (("encoder width", self.encoder.width), ("decoder_width", self.decoder_width)):
            _require(
                width % 4 == 0,
                f"the 2-D sin-cos position table needs a multiple of 4 channels, found {name} {width}",
            )

    @property
    def patches_per_cluster(self) -> int:
        return math.prod(self.cluster)

    @property
    def clusters(self) -> int:
        return self.patches // self.patches_per_cluster

    @property
    def tokens(self) -> int:
        """Tokens that the encoder reads and the decoder predicts: all clusters but one."""
        return self.patches - self.patches_per_cluster

    @property
    def directions(self) -> int:
        """Scan directions K: prediction reads its tokens in their one order."""
        return 1

    @property
    def taps(self) -> tuple[int, ...]:
        """Blocks (counted from 1) whose output the decoder reads."""
        return tuple(self.encoder.depth * a // b for a, b in TAP_DEPTHS)


@dataclass(frozen=True, kw_only=True)
class ClassifierSpec(_Patched):
    """Classification: the trunk with one set of scan parameters per direction, pooled to a head."""

    encoder: EncoderSpec
    classes: int
    image_size: tuple[int, int] = (224, 224)
    """Height and width, pixels."""
    scan_directions: tuple[Direction, ...] = DIRECTIONS[4]
    pooling: Pooling = Pooling.MEAN

    def __post_init__(self) -> None:
        object.__setattr__(self, "image_size", tuple(self.image_size))
        object.__setattr__(self, "scan_directions", tuple(Direction(name) for name in self.scan_directions))
        object.__setattr__(self, "pooling", Pooling(self.pooling))
        _require_positive("classifier", classes=self.classes)
        _require(
            len(self.scan_directions) in DIRECTIONS,
            f"a classifier scans in 1, 2 or 4 directions, found {len(self.scan_directions)}",
        )
        _require(
            len(set(self.scan_directions)) == len(self.scan_directions),
            f"each scan direction may stand once, found {', '.join(self.scan_directions)}",
        )
        _require(
            self.patches >= 2,
            "a classifier needs two patches or more: its class token stands in their middle",
        )

    @property
    def tokens(self) -> int:
        """Patches and the class token."""
        return self.patches + 1

    @property
    def class_position(self) -> int:
        """Index of the class token among the tokens: the middle of the raster order."""
        return self.patches // 2

    @property
    def directions(self) -> int:
        """Scan directions K."""
        return len(self.scan_directions)


ModelSpec = PretrainSpec | ClassifierSpec

_KINDS: dict[str, type[PretrainSpec] | type[ClassifierSpec]] = {
    "pretrain": PretrainSpec,
    "classifier": ClassifierSpec,
}


def kind_of(spec: ModelSpec) -> str:
    """`pretrain` or `classifier`."""
    return "pretrain" if isinstance(spec, PretrainSpec) else "classifier"


def to_json(spec: ModelSpec) -> dict[str, Any]:
    """The content of `config.json`: plain values that `from_json` turns back into an equal spec."""

    def plain(value: Any) -> Any:
        if isinstance(value, tuple):
            return [plain(item) for item in value]
        return str(value) if isinstance(value, StrEnum) else value

    fields = {k: plain(v) for k, v in _shallow(spec).items() if k != "encoder"}
    return {"format": FORMAT, "kind": kind_of(spec), "encoder": _shallow(spec.encoder), **fields}


def from_json(data: Mapping[str, Any]) -> ModelSpec:
    """Rebuild a spec from `to_json`; unknown, missing and misplaced keys are refused by name."""
    if data.get("format") != FORMAT:
        raise ValueError(f"config: expected format {FORMAT!r}, found {data.get('format')!r}")
    kind = data.get("kind")
    if kind not in _KINDS:
        raise ValueError(f"config: expected kind {' or '.join(_KINDS)}, found {kind!r}")
    fields = {k: v for k, v in data.items() if k not in ("format", "kind")}
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
    encoder = values.pop("encoder", None)
    if not isinstance(encoder, Mapping):
        raise ValueError(f"config: expected 'encoder' to be an object, found {encoder!r}")
    cls = _KINDS[kind]
    _check_keys("config.encoder", encoder, EncoderSpec)
    _check_keys("config", {**values, "encoder": encoder}, cls)
    return cls(encoder=EncoderSpec(**encoder), **values)


def _shallow(spec: ModelSpec | EncoderSpec) -> dict[str, Any]:
    return {field.name: getattr(spec, field.name) for field in dataclasses.fields(spec)}


def _check_keys(owner: str, data: Mapping[str, Any], cls: type[Any]) -> None:
    fields = {field.name: field for field in dataclasses.fields(cls)}
    if unknown := sorted(set(data) - set(fields)):
        raise ValueError(f"{owner}: unknown {', '.join(unknown)}; known are {', '.join(fields)}")
    required = {name for name, field in fields.items() if field.default is dataclasses.MISSING}
    if missing := sorted(required - set(data)):
        raise ValueError(f"{owner}: missing {', '.join(missing)}")


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
"""Each has the recipes `pretrain-NAME` and `finetune-NAME`."""

DECODER_HEAD_WIDTH = 64
"""Channels of a decoder attention head in the presets (and in the official code at any width)."""


def preset(name: str) -> Preset:
    """The preset of that name; a ValueError lists the known ones."""
    if name not in PRESETS:
        raise ValueError(f"unknown model {name!r}; known are {', '.join(PRESETS)}")
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
