"""The sections of a recipe, each with its keys and their valid ranges.

`arm_core.recipe.recipe` combines them with those that are defined next to the code that they configure:
`OptimizerSettings`, `TrainTransform` and `Mixing`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from arm_core.data.bad_images import OnBadImage
from arm_core.data.opening import Format
from arm_core.data.transforms import CROP_FRACTIONS
from arm_core.engine.protocol import Precision
from arm_core.model.checks import AT_LEAST_ONE, NOT_NEGATIVE, POSITIVE, Range, check_ranges
from arm_core.model.drop_path import drop_rates
from arm_core.model.presets import DECODER_HEAD_WIDTH, preset
from arm_core.model.spec import (
    DIRECTIONS,
    ClassifierSpec,
    EncoderSpec,
    Pooling,
    PredictionOrder,
    PretrainSpec,
    Target,
)
from arm_core.recipe.toml import Span

MAX_BATCH, MAX_WORKERS = 2**24, 1024
"""Images per update, and data workers; larger numbers are mistakes."""

NO_TIME = Span(0, "epochs")
ONE_EPOCH = Span(1, "epochs")


@dataclass(frozen=True, kw_only=True)
class EncoderChoice:
    """Size of the encoder: a preset, a preset with some fields changed, or a width and a depth."""

    preset: str | None = None
    """Named size: digits, tiny, small, base, large or huge."""
    width: int | None = None
    """Channels of a token."""
    depth: int | None = None
    """Number of blocks."""
    patch: int | None = None
    """Side of a square patch, pixels."""
    state: int | None = None
    """States per channel of the scan, N."""
    conv_width: int | None = None
    """Width of the depthwise convolution, tokens."""

    def encoder(self) -> EncoderSpec:
        size = None if self.preset is None else preset(self.preset)
        if size is None and (self.width is None or self.depth is None):
            raise ValueError("model: set a preset, or both width and depth")
        chosen = {} if size is None else {name: getattr(size, name) for name in ("width", "depth", "patch")}
        return EncoderSpec(**{**chosen, **_given(self, EncoderSpec)})


@dataclass(frozen=True, kw_only=True)
class PretrainModel(EncoderChoice):
    """Model of a pretraining recipe; a key that is not set comes from the preset or from `PretrainSpec`."""

    image_size: tuple[int, int] | None = None
    """Height and width, pixels; one number means a square."""
    cluster: tuple[int, int] | None = None
    """Height and width of a cluster, patches."""
    prediction_order: PredictionOrder | None = None
    """Order in which clusters are predicted."""
    order_seed: int | None = None
    """Seed of the prediction order `random`."""
    decoder_width: int | None = None
    """Channels of a decoder token."""
    decoder_depth: int | None = None
    """Number of decoder blocks."""
    decoder_heads: int | None = None
    """Default: one head per 64 channels."""
    target: Target | None = None
    """Pixels to predict: normalized per patch, or raw."""

    def spec(self) -> PretrainSpec:
        chosen: dict[str, Any] = _given(self, PretrainSpec)
        if self.preset is not None:
            size = preset(self.preset)
            defaults = {name: getattr(size, name) for name in ("cluster", "decoder_width", "decoder_depth")}
            chosen = {**defaults, "image_size": size.pretrain_size, **chosen}
        if width := chosen.get("decoder_width"):
            chosen.setdefault("decoder_heads", max(1, width // DECODER_HEAD_WIDTH))
        return PretrainSpec(encoder=self.encoder(), **chosen)


@dataclass(frozen=True, kw_only=True)
class ClassifierModel(EncoderChoice):
    """Model of a finetuning recipe; a key that is not set comes from the preset or from `ClassifierSpec`."""

    classes: int | None = None
    """None for the number of classes in the training data."""
    image_size: tuple[int, int] | None = None
    """Height and width, pixels; one number means a square."""
    directions: int | None = None
    """1, 2 or 4."""
    pooling: Pooling | None = None
    """Pooling of the tokens: their mean, or the class token."""
    head_std: float | None = None
    """Standard deviation of a new head's weights on a pretrained encoder; None for the official 2e-5.
    Training from scratch always uses `arm_core.model.parameters.HEAD_STD`."""

    def spec(self, classes: int | None = None) -> ClassifierSpec:
        """classes: number of classes in the data; ValueError if the recipe states another number."""
        if self.classes is not None and classes is not None and self.classes != classes:
            raise ValueError(
                f"model.classes: the recipe has {self.classes} classes, but the data has {classes} classes"
            )
        count = self.classes if classes is None else classes
        if count is None:
            raise ValueError("model.classes: the data has no classes; pass --set model.classes=N")
        chosen: dict[str, Any] = {**_given(self, ClassifierSpec), "classes": count}
        if self.preset is not None:
            chosen.setdefault("image_size", preset(self.preset).image_size)
        if self.directions is not None:
            if self.directions not in DIRECTIONS:
                raise ValueError(f"model.directions: expected 1, 2 or 4, found {self.directions}")
            chosen["scan_directions"] = DIRECTIONS[self.directions]
        return ClassifierSpec(encoder=self.encoder(), **chosen)


def _given(choice: EncoderChoice, cls: type[Any]) -> dict[str, Any]:
    """The fields of spec class `cls` that a choice sets."""
    names = {item.name for item in dataclasses.fields(cls)}
    return {k: v for k, v in vars(choice).items() if k in names and v is not None}


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Sources of the images."""

    source: str = "folder"
    """Name of the source: `folder` (images by class), `digits`, `varied-digits` (built in) or `synthetic`."""
    path: str | None = None
    """Training images, for the source `folder`: a folder, or what `arm_core.data.opening` reads."""
    eval_path: str | None = None
    """Evaluation images, for the source `folder`; None for no evaluation."""
    format: Format = Format.AUTO
    """How the images at `path` and `eval_path` are stored; `auto` detects it."""
    val_fraction: float | None = None
    """Fraction of the images at `path` that is used for evaluation and not for training, without an
    `eval_path`; chosen by names (`arm_core.data.combine.split`)."""
    on_bad_image: OnBadImage = OnBadImage.FAIL
    """Whether an image that cannot be decoded stops training, or the next one takes its place."""
    labels_per_class: int | None = None
    """Labelled training images per class, for the source `digits`; None for all."""
    eval_crop: float | None = None
    """Centre crop in evaluation (`EvalTransform.crop_fraction`); None for the official rule."""
    workers: int = 4
    """Threads that decode and augment images; 0 uses the training thread. Does not change the result."""

    def __post_init__(self) -> None:
        check_ranges(
            "data",
            self,
            labels_per_class=AT_LEAST_ONE,
            eval_crop=CROP_FRACTIONS,
            val_fraction=Range(above=0, below=1),
            workers=Range(low=0, high=MAX_WORKERS),
        )


