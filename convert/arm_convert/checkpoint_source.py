"""Whatever a user calls a model, opened: model folders, runs, official checkpoints, plain files.

A `CheckpointSource` knows what the file says about itself and holds its tensors unread. It is the same for
inspecting, importing, comparing and verifying.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from arm_convert import hub
from arm_convert.pickle_machine import Attributes, brief
from arm_convert.torch_file import is_torch_file, read_torch
from arm_core.files.errors import BadFileError
from arm_core.files.model_folder import parse_config
from arm_core.files.safetensors import Tensor, check_names, read_tensors
from arm_core.model.spec import ModelSpec
from arm_core.training.checkpoint import Warn
from arm_core.training.model_source import open_folder

LAYOUT_KEY, CONFIG_KEY = "arm.layout", "arm.config"
"""Metadata by which a file that we exported says what it holds."""

FRAMEWORK_KEY = "format"
"""Metadata by which safetensors files name the framework that they are for."""

ABOUT = "arm_vision"
"""Entry of a `.pth` that we exported, with the same keys."""


class Layout(StrEnum):
    """Whose names and layouts the tensors have."""

    CANONICAL = "canonical"
    OFFICIAL = "official"
    TORCH = "torch"
    MLX = "mlx"


@dataclass(frozen=True)
class CheckpointSource:
    """A model as it stands in a file or folder."""

    path: Path
    format: str
    """In words: `model folder`, `run`, `torch (zip)`, `torch (legacy)`, `safetensors`."""
    layout: Layout
    tensors: dict[str, Tensor]
    """By the file's own names, without a wrapper's prefix."""
    prefix: str = ""
    """What stood in front of every name (`module.`, `model.`)."""
    average: dict[str, Tensor] | None = None
    """The moving average of the weights, where one is kept."""
    spec: ModelSpec | None = None
    """Where the file says it itself."""
    metadata: dict[str, str] = field(default_factory=dict)
    args: dict[str, Any] = field(default_factory=dict)
    """Training arguments of an official checkpoint."""
    entries: dict[str, Any] = field(default_factory=dict)
    """Everything else at the top of an official checkpoint: optimizer, epoch, scaler, ..."""
    run: Path | None = None
    """The folder of the run that this is a checkpoint of."""


def open_checkpoint_source(name: Path | str, *, warn: Warn) -> CheckpointSource:
    """Open a model of any kind; `warn` is told of damaged checkpoints that a run passes over."""
    path = hub.fetch(name) if isinstance(name, str) and name.startswith(hub.PREFIX) else Path(name)
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder")
    if path.is_dir():
        return _from_folder(path, warn)
    if not path.is_file():
        raise ValueError(f"{path}: neither a file nor a folder")
    if is_torch_file(path):
        return _open_torch(path)
    file = read_tensors(path)
    metadata = dict(file.metadata)
    layout, spec = _self_description(path, metadata)
    tensors, prefix = strip_prefix(file.tensors)
    return CheckpointSource(path, "safetensors", layout, tensors, prefix=prefix, spec=spec, metadata=metadata)


def _from_folder(path: Path, warn: Warn) -> CheckpointSource:
    found = open_folder(path, warn=warn)
    return CheckpointSource(
        found.model.path,
        found.kind,
        Layout.CANONICAL,
        found.model.arrays,
        average=found.average,
        spec=found.model.spec,
        metadata=found.model.metadata,
        run=found.run,
    )


def _self_description(path: Path, metadata: dict[str, str]) -> tuple[Layout, ModelSpec | None]:
    """Layout and spec that our own exports state; those keys are taken out of `metadata`."""
    metadata.pop(FRAMEWORK_KEY, None)
    layout, config = metadata.pop(LAYOUT_KEY, None), metadata.pop(CONFIG_KEY, None)
    if layout is None or config is None:
        return Layout.OFFICIAL, None
    if layout not in list(Layout):
        raise BadFileError(
            f"{path}: {LAYOUT_KEY}: expected one of {', '.join(Layout)}, found {brief(layout)}"
        )
    return Layout(layout), parse_config(path, config.encode())


def _open_torch(path: Path) -> CheckpointSource:
    file = read_torch(path)
    form = f"torch ({file.format})"
    if not isinstance(file.value, dict) or not file.value:
        raise BadFileError(
            f"{path}: expected a checkpoint or a state dict, found a {type(file.value).__name__}"
        )
    entries = dict(file.value)
    if any(isinstance(value, Tensor) for value in entries.values()):  # a bare state dict
        return CheckpointSource(path, form, Layout.OFFICIAL, *strip_prefix(_only_tensors(path, entries)))
    key = next((key for key in ("model", "state_dict", "model_state_dict") if key in entries), None)
    if key is None or not isinstance(entries[key], dict):
        found = ", ".join(brief(key) for key in list(entries)[:6])
        raise BadFileError(f"{path}: expected an entry 'model' with the tensors, found {found}")
    tensors, prefix = strip_prefix(_only_tensors(path, entries.pop(key)))
    average = entries.pop("model_ema", None)
    if isinstance(average, dict):
        average = strip_prefix(_only_tensors(path, average))[0]
    about = entries.pop(ABOUT, {})
    if not isinstance(about, dict) or not all(isinstance(v, str) for v in about.values()):
        raise BadFileError(f"{path}: {ABOUT}: expected strings by name")
    layout, spec = _self_description(path, about)
    args = entries.pop("args", {})
    return CheckpointSource(
        path,
        form,
        layout,
        tensors,
        prefix=prefix,
        average=average,
        spec=spec,
        metadata=about,
        args=dict(args) if isinstance(args, (Attributes, dict)) else {},
        entries=entries,
    )


def _only_tensors(path: Path, entries: Mapping[Any, Any]) -> dict[str, Tensor]:
    check_names(path, (name for name in entries if isinstance(name, str)))
    for name, value in entries.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise BadFileError(f"{path}: {brief(name)}: expected a tensor, found {brief(value)}")
    return dict(entries)


def strip_prefix(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """Names without what wrappers (DDP, EMA, torch.compile) put in front of all of them, and that prefix."""
    prefix, names = "", list(tensors)
    while names:
        found = next(
            (p for p in ("module.", "model.", "_orig_mod.") if all(n.startswith(p) for n in names)), None
        )
        if found is None:
            break
        prefix, names = prefix + found, [name[len(found) :] for name in names]
    return dict(zip(names, tensors.values(), strict=True)), prefix
