"""Model specifications: sizes, token layout and the options of the paper, as frozen plain values.

Two models share one encoder (ARM, arXiv:2406.07537): `PretrainSpec` predicts an image cluster by
cluster, `ClassifierSpec` scans it in several directions and predicts its class. Everything that
backends, converters and checkpoints must agree on is derived from the spec.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, TypeVar

from arm_core.model.checks import Range, check_keys, check_ranges, check_whole, near_match, shortened

Choice = TypeVar("Choice", bound=StrEnum)

FORMAT = "arm-vision/1"
"""Value of the `format` key in `config.json`; the number increases when old readers would misread a file."""

MAX_WIDTH, MAX_DEPTH, MAX_SIDE, MAX_PATCHES, MAX_CLASSES = 16_384, 512, 16_384, 65_536, 10_000_000
"""Largest sizes that a spec accepts, so that a mistyped or hostile config cannot exhaust the memory."""


class Direction(StrEnum):
    """A token order of the 2-D patch grid: by row or by column, forwards or in reverse."""

    ROW = "row"
    ROW_REVERSE = "row_reverse"
    COLUMN = "column"
    COLUMN_REVERSE = "column_reverse"


class PredictionOrder(StrEnum):
    """The order in which clusters are predicted (an ablation of the paper; the official order is `row`)."""

    ROW = "row"
    ROW_REVERSE = "row_reverse"
    COLUMN = "column"
    COLUMN_REVERSE = "column_reverse"
    RANDOM = "random"


class Target(StrEnum):
    """The decoder's targets: pixels normalised per patch, or raw pixels."""

    NORMALIZED = "normalized"
    RAW = "raw"


class Pooling(StrEnum):
    """How a classifier pools its tokens: mean pooling, or the class token."""

    MEAN = "mean"
    CLS = "cls"


DIRECTIONS: dict[int, tuple[Direction, ...]] = {
    1: (Direction.ROW,),
    2: (Direction.ROW, Direction.ROW_REVERSE),
    4: tuple(Direction),
}
"""Scan directions, by their number."""

TAP_DEPTHS = ((1, 2), (2, 3), (5, 6), (1, 1))
"""Encoder depths that the decoder reads, as fractions: layers 6, 8, 10 and 12 of 12."""


def _require(condition: bool, sentence: str) -> None:
    if not condition:
        raise ValueError(sentence)


def _choice(owner: str, options: type[Choice], value: Any) -> Choice:
    """A member of an enumeration; ValueError names the most similar one."""
    if not isinstance(value, str) or value not in list(options):
        hint = near_match(value, list(options)) if isinstance(value, str) else "; expected a name"
        raise ValueError(f"{owner}: unknown {shortened(value)}{hint}")
    return options(value)


def _pair(owner: str, value: Any, limit: int) -> tuple[int, int]:
    """(height, width) as whole numbers from 1 to `limit`."""
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise ValueError(f"{owner}: expected two whole numbers, height and width, found {shortened(value)}")
    check_whole(owner, Range(low=1, high=limit), height=value[0], width=value[1])
    return value[0], value[1]


@dataclass(frozen=True, kw_only=True)
class EncoderSpec:
    """The Vision Mamba encoder that both models share.

    A block is `x + mixer(norm1(x))`, then `x + swiglu(norm2(x))`; the mixer is Mamba-1 with as many
    channels as the encoder (`expand=1`).
    """

    width: int
    """Channels D of the encoder and of the mixer."""
    depth: int
    """Blocks."""
    patch: int = 16
    """Side of a patch, pixels."""
    channels: int = 3
    """Colour channels of a pixel."""
    state: int = 16
    """States N per channel of the scan."""
    conv_width: int = 4
    """Kernel size of the depthwise causal convolution, tokens."""
    norm_eps: float = 1e-5
    """Added to the variance in every LayerNorm."""

    def __post_init__(self) -> None:
        check_whole("encoder", Range(low=1, high=MAX_WIDTH), width=self.width)
        check_whole("encoder", Range(low=1, high=MAX_DEPTH), depth=self.depth)
        small = {name: getattr(self, name) for name in ("patch", "channels", "state", "conv_width")}
        check_whole("encoder", Range(low=1, high=1024), **small)
        check_ranges("encoder", self, norm_eps=Range(above=0, below=1))

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
        """Values in one patch, ordered (row, column, channel)."""
        return self.patch * self.patch * self.channels


