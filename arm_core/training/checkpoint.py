"""Checkpoints of a run: whole or not at all, verified before they are trusted.

    RUN/checkpoints/step-00001000/
        config.json  model.safetensors     the model; every tool that reads a model folder reads this one
        optimizer.safetensors              exp_avg/<name> and exp_avg_sq/<name>
        ema.safetensors                    where an average is kept
        state.json                         `Progress`
        manifest.json                      size and sha256 of each file above
    RUN/LAST                               name of the newest checkpoint, for people and scripts

A checkpoint is written as `step-00001000.tmp`, flushed, and renamed; `LAST` follows. Reading takes the
newest folder whose manifest holds, whatever `LAST` says.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from arm_core.engine.protocol import Array, TrainingState
from arm_core.files.atomic import replace_text, sync_folder, write_text
from arm_core.files.errors import BadFileError
from arm_core.files.model_folder import CONFIG, read_config, write_weights
from arm_core.files.reading import read_json_file
from arm_core.files.safetensors import Tensor, as_tensors, read_tensors, write_tensors
from arm_core.model.parameters import check_parameters
from arm_core.model.spec import ModelSpec, to_json

FOLDER = "checkpoints"
LAST = "LAST"
MODEL, OPTIMIZER, EMA = "model.safetensors", "optimizer.safetensors", "ema.safetensors"
STATE, MANIFEST = "state.json", "manifest.json"

_NAME = re.compile(r"step-(\d{8,})")
_CHUNK = 1 << 20

Warn = Callable[[str], None]
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a run is: the content of `state.json`."""

    step: int
    """Updates done."""
    position: int
    """Micro-batches consumed, over all processes: where the data goes on."""
    recipe: str
    """`arm_core.recipe.recipe.fingerprint` of the recipe in use."""
    engine: dict[str, str]
    """Backend, device, scan implementation and precision that wrote it; another one may go on."""
    losses: tuple[float, ...] = ()
    """Of the steps since the last row in `metrics.jsonl`, so that a resumed run writes the same rows."""
    grad_norms: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """One saved moment of a run."""

    spec: ModelSpec
    progress: Progress
    state: TrainingState = field(repr=False)
    """One that was loaded reads an array each time it is asked for."""
    metadata: dict[str, str] = field(default_factory=dict)
    """Strings kept in the header of `model.safetensors`: `classes` and `eval_transform`, as JSON."""


