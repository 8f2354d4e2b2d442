"""Checkpoints of a run, written atomically and verified when they are read.

    RUN/checkpoints/step-00001000/
        config.json  model.safetensors     the model; every tool that reads a model folder reads this one
        optimizer.safetensors              exp_avg/<name> and exp_avg_sq/<name>
        ema.safetensors                    if an average is kept
        state.json                         `Progress`
        manifest.json                      size and sha256 of each file above
    RUN/LAST                               name of the newest checkpoint, for users and scripts

A checkpoint is written as `step-00001000.tmp`, flushed and renamed; then `LAST` is replaced. Reading takes
the newest folder that matches its manifest, and does not use `LAST`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from arm_core.engine.protocol import Array, TrainingState
from arm_core.files.atomic import replace_text, sync_folder, write_text
from arm_core.files.errors import BadFileError
from arm_core.files.model_folder import CONFIG, read_config, write_weights
from arm_core.files.reading import read_json_file
from arm_core.files.safetensors import Tensor, as_tensors, read_tensors, write_tensors
from arm_core.model.checks import Range, check_keys, check_whole, shortened
from arm_core.model.parameters import check_parameters
from arm_core.model.spec import ModelSpec, to_json

FOLDER = "checkpoints"
LAST = "LAST"
MODEL, OPTIMIZER, EMA = "model.safetensors", "optimizer.safetensors", "ema.safetensors"
STATE, MANIFEST = "state.json", "manifest.json"

_NAME = re.compile(r"step-([0-9]{8,15})")
_CHUNK = 1 << 20

Warn = Callable[[str], None]
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Progress of a run: the content of `state.json`."""

    step: int
    """Updates done."""
    position: int
    """Micro-batches consumed, over all processes: the position in the data."""
    recipe: str
    """`arm_core.recipe.recipe.fingerprint` of the recipe in use."""
    engine: dict[str, str]
    """Backend, device, scan implementation and precision that wrote it; any other can resume."""
    losses: tuple[float, ...] = ()
    """Of the steps since the last row in `metrics.jsonl`, so that a resumed run writes the same rows."""
    grad_norms: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The saved state of a run at a step."""

    spec: ModelSpec
    progress: Progress
    state: TrainingState = field(repr=False)
    """In a loaded checkpoint each access reads the array from the file."""
    metadata: dict[str, str] = field(default_factory=dict)
    """Strings kept in the header of `model.safetensors`: `classes` and `eval_transform`, as JSON."""


class StoredArrays(Mapping[str, Array]):
    """float32 arrays of a file, read on access, so that a training state is never held twice."""

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
    """Steps that have a checkpoint folder, intact or not, oldest first; other names are ignored."""
    folder = run / FOLDER
    names = [item.name for item in folder.iterdir() if item.is_dir()] if folder.is_dir() else []
    steps = {name: int(match[1]) for name in names if (match := _NAME.fullmatch(name))}
    return sorted(step for name, step in steps.items() if name == step_name(step))


def save_checkpoint(run: Path, checkpoint: Checkpoint) -> Path:
    """Write a checkpoint, then update `LAST`; returns its folder.

    If this is interrupted at any point (killed, disk full, power failure), earlier checkpoints are unchanged
    and the new one is either complete or ignored. A folder of the same step is replaced. Raises OSError.
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
    """Verify and read a checkpoint; BadFileError (a ValueError) describes what is wrong.

    check: False if another process has just verified it.
    """
    files = verify(folder) if check else [path.name for path in folder.iterdir()]
    spec = read_config(folder)
    model, optimizer = read_tensors(folder / MODEL), read_tensors(folder / OPTIMIZER).tensors
    check_parameters(spec, model.tensors, source=str(folder / MODEL))  # type: ignore[arg-type]  # shapes alone
    stored = {kind: _below(optimizer, kind) for kind in ("exp_avg", "exp_avg_sq")}
    for kind, tensors in stored.items():
        check_parameters(spec, tensors, source=f"{folder / OPTIMIZER}: {kind}", trainable_only=True)  # type: ignore[arg-type]
    stored["ema"] = read_average(folder, spec) if EMA in files else {}
    arrays = {kind: StoredArrays(tensors) for kind, tensors in stored.items()}
    state = TrainingState(parameters=StoredArrays(model.tensors), **arrays)
    values = read_json_file(folder / STATE)
    try:
        progress = _progress(values)
        if _NAME.fullmatch(folder.name) and folder.name != step_name(progress.step):
            raise ValueError(f"found step {progress.step}, expected that of the folder {folder.name}")
    except ValueError as error:
        raise BadFileError(f"{folder / STATE}: {error}") from None
    return Checkpoint(spec=spec, progress=progress, state=state, metadata=model.metadata)


