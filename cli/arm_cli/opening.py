"""Opens the MODEL of a command line: a model folder, an official checkpoint or a name on the hub."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from arm_cli.show import echo

if TYPE_CHECKING:
    from arm_core.data.model_config import ModelConfig
    from arm_core.data.transforms import EvalTransform
    from arm_core.engine.protocol import Array
    from arm_core.files.model_folder import Model
    from arm_core.model.spec import ClassifierSpec, ModelSpec
    from arm_core.training.model_source import ModelSource

FOREIGN = (".pth", ".pt", ".bin", ".safetensors")
"""Files that are opened as official or exported checkpoints."""


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A model with its values in memory."""

    spec: ModelSpec
    parameters: dict[str, Array]
    classes: tuple[str, ...]
    """Names of class folders in the order of the logits; numbers if the model does not store them, empty
    in pretraining."""
    class_names: tuple[str, ...]
    """Human-readable names of the same classes."""
    named: bool
    """Whether the model stores class names."""
    transform: EvalTransform
    """Preprocessing of images: that of its run, else the official one."""
    folder: Path
    """The model folder, or the file."""
    metadata: dict[str, str] = field(default_factory=dict)
    """All strings stored with its weights."""


def find_model(name: str) -> ModelSource:
    """Open a model folder, a run or a checkpoint; for anything else, a ValueError says what `name` is."""
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
    """Read a model with all its values.

    name: a model folder, a run, a checkpoint, an official or exported file, `hf://user/name[/file]`, or the
    name of a published checkpoint.  weights: `raw`, or `ema` for their moving average.
    """
    from arm_core.data.model_config import ModelConfig
    from arm_core.training.model_source import Weights

    if _elsewhere(name):
        from arm_convert.library import open_parameters

        spec, parameters, config = open_parameters(name, weights=weights)
        return _opened(spec, parameters, config, Path(name))
    source = find_model(name)
    model = source.model
    parameters = source.load(Weights(weights))
    try:
        config = ModelConfig.of(model.metadata, model.spec)
    except ValueError as error:
        raise ValueError(f"{model.path}: {error}") from None
    return _opened(model.spec, parameters, config, model.path)


def class_names(model: Model, spec: ClassifierSpec) -> tuple[str, ...]:
    """Names of class folders stored with a model, else numbers from 0."""
    from arm_core.data.model_config import ModelConfig

    try:
        return ModelConfig.of(model.metadata, spec).classes or _numbers(spec)
    except ValueError as error:
        raise ValueError(f"{model.path}: {error}") from None


def _numbers(spec: ClassifierSpec) -> tuple[str, ...]:
    return tuple(str(i) for i in range(spec.classes))


def _elsewhere(name: str) -> bool:
    """Whether a name refers to a file of another program or to the hub."""
    from arm_core.files.model_folder import CONFIG

    path = Path(name)
    if path.is_file():
        ours = path.suffix == ".safetensors" and (path.parent / CONFIG).exists()
        return path.suffix in FOREIGN and not ours
    if path.exists():
        return False
    from arm_convert.published import REPOSITORIES

    return name.startswith("hf://") or name.partition("/")[0] in REPOSITORIES


def _opened(spec: ModelSpec, parameters: dict[str, Array], config: ModelConfig, path: Path) -> Opened:
    from arm_core.model.spec import ClassifierSpec

    classes: tuple[str, ...] = ()
    if isinstance(spec, ClassifierSpec):
        classes = config.classes or _numbers(spec)
    return Opened(
        spec=spec,
        parameters=parameters,
        classes=classes,
        class_names=config.class_names or classes,
        named=bool(config.classes),
        transform=config.transform,
        folder=path,
        metadata=dict(config.metadata),
    )
