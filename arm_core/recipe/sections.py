"""The sections of a recipe: what may stand in its TOML tables, checked one by one.

`arm_core.recipe.recipe` puts them together with those that stand beside what they set: `OptimizerSettings`,
`TrainTransform` and `Mixing`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from arm_core.engine.protocol import Precision
from arm_core.model.drop_path import drop_rates
from arm_core.model.spec import (
    DECODER_HEAD_WIDTH,
    DIRECTIONS,
    ClassifierSpec,
    EncoderSpec,
    Pooling,
    PredictionOrder,
    PretrainSpec,
    Target,
    preset,
)
from arm_core.recipe.toml import Span

NO_TIME = Span(0, "epochs")
ONE_EPOCH = Span(1, "epochs")


@dataclass(frozen=True, kw_only=True)
class EncoderChoice:
    """Size of the trunk: a preset, single fields changed, or width and depth by value."""

    preset: str | None = None
    width: int | None = None
    depth: int | None = None
    patch: int | None = None
    state: int | None = None
    conv_width: int | None = None

    def encoder(self) -> EncoderSpec:
        size = None if self.preset is None else preset(self.preset)
        if size is None and (self.width is None or self.depth is None):
            raise ValueError("model: name a preset, or give both width and depth")
        chosen = {} if size is None else {name: getattr(size, name) for name in ("width", "depth", "patch")}
        return EncoderSpec(**{**chosen, **_given(self, EncoderSpec)})


@dataclass(frozen=True, kw_only=True)
class PretrainModel(EncoderChoice):
    """Model of a pretraining recipe: what is not given is the preset's, or `PretrainSpec`'s default."""

    image_size: tuple[int, int] | None = None
    cluster: tuple[int, int] | None = None
    prediction_order: PredictionOrder | None = None
    order_seed: int | None = None
    decoder_width: int | None = None
    decoder_depth: int | None = None
    decoder_heads: int | None = None
    """By default one head for each 64 channels."""
    target: Target | None = None

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
    """Model of a finetuning recipe: what is not given is the preset's, or `ClassifierSpec`'s default."""

    classes: int | None = None
    """None for as many as the training data has."""
    image_size: tuple[int, int] | None = None
    directions: int | None = None
    """1, 2 or 4."""
    pooling: Pooling | None = None
    head_std: float | None = None
    """Standard deviation of a new head's weights on a pretrained trunk; None for the official 2e-5. From
    scratch every head starts alike (`arm_core.model.parameters.HEAD_STD`)."""

    def spec(self, classes: int | None = None) -> ClassifierSpec:
        """classes: number in the data; a ValueError says so where it differs from the recipe's."""
        if self.classes is not None and classes is not None and self.classes != classes:
            raise ValueError(f"model.classes: the recipe says {self.classes}, the data has {classes} classes")
        count = self.classes if classes is None else classes
        if count is None:
            raise ValueError("model.classes: neither the recipe nor the data says how many classes there are")
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
    """Where images come from."""

    source: str = "folder"
    """Name of the source: `folder` (images by class), `digits` (built in) or `synthetic`."""
    path: str | None = None
    """Training images of a `folder`."""
    eval_path: str | None = None
    """Images to evaluate on; None for no evaluation on a `folder`."""
    labels_per_class: int | None = None
    """Labelled images of each class to train on, of the `digits`; None for all."""
    eval_crop: float | None = None
    """Part of an image that evaluation keeps (`EvalTransform.crop_fraction`); None for the official rule."""
    workers: int = 4
    """Processes that decode and augment; 0 does it in the training process. No effect on the result."""

    def __post_init__(self) -> None:
        _check(
            "data",
            self,
            labels_per_class=self.labels_per_class is None or self.labels_per_class >= 1,
            eval_crop=self.eval_crop is None or 0 < self.eval_crop <= 1,
            workers=self.workers >= 0,
        )


@dataclass(frozen=True, kw_only=True)
class ScheduleSettings:
    """Warm-up and half cosine; see `arm_core.recipe.schedule`."""

    base_lr: float
    """Peak learning rate for 256 images per update; scaled with the batch."""
    min_lr: float = 0.0
    """Learning rate at the end, not scaled."""
    warmup: Span = NO_TIME

    def __post_init__(self) -> None:
        _check("schedule", self, base_lr=self.base_lr > 0, min_lr=self.min_lr >= 0)


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """Length, batch and bookkeeping of a run."""

    length: Span
    batch_size: int
    """Images per update, over all devices."""
    accumulation: int = 1
    """Micro-batches that an update is made of; batch_size / accumulation images pass at a time.
    Several processes share them out, so neither number depends on the machine."""
    drop_path: float = 0.0
    """Rate of the deepest block (`arm_core.model.drop_path`)."""
    precision: Precision = Precision.FLOAT32
    seed: int = 0
    log_every: int = 20
    """Steps between rows in `metrics.jsonl`."""
    save_every: Span = ONE_EPOCH
    keep: int = 2
    """Newest checkpoints that are kept, besides the best one."""
    evaluate_every: Span | None = None
    """None evaluates at the end only."""

    def __post_init__(self) -> None:
        _check(
            "training",
            self,
            length=self.length.amount > 0,
            batch_size=self.batch_size >= 1,
            accumulation=self.accumulation >= 1,
            seed=self.seed >= 0,
            log_every=self.log_every >= 1,
            save_every=self.save_every.amount > 0,
            keep=self.keep >= 1,
            evaluate_every=self.evaluate_every is None or self.evaluate_every.amount > 0,
        )
        if self.batch_size % self.accumulation:
            raise ValueError(
                f"training: batch_size {self.batch_size} is no multiple of accumulation {self.accumulation}"
            )
        drop_rates(self.drop_path, 1)

    @property
    def micro_batch(self) -> int:
        """Images in one micro-batch."""
        return self.batch_size // self.accumulation


def _check(owner: str, settings: Any, **good: bool) -> None:
    if bad := [f"{name} = {getattr(settings, name)}" for name, ok in good.items() if not ok]:
        raise ValueError(f"{owner} out of range: {', '.join(bad)}")
