"""From any source of a model to a module of an engine: `arm_vision.load_model`."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

from arm_convert.adapt import resize
from arm_convert.checkpoint_source import open_checkpoint_source
from arm_convert.hub import PREFIX
from arm_convert.importing import resolve
from arm_convert.published import find_published, similar_names
from arm_core.data.model_config import ModelConfig
from arm_core.engine.protocol import Array
from arm_core.engine.registry import choose_backend
from arm_core.model.parameters import initial_parameters
from arm_core.model.presets import PRESETS, classifier_preset, pretrain_preset
from arm_core.model.spec import ClassifierSpec, ModelSpec
from arm_core.training.model_source import Weights


def load_model(
    source: str | Path,
    backend: str = "auto",
    device: Any = None,
    dtype: Any = None,
    *,
    weights: str = "raw",
    classes: int | None = None,
    image_size: tuple[int, int] | int | None = None,
    dynamic_image_size: bool = False,
    drop_path_rate: float = 0.0,
    scan: str = "auto",
    seed: int = 0,
) -> Any:
    """Load a model as a module of an engine: `torch.nn.Module` or `mlx.nn.Module`, in evaluation mode.

    source: a model folder, a run, a checkpoint, an official `.pth` or `.safetensors` file,
        `hf://user/name[@revision][/file]`, the name of a published checkpoint (`arm models`), or a preset:
        `base` or `base-classifier` for a classifier with random weights, `base-pretrain` for a pretraining
        model.
    backend: `torch`, `mlx` or `auto`.  device, dtype: of that framework; None for its defaults.
    weights: `raw`, or `ema` for the moving average if the source has one.
    classes: number of classes of a preset (default 1000); any other classifier gets a new head if the
        number differs.
    image_size: (H, W) or one number, pixels; position embeddings are resized (bicubic).
    dynamic_image_size: accept images of any multiple of the patch size (classifiers).
    drop_path_rate: stochastic depth in training mode.
    scan: scan implementation, as `arm doctor` lists them.  seed: of random weights.

    torch modules take images (B, 3, H, W), MLX modules (B, H, W, 3), normalized (`model.transform()`).
    Raises ValueError if the source is not a model or the engine is not available.
    """
    chosen = choose_backend(backend)
    spec, parameters, config = open_parameters(source, weights=weights, classes=classes, seed=seed)
    if image_size is not None:
        size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        spec, parameters = _resized(spec, parameters, size)
    model = chosen.create_module(
        spec,
        parameters,
        config,
        device=device,
        dtype=dtype,
        scan=scan,
        dynamic_image_size=dynamic_image_size,
        drop_path_rate=drop_path_rate,
    )
    if classes is not None and isinstance(spec, ClassifierSpec) and spec.classes != classes:
        model.reset_classifier(classes)
    return model


def open_parameters(
    source: str | Path, *, weights: str = "raw", classes: int | None = None, seed: int = 0
) -> tuple[ModelSpec, dict[str, Array], ModelConfig]:
    """Spec, float32 parameters and configuration of a source of `load_model`."""
    preset = _preset(str(source), classes)
    if preset is not None and not Path(source).exists():
        return preset, initial_parameters(preset, seed), ModelConfig()
    name = find_published(str(source)) or source
    if not str(name).startswith(PREFIX) and not os.path.exists(name):  # noqa: PTH110 (False if too long)
        raise ValueError(
            f"{source}: no such file or folder, and no preset of this name{similar_names(str(source))}"
        )
    opened = open_checkpoint_source(name, warn=lambda text: warnings.warn(text, stacklevel=4))
    resolved = resolve(opened, weights=Weights(weights))
    parameters = {name: tensor.read() for name, tensor in resolved.tensors.items()}
    config = ModelConfig.of(resolved.metadata, resolved.spec)
    return resolved.spec, parameters, config


def _preset(name: str, classes: int | None) -> ModelSpec | None:
    """The spec of a preset's name, None for other names."""
    size, _, kind = name.partition("-")
    if size not in PRESETS or kind not in ("", "classifier", "pretrain"):
        return None
    return pretrain_preset(size) if kind == "pretrain" else classifier_preset(size, classes=classes or 1000)


def _resized(
    spec: ModelSpec, parameters: dict[str, Array], size: tuple[int, ...]
) -> tuple[ModelSpec, dict[str, Array]]:
    from arm_core.files.safetensors import as_tensors

    if len(size) != 2:
        raise ValueError(f"image_size: expected (H, W) or one number, found {size}")
    spec, tensors = resize(spec, as_tensors(parameters), (size[0], size[1]))
    return spec, {name: tensor.read() for name, tensor in tensors.items()}
