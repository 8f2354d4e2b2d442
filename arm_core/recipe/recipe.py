"""A recipe: everything that decides how a run turns out, as plain values in one TOML file.

What a recipe leaves to the machine (backend, device, scan implementation, threads) is chosen when a run
is started or resumed, and recorded by session in the run folder.
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
from arm_core.model.spec import ModelSpec
from arm_core.recipe.schedule import scaled_lr
from arm_core.recipe.sections import (
    ClassifierModel,
    DataSettings,
    PretrainModel,
    ScheduleSettings,
    TrainingSettings,
)
from arm_core.recipe.toml import assign, dump, field_types, from_table, near_match, to_table


class Stage(StrEnum):
    """What a run trains; its name is that of the command."""

    PRETRAIN = "pretrain"
    FINETUNE = "finetune"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One run, on any machine. `stage` decides between the two model classes."""

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
            raise ValueError(f"mixing: pretraining has no labels to mix or smooth, found {self.mixing}")

    @property
    def lr(self) -> float:
        """Peak learning rate."""
        return scaled_lr(self.schedule.base_lr, self.training.batch_size)

    @property
    def eval_transform(self) -> EvalTransform:
        """What is done to images in evaluation."""
        augmentation = self.augmentation
        return EvalTransform(crop_fraction=self.data.eval_crop, mean=augmentation.mean, std=augmentation.std)

    def spec(self, classes: int | None = None) -> ModelSpec:
        """The model; classes: number of classes in the data, for a classifier that does not say."""
        return self.model.spec() if isinstance(self.model, PretrainModel) else self.model.spec(classes)


_MODELS: dict[Stage, type[PretrainModel] | type[ClassifierModel]] = {
    Stage.PRETRAIN: PretrainModel,
    Stage.FINETUNE: ClassifierModel,
}


_BOOKKEEPING = {
    "data": ("path", "eval_path", "workers"),
    "training": ("log_every", "save_every", "keep", "evaluate_every"),
}
"""Settings that may differ between machines and sessions without changing what is computed."""


def from_toml(text: str) -> Recipe:
    """Read a recipe; a ValueError names an unknown, missing or mistyped key."""
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"no TOML: {error}") from None
    return _from_table(table)


def to_toml(recipe: Recipe) -> str:
    """The recipe with every value written out; `from_toml` gives an equal one."""
    return dump(to_table(recipe))


def shipped_recipes() -> list[str]:
    """Names of the recipes in this package."""
    files = resources.files("arm_core.recipe").iterdir()
    return sorted(item.name.removesuffix(".toml") for item in files if item.name.endswith(".toml"))


def recipe_text(name_or_path: str | Path) -> str:
    """TOML text, comments included, of a shipped recipe (`pretrain-base`) or of a file (`my/recipe.toml`)."""
    name, path = str(name_or_path), Path(name_or_path)
    if path.suffix != ".toml":
        if name not in shipped_recipes():
            hint = near_match(name, shipped_recipes())
            raise ValueError(
                f"unknown recipe {name!r}{hint} A recipe of your own is a path that ends in .toml."
            )
        return (resources.files("arm_core.recipe") / f"{name}.toml").read_text("utf-8")
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"recipe {name}: cannot be read ({error})") from None


def load_recipe(name_or_path: str | Path) -> Recipe:
    """A shipped recipe by name, or one from a `.toml` file; a ValueError says what is wrong where."""
    text = recipe_text(name_or_path)
    try:
        return from_toml(text)
    except ValueError as error:
        raise ValueError(f"recipe {name_or_path}: {error}") from None


def override(recipe: Recipe, assignments: Sequence[str]) -> Recipe:
    """The recipe with `section.key=value` assignments applied, in order, each typed as its field is.

    `none` empties a setting that may be empty; lists are written `0.2,1.0`, sizes `192x192` or `192`.
    Raises ValueError on an unknown key (with a near match), a mistyped value, or an invalid outcome.
    """
    table = to_table(recipe)
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        path = key.strip().split(".")
        if not equals or len(path) < 2:
            raise ValueError(f"expected section.key=value, found {assignment!r}")
        hints = {**field_types(Recipe), "model": type(recipe.model)}
        assign(table, {name: hint for name, hint in hints.items() if name != "stage"}, path, text)
    return _from_table(table)


def fingerprint(recipe: Recipe) -> str:
    """A hash of what decides the numbers of a run: equal for recipes that differ in bookkeeping only."""
    table = to_table(recipe)
    for section, names in _BOOKKEEPING.items():
        for name in names:
            table[section].pop(name, None)
    return hashlib.sha256(dump(table).encode()).hexdigest()[:16]


def _from_table(table: dict[str, Any]) -> Recipe:
    if table.get("stage") not in list(Stage):
        raise ValueError(f"stage: expected 'pretrain' or 'finetune', found {table.get('stage')!r}")
    if not isinstance(model := table.get("model"), dict):
        raise ValueError(f"model: expected a table [model], found {model!r}")
    stage = Stage(table["stage"])
    choice = from_table(_MODELS[stage], model, "model")
    rest = {key: value for key, value in table.items() if key not in ("stage", "model")}
    hints = field_types(Recipe)
    for key, value in rest.items():
        if key not in hints:
            raise ValueError(f"unknown section {key!r}{near_match(key, hints)}")
        rest[key] = from_table(hints[key], value, key) if isinstance(value, dict) else value
    if missing := [name for name in ("schedule", "training") if name not in rest]:
        raise ValueError(f"missing section {', '.join(f'[{name}]' for name in missing)}")
    return Recipe(stage=stage, model=choice, **rest)