class StoredArrays(Mapping[str, Array]):
    """float32 arrays of a file, each read when it is asked for: nobody holds a whole training state."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors
        """Shapes and types, known without reading."""

    def __getitem__(self, name: str) -> Array:
        return np.asarray(self.tensors[name].read(), np.float32)

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


def step_name(step: int) -> str:
    return f"step-{step:08d}"


def saved_steps(run: Path) -> list[int]:
    """Steps that have a checkpoint folder, sound or not, oldest first."""
    folder = run / FOLDER
    names = [item.name for item in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(match[1]) for name in names if (match := _NAME.fullmatch(name)))


def save_checkpoint(run: Path, checkpoint: Checkpoint) -> Path:
    """Write a checkpoint, then point `LAST` at it; returns its folder.

    Wherever this stops (killed, disk full, power lost), earlier checkpoints stay as they are and the new
    one is either whole or not seen. A folder of the same step is replaced. Raises OSError.
    """
    check_parameters(checkpoint.spec, checkpoint.state.parameters)
    folder = run / FOLDER
    folder.mkdir(exist_ok=True)
    target = folder / step_name(checkpoint.progress.step)
    draft = target.with_name(f"{target.name}.tmp")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    try:
        _write_content(draft, checkpoint)
        if target.exists():
            _set_aside(target)
        draft.rename(target)
        sync_folder(folder)
        _point_to(run, target.name)
    except OSError:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    return target


def _write_content(folder: Path, checkpoint: Checkpoint) -> None:
    state = checkpoint.state
    write_text(folder / CONFIG, json.dumps(to_json(checkpoint.spec), indent=2) + "\n")
    write_weights(folder, as_tensors(state.parameters), checkpoint.metadata, None)
    moments = {"exp_avg": state.exp_avg, "exp_avg_sq": state.exp_avg_sq}
    write_tensors(
        folder / OPTIMIZER,
        {f"{kind}/{name}": a for kind, arrays in moments.items() for name, a in arrays.items()},
    )
    if state.ema:
        write_tensors(folder / EMA, state.ema)
    write_text(folder / STATE, json.dumps(asdict(checkpoint.progress), indent=2) + "\n")
    files = {path.name: _digest(path) for path in sorted(folder.iterdir())}
    write_text(folder / MANIFEST, json.dumps(files, indent=2) + "\n")
    sync_folder(folder)


def _point_to(run: Path, name: str) -> None:
    replace_text(run / LAST, name + "\n")
    sync_folder(run)


def load_checkpoint(folder: Path, *, check: bool = True) -> Checkpoint:
    """Read a checkpoint after checking every byte of it; BadFileError (a ValueError) says what is wrong.

    check: False where another process has just done so.
    """
    files = verify(folder) if check else [path.name for path in folder.iterdir()]
    spec = read_config(folder)
    model, optimizer = read_tensors(folder / MODEL), read_tensors(folder / OPTIMIZER).tensors
    check_parameters(spec, model.tensors, source=str(folder / MODEL))  # type: ignore[arg-type]  # shapes alone
    state = TrainingState(
        parameters=StoredArrays(model.tensors),
        exp_avg=StoredArrays(_below(optimizer, "exp_avg")),
        exp_avg_sq=StoredArrays(_below(optimizer, "exp_avg_sq")),
        ema=StoredArrays(read_tensors(folder / EMA).tensors if EMA in files else {}),
    )
    values = read_json_file(folder / STATE)
    try:
        lists = {name: tuple(values[name]) for name in ("losses", "grad_norms")}
        progress = Progress(**{**values, **lists})
    except (KeyError, TypeError) as error:
        raise BadFileError(
            f"{folder / STATE}: written by another version of this package ({error})"
        ) from None
    return Checkpoint(spec=spec, progress=progress, state=state, metadata=model.metadata)


def newest_checkpoint(run: Path, warn: Warn) -> Checkpoint | None:
    """The newest sound checkpoint of a run; `warn` is told of each newer one that had to be passed over.

    None where no checkpoint was ever written; BadFileError where none of them is sound.
    """
    return _newest(run, load_checkpoint, warn)


def newest_folder(run: Path, warn: Warn) -> Path | None:
    """Folder of the newest sound checkpoint, otherwise as `newest_checkpoint`."""

    def checked(folder: Path) -> Path:
        verify(folder)
        return folder

    return _newest(run, checked, warn)


def _newest(run: Path, read: Callable[[Path], T], warn: Warn) -> T | None:
    steps = saved_steps(run)
    for step in reversed(steps):
        folder = run / FOLDER / step_name(step)
        try:
            return read(folder)
        except (BadFileError, OSError) as error:
            warn(f"{folder.name} is damaged and passed over: {error}")
    if steps:
        raise BadFileError(f"{run / FOLDER}: none of the {len(steps)} checkpoints is sound")
    return None


def verify(folder: Path) -> list[str]:
    """Compare a checkpoint's files with its manifest; returns their names.

    BadFileError names the first file that differs.
    """
    if not (folder / MANIFEST).is_file():
        raise BadFileError(f"{folder}: no {MANIFEST}: it was not written to its end")
    files = read_json_file(folder / MANIFEST)
    for name in (CONFIG, MODEL, OPTIMIZER, STATE):
        if name not in files:
            raise BadFileError(f"{folder / MANIFEST}: does not list {name}")
    for name, expected in files.items():
        path = folder / Path(name).name
        if not path.is_file():
            raise BadFileError(f"{path}: missing, though {MANIFEST} lists it")
        found = _digest(path)
        if found != expected:
            raise BadFileError(f"{path}: damaged: {MANIFEST} says {_words(expected)}, found {_words(found)}")
    return list(files)


def prune(run: Path, *, keep: int, also: Collection[int] = ()) -> None:
    """Remove checkpoints except the newest `keep` and the steps in `also`, and what broken writes left."""
    for step in saved_steps(run)[:-keep]:
        if step not in also:
            shutil.rmtree(_set_aside(run / FOLDER / step_name(step)))
    remove_drafts(run)


def remove_drafts(run: Path) -> None:
    """Remove what interrupted writes left behind."""
    for draft in (run / FOLDER).glob("step-*.tmp"):
        shutil.rmtree(draft, ignore_errors=True)


def _set_aside(folder: Path) -> Path:
    """Rename a checkpoint so that it is none any more: half removed, it must not look like a damaged one."""
    aside = folder.with_name(f"{folder.name}.old.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    return folder.rename(aside)


def _below(tensors: Mapping[str, Tensor], kind: str) -> dict[str, Tensor]:
    prefix = f"{kind}/"
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def _digest(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
        return {"bytes": os.fstat(file.fileno()).st_size, "sha256": digest.hexdigest()}


def _words(entry: Any) -> str:
    try:
        return f"{entry['bytes']} bytes, sha256 {entry['sha256'][:12]}"
    except (KeyError, TypeError):
        return str(entry)[:60]
