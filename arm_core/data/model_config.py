"""A model's image preprocessing and class names, and the function that prepares an image."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
from PIL import Image

from arm_core.data.decode import Pixels
from arm_core.data.sources import UNLABELLED, Item
from arm_core.data.transforms import EvalTransform, TrainTransform
from arm_core.data.walk import read_file
from arm_core.engine.byte_images import FloatArray
from arm_core.files.metadata import CLASS_NAMES, CLASSES, EVAL_TRANSFORM, read_json
from arm_core.model.rng import KeyedRng
from arm_core.model.spec import ClassifierSpec, ModelSpec

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Image preprocessing and class names of a model, and the rest of its file's metadata."""

    transform: EvalTransform = field(default_factory=EvalTransform)
    classes: tuple[str, ...] = ()
    """Names of classes in the order of the logits, as in class folders; empty if not known."""
    class_names: tuple[str, ...] = ()
    """Human-readable names, if they differ from `classes`."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    """All metadata of the model's file."""

    @staticmethod
    def of(metadata: Mapping[str, str], spec: ModelSpec) -> ModelConfig:
        """Read a model file's metadata; ValueError if an entry is invalid or does not fit the spec."""
        stored = read_json(metadata, EVAL_TRANSFORM, {})
        try:
            transform = EvalTransform(**stored)
        except TypeError as error:
            raise ValueError(f"metadata {EVAL_TRANSFORM!r}: {error}") from None
        names = {key: tuple(map(str, read_json(metadata, key, []))) for key in (CLASSES, CLASS_NAMES)}
        for key, found in names.items():
            if found and isinstance(spec, ClassifierSpec) and len(found) != spec.classes:
                raise ValueError(
                    f"metadata {key!r}: {len(found)} names for a classifier of {spec.classes} classes"
                )
        return ModelConfig(
            transform=transform,
            classes=names[CLASSES],
            class_names=names[CLASS_NAMES],
            metadata=dict(metadata),
        )

    def stored(self) -> dict[str, str]:
        """The metadata to save with a model."""
        rest = {k: v for k, v in self.metadata.items() if k not in (CLASSES, CLASS_NAMES, EVAL_TRANSFORM)}
        lists = {CLASSES: self.classes, CLASS_NAMES: self.class_names}
        named = {key: json.dumps(list(names)) for key, names in lists.items() if names}
        return {**rest, EVAL_TRANSFORM: json.dumps(asdict(self.transform)), **named}

    def without_classes(self) -> ModelConfig:
        """The configuration for a model with a new head."""
        return replace(self, classes=(), class_names=())

    def describe(self, spec: ModelSpec) -> dict[str, Any]:
        """The configuration in timm's words (`pretrained_cfg`): input size (C, H, W), mean, std, crop, ..."""
        crop = self.transform.fraction(spec.image_size)
        return {
            "architecture": "arm",
            "input_size": (spec.encoder.channels, *spec.image_size),
            "mean": self.transform.mean,
            "std": self.transform.std,
            "crop_pct": crop,
            "crop_mode": "center",
            "interpolation": "bicubic",
            "num_classes": spec.classes if isinstance(spec, ClassifierSpec) else 0,
            "classifier": "head",
            "first_conv": "patch_embed",
            "label_names": self.class_names or self.classes,
        }


class ImagePipeline(Generic[T]):
    """From one image to the input of a model: decode, resize, crop, normalize.

    Takes a path, the bytes of a file, a Pillow image, or uint8 pixels (H, W, 3).
    Raises ValueError if this is not an image; the message names the file.
    """

    def __init__(
        self, config: ModelConfig, size: tuple[int, int], convert: Callable[[FloatArray], T], *,
        training: bool = False, seed: int = 0,
    ) -> None:  # fmt: skip
        self._eval, self._size, self._convert = config.transform, size, convert
        self._train = (
            TrainTransform(mean=config.transform.mean, std=config.transform.std) if training else None
        )
        self._seed, self._calls = seed, 0

    def __call__(self, image: str | os.PathLike[str] | bytes | Image.Image | Pixels) -> T:
        item = _item(image)
        if self._train is None:
            return self._convert(self._eval(item, self._size))
        rng = KeyedRng(self._seed, "library", self._calls)
        self._calls += 1
        return self._convert(self._train(item, self._size, rng))


def _item(image: str | os.PathLike[str] | bytes | Image.Image | Pixels) -> Item:
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(f"image: expected uint8 pixels (H, W, 3), found {image.dtype} {image.shape}")
        return Item(image=image, label=UNLABELLED, name="image")
    if isinstance(image, bytes):
        return Item(image=image, label=UNLABELLED, name="image")
    if isinstance(image, Image.Image):
        file = io.BytesIO()  # through the decoder, which also handles modes and orientation
        image.save(file, "PNG" if image.mode in ("1", "L", "LA", "I;16", "P", "RGB", "RGBA") else "TIFF")
        return Item(image=file.getvalue(), label=UNLABELLED, name="image")
    return Item(image=read_file(Path(image)), label=UNLABELLED, name=str(image))
