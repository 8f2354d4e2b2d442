"""Opening what a user calls a model: a model folder, a run, or a checkpoint of a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from arm_cli.show import echo

if TYPE_CHECKING:
    from arm_core.data.transforms import EvalTransform
    from arm_core.engine.protocol import Array
    from arm_core.files.model_folder import Model
    from arm_core.model.spec import ClassifierSpec, ModelSpec
    from arm_core.training.model_source import ModelSource

FOREIGN = (".pth", ".pt", ".bin", ".tar", ".safetensors")
"""Files that `arm convert import` reads."""


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A model with its values in memory."""

    spec: ModelSpec
    parameters: dict[str, Array]
    classes: tuple[str, ...]
    """Class names in the order of the logits; numbers where the model does not know them, empty in
    pretraining."""
    named: bool
    """Whether the model knows the names."""
    transform: EvalTransform
    """What its images go through: that of its run, else the official one."""
    folder: Path
    metadata: dict[str, str]
    """The strings stored with its weights."""


def find_model(name: str) -> ModelSource:
    """Open a model folder, a run or a checkpoint; ValueError says what else `name` is."""
    from arm_core.files.model_folder import CONFIG
    from arm_core.model.presets import PRESETS
    from arm_core.training.model_source import open_folder

    path = Path(name)
    if not path.exists():
        hint = "; a preset has no weights" if name in PRESETS else ""
        raise ValueError(f"{name}: no such model{hint}; expected a model folder, a run or a checkpoint")
    if path.is_file():
        if path.suffix == ".safetensors" and (path.parent / CONFIG).exists():
            raise ValueError(f"{name}: expected the model folder, found one of its files; pass {path.parent}")
        if path.suffix in FOREIGN:
            raise ValueError(f"{name}: import it first: arm convert import {name} {path.stem}")
        raise ValueError(f"{name}: expected a model folder, a run or a checkpoint, found a file")
    return open_folder(path, warn=lambda text: echo(f"Warning: {path}: {text}", err=True))


def open_model(name: str, *, weights: str = "raw") -> Opened:
    """Read a model with all its values; weights: `raw`, or `ema` for their moving average."""
    from arm_core.model.spec import ClassifierSpec
    from arm_core.training.model_source import Weights

    source = find_model(name)
    model = source.model
    parameters = source.load(Weights(weights))
    classes = class_names(model, model.spec) if isinstance(model.spec, ClassifierSpec) else ()
    return Opened(
        spec=model.spec,
        parameters=parameters,
        classes=classes,
        named="classes" in model.metadata,
        transform=eval_transform(model),
        folder=model.path,
        metadata=model.metadata,
    )


def class_names(model: Model, spec: ClassifierSpec) -> tuple[str, ...]:
    """The names stored with the model, else numbers from 0."""
    from arm_core.files.metadata import CLASSES, read_json

    try:
        names = read_json(model.metadata, CLASSES, [str(i) for i in range(spec.classes)])
    except ValueError as error:
        raise ValueError(f"{model.path}: {error}") from None
    if len(names) != spec.classes:
        raise ValueError(f"{model.path}: {len(names)} class names for a classifier of {spec.classes} classes")
    return tuple(str(name) for name in names)


def eval_transform(model: Model) -> EvalTransform:
    """The evaluation transform stored with the model, else the official one."""
    from arm_core.data.transforms import EvalTransform
    from arm_core.files.metadata import read_json
    from arm_core.recipe.toml import from_table

    try:
        stored = read_json(model.metadata, "eval_transform", {})
        return from_table(EvalTransform, {key: value for key, value in stored.items() if value is not None})
    except ValueError as error:
        raise ValueError(f"{model.path}: metadata 'eval_transform': {error}") from None