def read_average(folder: Path, spec: ModelSpec) -> dict[str, Tensor]:
    """The moving average of the trainable parameters in a checkpoint that has one."""
    average = read_tensors(folder / EMA).tensors
    check_parameters(spec, average, source=str(folder / EMA), trainable_only=True)  # type: ignore[arg-type]
    return average


def _progress(values: Mapping[str, Any]) -> Progress:
    """`Progress` from `state.json`; ValueError names a missing, unknown or invalid value."""
    names = [item.name for item in fields(Progress)]
    check_keys("", values, names)
    if missing := [name for name in names if name not in values]:
        raise ValueError(f"{missing[0]} is missing")
    check_whole("state", Range(low=0, below=2**63), step=values["step"], position=values["position"])
    if not isinstance(values["recipe"], str):
        raise ValueError(f"recipe: expected a hash, found {shortened(values['recipe'])}")
    engine = values["engine"]
    if not isinstance(engine, dict) or not all(isinstance(word, str) for word in engine.values()):
        raise ValueError(f"engine: expected names and texts, found {shortened(engine)}")
    lists = {}
    for name in ("losses", "grad_norms"):
        if not isinstance(values[name], list) or not all(type(item) in (int, float) for item in values[name]):
            raise ValueError(f"{name}: expected a list of numbers, found {shortened(values[name])}")
        lists[name] = tuple(float(item) for item in values[name])
    return Progress(**{**values, **lists})


def newest_checkpoint(run: Path, warn: Warn) -> Checkpoint | None:
    """The newest intact checkpoint of a run; `warn` is called for each newer one that is corrupt.

    None if no checkpoint was ever written; BadFileError if none of them is intact.
    """
    return _newest(run, load_checkpoint, warn)


def newest_folder(run: Path, warn: Warn) -> Path | None:
    """Folder of the newest intact checkpoint; otherwise like `newest_checkpoint`."""

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
            warn(f"{folder.name} is corrupt; skipped: {error}")
    if steps:
        raise BadFileError(f"{run / FOLDER}: all {len(steps)} checkpoints are corrupt")
    return None


def verify(folder: Path) -> list[str]:
    """Compare the files of a checkpoint with its manifest; returns their names.

    BadFileError names the first file that differs.
    """
    if not (folder / MANIFEST).is_file():
        raise BadFileError(f"{folder}: incomplete; it contains no {MANIFEST}")
    files = read_json_file(folder / MANIFEST)
    for name in (CONFIG, MODEL, OPTIMIZER, STATE):
        if name not in files:
            raise BadFileError(f"{folder / MANIFEST}: does not list {name}")
    for name, expected in files.items():
        path = folder / Path(name).name
        if not path.is_file():
            raise BadFileError(f"{path}: missing, but listed in {MANIFEST}")
        size = path.stat().st_size
        same_size = isinstance(expected, dict) and expected.get("bytes") == size
        found = _digest(path) if same_size else {"bytes": size, "sha256": "not computed"}
        if found != expected:
            raise BadFileError(
                f"{path}: corrupt; {MANIFEST} states {_words(expected)}, found {_words(found)}"
            )
    return list(files)


def prune(run: Path, *, keep: int, also: Collection[int] = ()) -> None:
    """Remove complete checkpoints except the newest `keep` and the steps in `also`, and incomplete writes."""
    complete = [step for step in saved_steps(run) if (run / FOLDER / step_name(step) / MANIFEST).is_file()]
    for step in complete[:-keep]:
        if step not in also:
            shutil.rmtree(_set_aside(run / FOLDER / step_name(step)))
    remove_drafts(run)


def remove_drafts(run: Path) -> None:
    """Remove the remains of interrupted writes."""
    for draft in (run / FOLDER).glob("step-*.tmp"):
        shutil.rmtree(draft, ignore_errors=True)


def _set_aside(folder: Path) -> Path:
    """Rename a checkpoint before it is removed, so that a partly removed one does not look corrupt."""
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