class _Patched:
    """The patch grid of an image, for both models."""

    encoder: EncoderSpec
    image_size: tuple[int, int]

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches; ValueError if the image is not divisible into patches."""
        (height, width), patch = _pair("image_size", self.image_size, MAX_SIDE), self.encoder.patch
        nearest = [max(1, round(side / patch)) * patch for side in (height, width)]
        _require(
            height % patch == 0 and width % patch == 0,
            f"image_size {height}x{width} is not divisible into patches of {patch}x{patch} pixels; "
            f"the nearest divisible size is {nearest[0]}x{nearest[1]}",
        )
        _require(
            height * width // patch**2 <= MAX_PATCHES,
            f"image_size {height}x{width} has more than {MAX_PATCHES} patches of {patch}x{patch} pixels; "
            "choose larger patches or a smaller image",
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
        object.__setattr__(self, "image_size", _pair("image_size", self.image_size, MAX_SIDE))
        object.__setattr__(self, "cluster", _pair("cluster", self.cluster, MAX_SIDE))
        object.__setattr__(
            self, "prediction_order", _choice("prediction_order", PredictionOrder, self.prediction_order)
        )
        object.__setattr__(self, "target", _choice("target", Target, self.target))
        rows, columns = self.grid
        _require(
            rows % self.cluster[0] == 0 and columns % self.cluster[1] == 0,
            f"the grid of {rows}x{columns} patches is not divisible into clusters of "
            f"{self.cluster[0]}x{self.cluster[1]} patches",
        )
        _require(
            self.clusters >= 2,
            f"one cluster of {self.cluster[0]}x{self.cluster[1]} patches covers the whole image, so there is "
            "nothing to predict; choose smaller clusters or a larger image",
        )
        _require(
            self.encoder.depth % 6 == 0,
            "in pretraining the decoder reads the encoder at 1/2, 2/3, 5/6 and all of its depth: "
            f"depth must be divisible by 6, found {self.encoder.depth}",
        )
        check_whole("pretrain", Range(low=0, below=2**63), order_seed=self.order_seed)
        check_whole("pretrain", Range(low=1, high=MAX_WIDTH), decoder_width=self.decoder_width)
        check_whole("pretrain", Range(low=1, high=MAX_DEPTH), decoder_depth=self.decoder_depth)
        check_whole("pretrain", Range(low=1, high=MAX_WIDTH), decoder_heads=self.decoder_heads)
        _require(
            self.decoder_width % self.decoder_heads == 0,
            f"decoder_width {self.decoder_width} is not divisible by decoder_heads {self.decoder_heads}",
        )
        for name, width in (("encoder width", self.encoder.width), ("decoder_width", self.decoder_width)):
            _require(
                width % 4 == 0,
                f"{name} must be divisible by 4 for the 2-D sin-cos position table, found {width}",
            )

    @property
    def patches_per_cluster(self) -> int:
        return math.prod(self.cluster)

    @property
    def clusters(self) -> int:
        return self.patches // self.patches_per_cluster

    @property
    def tokens(self) -> int:
        """Tokens that the encoder reads and the decoder predicts: those of all clusters except one."""
        return self.patches - self.patches_per_cluster

    @property
    def directions(self) -> int:
        """Scan directions K; pretraining scans its tokens in prediction order only."""
        return 1

    @property
    def taps(self) -> tuple[int, ...]:
        """Blocks (numbered from 1) whose output the decoder reads."""
        return tuple(self.encoder.depth * a // b for a, b in TAP_DEPTHS)


@dataclass(frozen=True, kw_only=True)
class ClassifierSpec(_Patched):
    """Classification: the encoder with one set of scan parameters per direction, pooling and a head."""

    encoder: EncoderSpec
    classes: int
    image_size: tuple[int, int] = (224, 224)
    """Height and width, pixels."""
    scan_directions: tuple[Direction, ...] = DIRECTIONS[4]
    pooling: Pooling = Pooling.MEAN

    def __post_init__(self) -> None:
        object.__setattr__(self, "image_size", _pair("image_size", self.image_size, MAX_SIDE))
        names = tuple(_choice("scan_directions", Direction, name) for name in self.scan_directions)
        object.__setattr__(self, "scan_directions", names)
        object.__setattr__(self, "pooling", _choice("pooling", Pooling, self.pooling))
        check_whole("classifier", Range(low=1, high=MAX_CLASSES), classes=self.classes)
        _require(len(names) in DIRECTIONS, f"a classifier scans in 1, 2 or 4 directions, found {len(names)}")
        twice = next((name for name in names if names.count(name) > 1), None)
        _require(twice is None, f"scan direction {twice} appears twice")
        _require(
            self.patches >= 2,
            "a classifier needs at least two patches; its class token is between them",
        )

    @property
    def tokens(self) -> int:
        """Patches and the class token."""
        return self.patches + 1

    @property
    def class_position(self) -> int:
        """Index of the class token: the middle of the tokens in raster order."""
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
    """The content of `config.json`: plain values from which `from_json` restores an equal spec."""

    def plain(value: Any) -> Any:
        if isinstance(value, tuple):
            return [plain(item) for item in value]
        return str(value) if isinstance(value, StrEnum) else value

    fields = {k: plain(v) for k, v in _shallow(spec).items() if k != "encoder"}
    return {"format": FORMAT, "kind": kind_of(spec), "encoder": _shallow(spec.encoder), **fields}


def from_json(data: Mapping[str, Any]) -> ModelSpec:
    """Restore a spec from `to_json`; ValueError names an unknown, missing or invalid key."""
    if data.get("format") != FORMAT:
        owner = next((data[key] for key in ("model_type", "architecture") if key in data), None)
        other = "" if owner is None else f"; this is a configuration of {shortened(owner)}"
        raise ValueError(f"config: expected format {FORMAT!r}, found {shortened(data.get('format'))}{other}")
    kind = data.get("kind")
    if not isinstance(kind, str) or kind not in _KINDS:
        raise ValueError(f"config: expected kind {' or '.join(_KINDS)}, found {shortened(kind)}")
    fields = {k: v for k, v in data.items() if k not in ("format", "kind")}
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
    encoder = values.pop("encoder", None)
    if not isinstance(encoder, Mapping):
        raise ValueError(f"config: expected 'encoder' to be an object, found {shortened(encoder)}")
    cls = _KINDS[kind]
    _check_keys("config.encoder", encoder, EncoderSpec)
    _check_keys("config", {**values, "encoder": encoder}, cls)
    return cls(encoder=EncoderSpec(**encoder), **values)


def _shallow(spec: ModelSpec | EncoderSpec) -> dict[str, Any]:
    return {field.name: getattr(spec, field.name) for field in dataclasses.fields(spec)}


def _check_keys(owner: str, data: Mapping[str, Any], cls: type[Any]) -> None:
    fields = {field.name: field for field in dataclasses.fields(cls)}
    check_keys(owner, data, fields)
    required = {name for name, field in fields.items() if field.default is dataclasses.MISSING}
    if missing := sorted(required - set(data)):
        raise ValueError(f"{owner}: missing {', '.join(missing)}")
