"""The folder of a run: recipe, model, records, checkpoints, and a lock against a second process.

RUN/recipe.toml      the resolved recipe          RUN/metrics.jsonl    one row per logged step
RUN/config.json      the model's spec             RUN/sessions.jsonl   one row per start or resume
RUN/data.json        see `arm_core.training.data_record`    RUN/report.html      written by `arm report`
RUN/checkpoints/     see `arm_core.training.checkpoint`    RUN/LAST             name of the newest checkpoint
"""

from __future__ import annotations

import fcntl
import json
import os
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from arm_core.data.opening import absolute
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
from arm_core.training.records import cut_torn_line, ignore, read_rows

RECIPE, METRICS, SESSIONS, LOCK = "recipe.toml", "metrics.jsonl", "sessions.jsonl", ".lock"
DATA, REPORT = "data.json", "report.html"
TRACKERS = ("tensorboard", "wandb")
"""Folders of programs that show curves."""
_OURS = {RECIPE, CONFIG, METRICS, SESSIONS, DATA, LOCK, FOLDER, LAST, REPORT, *TRACKERS}


class RunFolder:
    """An open run; close it, or use it in a `with` statement, to release it for other processes.

    `resumed` is the checkpoint to resume from, None in a new run: create the engine with its state.
    `overrides` are the changes to the recipe that this session made.

    In a job of several processes, rank 0 holds the lock and writes; on other ranks methods that write do
    nothing.
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
        self.command: str | None = None
        """The command line of this session, for its record."""
        self.parent: str | None = None
        """The recipe from which a new run was started, for the record of its first session."""
        self._lock, self.writes = lock, lock is not None

    @property
    def resume_command(self) -> str:
        """The shell command that resumes this run."""
        return resume_command(self.recipe.stage, self.path)

    def append_metrics(self, row: dict[str, Any]) -> None:
        """Add a row to `metrics.jsonl`."""
        self._append(self.path / METRICS, row)

    def metrics(self) -> list[dict[str, Any]]:
        """All rows so far; invalid lines are skipped."""
        return read_rows(self.path / METRICS, ignore)

    def truncate_metrics(self, step: int) -> None:
        """Remove rows later than `step`, which training will write again."""
        if not self.writes:
            return
        rows = [row for row in self.metrics() if row["step"] <= step]
        replace_text(self.path / METRICS, "".join(json.dumps(row) + "\n" for row in rows))

    def record_session(self, record: dict[str, Any]) -> None:
        """Add a row to `sessions.jsonl`: what resumes the run, and at which step."""
        if self.writes:
            cut_torn_line(self.path / SESSIONS)
        named = {"parent": self.parent, "command": self.command}
        self._append(self.path / SESSIONS, record | {name: text for name, text in named.items() if text})

    def _append(self, path: Path, row: dict[str, Any]) -> None:
        if self.writes:
            if not self.path.is_dir():
                raise OSError(f"{self.path}: the run was deleted during training")
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


def start_run(
    path: Path | str,
    recipe: Recipe,
    spec: ModelSpec,
    *,
    overrides: Sequence[str] = (),
    ranks: Ranks = ALONE,
) -> RunFolder:
    """Start a run in a new or empty folder, or in one whose run has no checkpoint.

    spec: the recipe's model, with the number of classes in the data.
    overrides: changes that the recipe already contains, for the record of the session.
    ranks: the job that trains; all ranks call this together, and see the same folder.
    The data paths of the recipe become absolute, so that the run can be resumed from any folder.
    Raises ValueError if the folder contains a run or other files, or is in use.
    """
    folder, lock, recipe = Path(path), None, with_absolute_paths(recipe)
    with together(ranks):
        if ranks.rank == 0:
            lock = _start(folder, recipe, spec)
    return RunFolder(folder, recipe, spec, lock, overrides=overrides)


def _start(folder: Path, recipe: Recipe, spec: ModelSpec) -> int:
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: is a file; expected a new or empty folder for the run")
    if saved_steps(folder):
        raise ValueError(
            f"{folder}: already contains a run; resume it with `{resume_command(recipe.stage, folder)}`, "
            "or choose another folder"
        )
    if folder.exists() and (foreign := sorted(_others(folder))):
        raise ValueError(f"{folder}: not empty (contains {foreign[0]!r}); expected a new or empty folder")
    text = _encodable(recipes.to_toml(recipe))  # before the folder is created
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder) as lock:
        for name in (METRICS, SESSIONS, DATA, LAST):
            (folder / name).unlink(missing_ok=True)
        remove_drafts(folder)
        write_text(folder / CONFIG, json.dumps(to_json(spec), indent=2) + "\n")
        replace_text(folder / RECIPE, text)
        sync_folder(folder)
    return lock


def resume_run(
    path: Path | str, overrides: Sequence[str] = (), *, warn: Warn, ranks: Ranks = ALONE
) -> RunFolder:
    """Open a run to resume it from its newest intact checkpoint.

    overrides: changes to the recipe from here on (`arm_core.recipe.recipe`), stored in the run. The model,
    the seed and the composition of batches cannot change, since the position in the data depends on them.
    warn: called for corrupt checkpoints, invalid lines of metrics, and a recipe that differs from that of
    the newest checkpoint.
    ranks: the job that trains; all ranks call this together, and see the same folder.
    Raises ValueError if there is no run, none of its checkpoints is intact, or it is in use.
    """
    folder = Path(path)
    run: RunFolder | None = None
    with together(ranks):
        if ranks.rank == 0:
            run = _resume(folder, overrides, warn)
    if ranks.world == 1:
        assert run is not None
        return run
    # Rank 0 has verified the checkpoint; the other ranks load the same one.
    chosen = None if run is None or run.resumed is None else run.resumed.progress.step
    step = next(found for found in ranks.gather(chosen) if found is not None)
    with together(ranks):
        if run is None:
            recipe, spec = load_recipe(folder / RECIPE), read_config(folder)
            checkpoint = load_checkpoint(folder / FOLDER / step_name(step), check=False)
            run = RunFolder(folder, recipe, spec, None, resumed=checkpoint, overrides=overrides)
    return run


def _resume(folder: Path, overrides: Sequence[str], warn: Warn) -> RunFolder:
    if not (folder / RECIPE).exists():
        what = f"contains no {RECIPE}" if folder.is_dir() else "no such folder"
        raise ValueError(f"{folder}: {what}; expected the folder of a run")
    with _locked(folder) as lock:
        spec, stored = read_config(folder), load_recipe(folder / RECIPE)
        checkpoint = newest_checkpoint(folder, warn)
        if checkpoint is None:
            raise ValueError(f"{folder}: this run has no checkpoint; start it again in the same folder")
        if checkpoint.spec != spec:
            raise ValueError(f"{folder}: {CONFIG} and the checkpoints describe different models")
        if fingerprint(stored) != checkpoint.progress.recipe:
            warn(f"{folder / RECIPE} was changed after step {checkpoint.progress.step} was saved")
        read_rows(folder / METRICS, warn)
        recipe = with_absolute_paths(override(stored, overrides))
        _check_same_run(stored, recipe)
        if recipe != stored:
            replace_text(folder / RECIPE, _encodable(recipes.to_toml(recipe)))
        remove_drafts(folder)
    return RunFolder(folder, recipe, spec, lock, resumed=checkpoint, overrides=overrides)


def read_run(folder: Path, overrides: Sequence[str], *, warn: Warn) -> tuple[Recipe, Checkpoint]:
    """The recipe with changes, and the newest intact checkpoint, of a run that is not opened or changed.

    The arguments and errors of `resume_run`; the run may be in use.
    """
    if not (folder / RECIPE).exists():
        what = f"contains no {RECIPE}" if folder.is_dir() else "no such folder"
        raise ValueError(f"{folder}: {what}; expected the folder of a run")
    stored, checkpoint = load_recipe(folder / RECIPE), newest_checkpoint(folder, warn)
    if checkpoint is None:
        raise ValueError(f"{folder}: this run has no checkpoint; start it again in the same folder")
    recipe = with_absolute_paths(override(stored, overrides))
    _check_same_run(stored, recipe)
    return recipe, checkpoint


def resume_command(stage: str, folder: Path | str) -> str:
    """The shell command that resumes the run in `folder`."""
    return f"arm {stage} --resume {shlex.quote(str(folder))}"


def with_absolute_paths(recipe: Recipe) -> Recipe:
    """The recipe with data paths that do not depend on the working directory."""
    paths = {name: getattr(recipe.data, name) for name in ("path", "eval_path")}
    named: dict[str, Any] = {name: absolute(path) for name, path in paths.items() if path is not None}
    return replace(recipe, data=replace(recipe.data, **named))


def _encodable(text: str) -> str:
    """The text, if it can be written as UTF-8. Some paths cannot if the locale is not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        line = text[: error.start].count("\n")
        key = text.splitlines()[line].partition(" ")[0]
        raise ValueError(
            f"{key}: a path with characters that this locale cannot represent; set LC_ALL=C.UTF-8"
        ) from None
    return text


def _check_same_run(stored: Recipe, recipe: Recipe) -> None:
    before, after = _fixed(stored), _fixed(recipe)
    if changed := [name for name in before if before[name] != after[name]]:
        raise ValueError(f"{', '.join(changed)} cannot change within a run; start a new run")


def _fixed(recipe: Recipe) -> dict[str, Any]:
    """Settings that cannot change within a run."""
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
    """Lock the run for this process; an error in the block releases the lock.

    The operating system releases it when the process ends, in any way.
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