@dataclass(frozen=True, kw_only=True)
class ScheduleSettings:
    """Warm-up and half cosine; see `arm_core.recipe.schedule`."""

    base_lr: float
    """Peak learning rate for 256 images per update; scaled linearly with the batch size."""
    min_lr: float = 0.0
    """Final learning rate; not scaled."""
    warmup: Span = NO_TIME
    """Length of the linear warm-up, such as `5 epochs` or `100 steps`."""

    def __post_init__(self) -> None:
        check_ranges("schedule", self, base_lr=POSITIVE, min_lr=NOT_NEGATIVE)


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """Length, batch size, logging and checkpoints of a run."""

    length: Span
    """Length of the run, such as `100 epochs` or `400 steps`."""
    batch_size: int
    """Images per update, over all processes."""
    accumulation: int = 1
    """Micro-batches per update, of batch_size / accumulation images each. Several processes share them,
    so neither number depends on the machine."""
    drop_path: float = 0.0
    """Drop-path rate of the deepest block (`arm_core.model.drop_path`)."""
    precision: Precision = Precision.FLOAT32
    """Type of the matrix products: float32 or bfloat16."""
    seed: int = 0
    """Seed of initial weights, data order, augmentation, mixing and drop path."""
    log_every: int = 20
    """Steps between rows in `metrics.jsonl`."""
    save_every: Span = ONE_EPOCH
    """Interval between checkpoints."""
    keep: int = 2
    """Number of newest checkpoints to keep, in addition to the best one."""
    keep_every: Span | None = None
    """Distance between checkpoints that are kept permanently; None for no such checkpoints."""
    evaluate_every: Span | None = None
    """Interval between evaluations; None for one at the end only."""

    def __post_init__(self) -> None:
        check_ranges(
            "training",
            self,
            batch_size=Range(low=1, high=MAX_BATCH),
            accumulation=Range(low=1, high=MAX_BATCH),
            seed=Range(low=0, below=2**63),
            log_every=AT_LEAST_ONE,
            keep=AT_LEAST_ONE,
        )
        for name in ("length", "save_every", "evaluate_every", "keep_every"):
            span: Span | None = getattr(self, name)
            if span is not None and span.amount <= 0:
                raise ValueError(f"training.{name}: expected more than 0 {span.unit}, found '{span}'")
        if self.batch_size % self.accumulation:
            raise ValueError(
                f"training: batch_size {self.batch_size} is not divisible by accumulation {self.accumulation}"
            )
        drop_rates(self.drop_path, 1)

    @property
    def micro_batch(self) -> int:
        """Images in one micro-batch."""
        return self.batch_size // self.accumulation
