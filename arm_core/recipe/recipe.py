"""A recipe: all settings that determine the result of a run, as plain values in one TOML file.

Settings of the machine (backend, device, scan implementation, threads) are chosen when a run is started or
resumed, and are recorded per session in the run folder.
"""

from __future__ import annotations

import hashlib
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from importlib import resources
from pathlib import Path
from typing import Any

from arm_core.data.mixing import Mixing
from arm_core.data.transforms import EvalTransform, TrainTransform
from arm_core.engine.optimizer import OptimizerSettings
from arm_core.files.reading import read_text
from arm_core.model.checks import check_keys, near_match, shortened
from arm_core.model.spec import ModelSpec
from arm_core.recipe.schedule import scaled_lr
from arm_core.recipe.sections import (
    ClassifierModel,
    DataSettings,
    PretrainModel,
    ScheduleSettings,
    TrainingSettings,
)
from arm_core.recipe.toml import assign, dump, field_types, from_table, read_value, to_table

MAX_CHARACTERS, MAX_DOTS = 100_000, 100
"""Largest numbers of characters of a recipe and of dots in one of its lines."""


class Stage(StrEnum):
    """The training stage of a run; also the name of the command."""

    PRETRAIN = "pretrain"
    FINETUNE = "finetune"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One run, on any machine. `stage` selects the model class."""

    stage: Stage
    model: PretrainModel | ClassifierModel
    schedule: ScheduleSettings
    training: TrainingSettings
    data: DataSettings = field(default_factory=DataSettings)
    augmentation: TrainTransform = field(default_factory=TrainTransform)
    mixing: Mixing = field(default_factory=Mixing)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)

    def __post_init__(self) -> None:
        if self.stage is Stage.PRETRAIN and self.mixing != Mixing():
            raise ValueError("mixing: pretraining has no labels to mix or smooth; remove the section")

    @property
    def lr(self) -> float:
        """Peak learning rate."""
        return scaled_lr(self.schedule.base_lr, self.training.batch_size)

    @property
    def eval_transform(self) -> EvalTransform:
        """The transform of evaluation images."""
        augmentation = self.augmentation
        return EvalTransform(crop_fraction=self.data.eval_crop, mean=augmentation.mean, std=augmentation.std)

    def spec(self, classes: int | None = None) -> ModelSpec:
        """The model. classes: number of classes in the data, for a classifier without `model.classes`."""
        return self.model.spec() if isinstance(self.model, PretrainModel) else self.model.spec(classes)


_MODELS: dict[Stage, type[PretrainModel] | type[ClassifierModel]] = {
    Stage.PRETRAIN: PretrainModel,
    Stage.FINETUNE: ClassifierModel,
}


_BOOKKEEPING = {
    "data": ("path", "eval_path", "workers", "format", "on_bad_image"),
    "training": ("log_every", "save_every", "keep", "keep_every", "evaluate_every"),
}
"""Settings that do not change what is computed and may differ between machines and sessions."""


def from_toml(text: str) -> Recipe:
    """Read a recipe; ValueError names an unknown, missing or invalid key."""
    # Python's parser takes memory that grows with the square of the parts of a dotted key.
    if len(text) > MAX_CHARACTERS or any(line.count(".") > MAX_DOTS for line in text.splitlines()):
        raise ValueError(
            f"not a recipe: expected at most {MAX_CHARACTERS} characters, and {MAX_DOTS} dots in a line"
        )
    try:
        table = tomllib.loads(text)
    except RecursionError:
        raise ValueError("not valid TOML: nested too deeply") from None
    except ValueError as error:  # TOMLDecodeError, or a number of thousands of digits
        raise ValueError(f"not valid TOML: {error}") from None
    return _from_table(table)


def to_toml(recipe: Recipe) -> str:
    """The recipe with every value; `from_toml` restores an equal one."""
    return dump(to_table(recipe))


def shipped_recipes() -> list[str]:
    """Names of the recipes in this package."""
    files = resources.files("arm_core.recipe").iterdir()
    return sorted(item.name.removesuffix(".toml") for item in files if item.name.endswith(".toml"))


def recipe_text(name_or_path: str | Path) -> str:
    """TOML text with comments of a shipped recipe (`pretrain-base`) or of a file (`my/recipe.toml`)."""
    name, path = str(name_or_path), Path(name_or_path)
    if path.suffix != ".toml":
        if name not in shipped_recipes():
            hint = near_match(name, shipped_recipes())
            raise ValueError(
                f"unknown recipe {shortened(name)}{hint} To use a file, pass a path that ends in .toml."
            )
        return (resources.files("arm_core.recipe") / f"{name}.toml").read_text("utf-8")
    try:
        return read_text(path, 4 * MAX_CHARACTERS)
    except OSError as error:
        raise ValueError(f"recipe {name}: cannot be read ({error.strerror or error})") from None


def load_recipe(name_or_path: str | Path) -> Recipe:
    """A shipped recipe by name, or one from a `.toml` file; ValueError names the recipe and the key."""
    text = recipe_text(name_or_path)
    try:
        return from_toml(text)
    except ValueError as error:
        raise ValueError(f"recipe {name_or_path}: {error}") from None


def override(recipe: Recipe, assignments: Sequence[str]) -> Recipe:
    """The recipe with `section.key=value` assignments applied, in order, each typed as its field is.

    `none` unsets an optional setting; lists are written `0.2,1.0`, sizes `192x192` or `192`.
    Raises ValueError on an unknown key (the message names the most similar one), an invalid value, or an
    invalid recipe.
    """
    table = to_table(recipe)
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        path = key.strip().split(".")
        if not equals or len(path) < 2:
            raise ValueError(f"expected section.key=value, found {shortened(assignment)}")
        hints = {**field_types(Recipe), "model": type(recipe.model)}
        assign(table, {name: hint for name, hint in hints.items() if name != "stage"}, path, text)
    return _from_table(table)


def fingerprint(recipe: Recipe) -> str:
    """A hash of all settings that change the result: equal for recipes that differ only in `_BOOKKEEPING`."""
    table = to_table(recipe)
    for section, names in _BOOKKEEPING.items():
        for name in names:
            table[section].pop(name, None)
    if not recipe.augmentation.fast_decode:  # the setting is newer than runs that are to be resumed
        del table["augmentation"]["fast_decode"]
    return hashlib.sha256(dump(table).encode()).hexdigest()[:16]


def bookkeeping() -> set[str]:
    """Settings that do not change what is computed, as `section.key`."""
    return {f"{section}.{name}" for section, names in _BOOKKEEPING.items() for name in names}


def _from_table(table: dict[str, Any]) -> Recipe:
    if table.get("stage") not in list(Stage):
        raise ValueError(f"stage: expected 'pretrain' or 'finetune', found {shortened(table.get('stage'))}")
    if not isinstance(model := table.get("model"), dict):
        raise ValueError(f"model: expected a table [model], found {shortened(model)}")
    stage = Stage(table["stage"])
    choice = from_table(_MODELS[stage], model, "model")
    rest = {key: value for key, value in table.items() if key not in ("stage", "model")}
    hints = field_types(Recipe)
    check_keys("", rest, hints)
    rest = {key: read_value(hints[key], value, key) for key, value in rest.items()}
    if missing := [name for name in ("schedule", "training") if name not in rest]:
        raise ValueError(f"missing section {', '.join(f'[{name}]' for name in missing)}")
    return Recipe(stage=stage, model=choice, **rest)
