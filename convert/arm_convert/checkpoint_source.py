"""Opens model folders, runs, official checkpoints and exported files in one way.

A `CheckpointSource` holds a file's description and its unread tensors. All commands of
`arm convert` use it.
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
from arm_core.files.errors import BadFileError, reading
from arm_core.files.metadata import CONFIG, FRAMEWORK, LAYOUT
from arm_core.files.model_folder import parse_config
from arm_core.files.reading import open_regular
from arm_core.files.safetensors import Tensor, check_names, read_tensors
from arm_core.model.spec import ModelSpec
from arm_core.training.checkpoint import Warn
from arm_core.training.model_source import open_folder

ABOUT = "arm_vision"
"""Entry of an exported `.pth` that holds the metadata."""

_FORMATS = {
    b"\xff\xd8\xff": "a JPEG image",
    b"\x89PNG": "a PNG image",
    b"GIF8": "a GIF image",
    b"RIFF": "a WebP image",
    b"BM": "a BMP image",
    b"\x1f\x8b": "a gzip archive",
    b"7z": "a 7z archive",
    b"\xfd7zXZ": "an xz archive",
    b"\x89HDF": "an HDF5 file",
    b"PAR1": "a Parquet file",
    b"GGUF": "a GGUF file",
    b"\x93NUMPY": "a NumPy array",
    b"{": "a JSON file",
}
"""Formats that are not checkpoints, by their first bytes."""

_TAR = b"ustar"
_TAR_OFFSET = 257


class Layout(StrEnum):
    """The names and tensor layouts of a file."""

    CANONICAL = "canonical"
    OFFICIAL = "official"
    TORCH = "torch"
    MLX = "mlx"


@dataclass(frozen=True)
class CheckpointSource:
    """The content of a file or folder that holds a model; tensors are read on demand."""

    path: Path
    format: str
    """Human-readable: `model folder`, `run, ...`, `torch (zip)`, `torch (legacy)`, `safetensors`."""
    layout: Layout
    tensors: dict[str, Tensor]
    """By the file's own names, without a wrapper's prefix."""
    prefix: str = ""
    """The prefix that was removed from every name (`module.`, `model.`)."""
    average: dict[str, Tensor] | None = None
    """The moving average of the weights, if the file holds one."""
    spec: ModelSpec | None = None
    """The specification, if the file states it."""
    metadata: dict[str, str] = field(default_factory=dict)
    args: dict[str, Any] = field(default_factory=dict)
    """Training arguments of an official checkpoint."""
    entries: dict[str, Any] = field(default_factory=dict)
    """Other top-level entries of an official checkpoint: optimizer, epoch, scaler, ..."""
    run: Path | None = None
    """The folder of the run, if this is one of its checkpoints."""


def open_checkpoint_source(name: Path | str, *, warn: Warn) -> CheckpointSource:
    """Open a model folder, run, checkpoint or file.

    warn: receives a sentence for each checkpoint of a run that is corrupt and skipped.
    Raises ValueError, or BadFileError (a ValueError) if a file is corrupt or of another format.
    """
    path = hub.fetch(name) if isinstance(name, str) and name.startswith(hub.PREFIX) else Path(name)
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder")
    with reading(path):
        if path.is_dir():
            return _from_folder(path, warn)
        with open_regular(path) as file:
            start = file.read(_TAR_OFFSET + len(_TAR))
        if is_torch_file(start):
            return _open_torch(path)
        _refuse_other_formats(path, start)
        return _open_safetensors(path)


def _refuse_other_formats(path: Path, start: bytes) -> None:
    """Describe a file that is not a checkpoint; start: its first bytes."""
    expected = "expected a .pth file of torch.save, a .safetensors file, a model folder or a run"
    if start[_TAR_OFFSET:] == _TAR:
        raise BadFileError(
            f"{path}: a tar archive, the checkpoint format of early torch versions, is not supported; "
            "load it with torch and save it again"
        )
    if not start:
        raise BadFileError(f"{path}: not a checkpoint: the file is empty; {expected}")
    if start[8:9] == b"{":
        return
    kind = next((f": {kind}" for magic, kind in _FORMATS.items() if start.startswith(magic)), "")
    raise BadFileError(f"{path}: not a checkpoint{kind}; {expected}")


def _open_safetensors(path: Path) -> CheckpointSource:
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
    """Layout and spec as exported files state them; their keys are removed from `metadata`."""
    metadata.pop(FRAMEWORK, None)
    layout, config = metadata.pop(LAYOUT, None), metadata.pop(CONFIG, None)
    if layout is None or config is None:
        return Layout.OFFICIAL, None
    if layout not in list(Layout):
        raise BadFileError(f"{path}: {LAYOUT}: expected one of {', '.join(Layout)}, found {brief(layout)}")
    return Layout(layout), parse_config(path, config)


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
    """Remove the prefix that wrappers (DDP, EMA, torch.compile) add to all names; returns it too."""
    prefix, names = "", list(tensors)
    while names:
        found = next(
            (p for p in ("module.", "model.", "_orig_mod.") if all(n.startswith(p) for n in names)), None
        )
        if found is None:
            break
        prefix, names = prefix + found, [name[len(found) :] for name in names]
    return dict(zip(names, tensors.values(), strict=True)), prefix
