"""The folder of a run: its recipe, its model, what happened, and a lock against a second process.

RUN/recipe.toml      the resolved recipe          RUN/metrics.jsonl    one row per logged step
RUN/config.json      the model's spec             RUN/sessions.jsonl   one row per start or resume
RUN/checkpoints/     see `arm_core.training.checkpoint`    RUN/LAST             name of the newest checkpoint
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from arm_core.engine.ranks import ALONE, Ranks, together
from arm_core.files.atomic import append_text, open_in_place, replace_text, sync_folder, write_text
from arm_core.files.model_folder import CONFIG, read_config
from arm_core.model.spec import ModelSpec, to_json
from arm_core.recipe import recipe as recipes
from arm_core.recipe.recipe import Recipe, fingerprint, load_recipe, override
from arm_core.training.checkpoint import (
    FOLDER,
    LAST,
    Checkpoint,
    Warn,
    load_checkpoint,
    newest_checkpoint,
    remove_drafts,
    saved_steps,
    step_name,
)

RECIPE, METRICS, SESSIONS, LOCK = "recipe.toml", "metrics.jsonl", "sessions.jsonl", ".lock"
_OURS = {RECIPE, CONFIG, METRICS, SESSIONS, LOCK, FOLDER, LAST}


class RunFolder:
    """An open run; close it, or use it in a `with` statement, to let another process have it.

    `resumed` is the checkpoint to resume from, None in a new run: create the engine with its state.
    `overrides` are the changes to the recipe that this session made.

    In a job of several processes rank 0 holds the lock and writes; the others, without a lock, only read,
    and what would write does nothing.
    """

    def __init__(
        self,
        path: Path,
        recipe: Recipe,
        spec: ModelSpec,
        lock: int | None,
        *,
        resumed: Checkpoint | None = None,
        overrides: Sequence[str] = (),
    ) -> None:
        self.path, self.recipe, self.spec = path, recipe, spec
        self.resumed, self.overrides = resumed, tuple(overrides)
        self._lock, self._writes = lock, lock is not None

    @property
    def resume_command(self) -> str:
        """What a user types to go on with this run."""
        return f"arm {self.recipe.stage} --resume {self.path}"

    def append_metrics(self, row: dict[str, Any]) -> None:
        """Add a row to `metrics.jsonl`."""
        self._append(self.path / METRICS, row)

    def metrics(self) -> list[dict[str, Any]]:
        """All rows so far."""
        return read_rows(self.path / METRICS)

    def truncate_metrics(self, step: int) -> None:
        """Drop rows later than `step`, which training is about to write again."""
        if not self._writes:
            return
        rows = [row for row in self.metrics() if row["step"] <= step]
        replace_text(self.path / METRICS, "".join(json.dumps(row) + "\n" for row in rows))

    def record_session(self, record: dict[str, Any]) -> None:
        """Add a row to `sessions.jsonl`: who goes on from where."""
        self._append(self.path / SESSIONS, record)

    def _append(self, path: Path, row: dict[str, Any]) -> None:
        if self._writes:
            append_text(path, json.dumps(row) + "\n")

    def close(self) -> None:
        """Release the lock."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def start_run(path: Path | str, recipe: Recipe, spec: ModelSpec, *, ranks: Ranks = ALONE) -> RunFolder:
    """Begin a run in a new or empty folder, or in one whose run never came to a checkpoint.

    spec: the recipe's model, with the number of classes that the data has.
    ranks: the job that trains; all of it calls this together, and sees the same folder.
    Raises ValueError where the folder holds a run or anything else, or is in use.
    """
    folder, lock = Path(path), None
    with together(ranks):
        if ranks.rank == 0:
            lock = _start(folder, recipe, spec)
    return RunFolder(folder, recipe, spec, lock)


def _start(folder: Path, recipe: Recipe, spec: ModelSpec) -> int:
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: is a file; a run needs a folder of its own")
    if saved_steps(folder):
        raise ValueError(
            f"{folder}: a run is there already; go on with `arm {recipe.stage} --resume {folder}`, "
            "or choose another folder"
        )
    if folder.exists() and (foreign := sorted(_others(folder))):
        raise ValueError(f"{folder}: not empty (it holds {foreign[0]!r}); a run needs a folder of its own")
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder) as lock:
        for name in (METRICS, SESSIONS, LAST):
            (folder / name).unlink(missing_ok=True)
        remove_drafts(folder)
        write_text(folder / CONFIG, json.dumps(to_json(spec), indent=2) + "\n")
        replace_text(folder / RECIPE, recipes.to_toml(recipe))
        sync_folder(folder)
    return lock


def resume_run(
    path: Path | str, overrides: Sequence[str] = (), *, warn: Warn, ranks: Ranks = ALONE
) -> RunFolder:
    """Open a run to go on with it, from its newest sound checkpoint.

    overrides: changes to the recipe from here on (`arm_core.recipe.recipe`), kept in the run; the model,
    the seed and the make-up of the batches stay, since the position in the data counts in them.
    warn: is told of damaged checkpoints, and of a recipe that is not the newest checkpoint's.
    ranks: the job that trains; all of it calls this together, and sees the same folder.
    Raises ValueError where there is no run, none of its checkpoints is sound, or it is in use.
    """
    folder = Path(path)
    run: RunFolder | None = None
    with together(ranks):
        if ranks.rank == 0:
            run = _resume(folder, overrides, warn)
    if ranks.world == 1:
        assert run is not None
        return run
    # Rank 0 has checked the files; the others read those that it chose.
    chosen = None if run is None or run.resumed is None else run.resumed.progress.step
    step = next(found for found in ranks.gather(chosen) if found is not None)
    with together(ranks):
        if run is None:
            recipe, spec = load_recipe(folder / RECIPE), read_config(folder)
            checkpoint = load_checkpoint(folder / FOLDER / step_name(step), check=False)
            run = RunFolder(folder, recipe, spec, None, resumed=checkpoint, overrides=overrides)
    return run


def _resume(folder: Path, overrides: Sequence[str], warn: Warn) -> RunFolder:
    if not (folder / RECIPE).is_file():
        what = f"holds no {RECIPE}" if folder.is_dir() else "no such folder"
        raise ValueError(f"{folder}: {what}; expected the folder of a run")
    with _locked(folder) as lock:
        spec, stored = read_config(folder), load_recipe(folder / RECIPE)
        checkpoint = newest_checkpoint(folder, warn)
        if checkpoint is None:
            raise ValueError(f"{folder}: this run has no checkpoint yet; start it again in the same folder")
        if checkpoint.spec != spec:
            raise ValueError(f"{folder}: {CONFIG} and the checkpoints describe different models")
        if fingerprint(stored) != checkpoint.progress.recipe:
            warn(f"{folder / RECIPE} was changed since step {checkpoint.progress.step} was saved")
        recipe = override(stored, overrides)
        _check_same_run(stored, recipe)
        if recipe != stored:
            replace_text(folder / RECIPE, recipes.to_toml(recipe))
        remove_drafts(folder)
    return RunFolder(folder, recipe, spec, lock, resumed=checkpoint, overrides=overrides)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a `.jsonl` file; a last line that was cut off is left out."""
    if not path.exists():
        return []
    lines = path.read_text("utf-8").split("\n")
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines[:-1], 1):  # a whole line ends in a newline
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not valid JSON ({error})") from None
    return rows


def _check_same_run(stored: Recipe, recipe: Recipe) -> None:
    before, after = _fixed(stored), _fixed(recipe)
    if changed := [name for name in before if before[name] != after[name]]:
        raise ValueError(f"{', '.join(changed)} cannot change within a run; start a new one")


def _fixed(recipe: Recipe) -> dict[str, Any]:
    """Settings that stay for the whole run."""
    training = recipe.training
    return {
        "model": recipe.model,
        "training.seed": training.seed,
        "training.batch_size": training.batch_size,
        "training.accumulation": training.accumulation,
    }


def _others(folder: Path) -> list[str]:
    return [item.name for item in folder.iterdir() if item.name.removesuffix(".tmp") not in _OURS]


@contextmanager
def _locked(folder: Path) -> Iterator[int]:
    """Lock the run for this process; the block's success keeps the lock, an error gives it back.

    The system releases it however the process ends.
    """
    descriptor = open_in_place(folder / LOCK, os.O_RDWR)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 32).decode(errors="replace").strip()
            raise ValueError(f"{folder}: in use by another process ({holder or 'unknown'})") from None
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"pid {os.getpid()}\n".encode())
        yield descriptor
    except BaseException:
        os.close(descriptor)
        raise
