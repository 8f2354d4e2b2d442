"""A run as its files describe it, read without the lock: for lists, comparisons and reports.

A run may be training in another process meanwhile; what is read is a complete state of some moment.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arm_core.files.model_folder import CONFIG, read_config
from arm_core.model.spec import ModelSpec
from arm_core.recipe.recipe import Recipe, load_recipe
from arm_core.training.checkpoint import FOLDER, Warn, saved_steps
from arm_core.training.records import read_rows
from arm_core.training.run_folder import METRICS, RECIPE, SESSIONS

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class RunHistory:
    """The recipe, the records and the saved steps of a run."""

    path: Path
    recipe: Recipe
    spec: ModelSpec | None
    """None if the folder holds only a recipe and metrics."""
    training: tuple[Row, ...]
    """Rows of `metrics.jsonl` with the loss of training steps, in order."""
    evaluations: tuple[Row, ...]
    """Rows of `metrics.jsonl` with the loss of an evaluation, in order."""
    sessions: tuple[Row, ...]
    checkpoints: tuple[int, ...]
    """Steps that have a checkpoint folder, intact or not."""

    @property
    def step(self) -> int:
        """The last step that was logged, evaluated or saved."""
        rows = (*self.training, *self.evaluations)
        return max([row["step"] for row in rows] + list(self.checkpoints), default=0)

    @property
    def total_steps(self) -> int | None:
        """Steps of the whole run; None if no record determines it."""
        for row in reversed(self.sessions):
            if isinstance(steps := row.get("total_steps"), int):
                return steps
        length = self.recipe.training.length
        if length.unit == "steps":
            return int(length.amount)
        # Runs of older versions: from the relation of steps and epochs, which is rounded in the rows.
        last = next((row for row in reversed(self.training) if row.get("epoch")), None)
        return None if last is None else math.floor(length.amount * last["step"] / last["epoch"] + 1e-2)

    @property
    def finished(self) -> bool:
        total = self.total_steps
        return total is not None and self.step >= total

    @property
    def best(self) -> Row | None:
        """The evaluation with the highest score."""
        rows = [row for row in self.evaluations if "score" in row]
        return max(rows, key=lambda row: row["score"], default=None)

    @property
    def parent(self) -> str | None:
        """The recipe from which the run was started: a shipped name or a file; None if not recorded."""
        return next((row["parent"] for row in self.sessions if isinstance(row.get("parent"), str)), None)

    @property
    def hours(self) -> tuple[float, ...]:
        """Hours of training up to each training row, from its rate: evaluations and pauses do not count."""
        found, total, before = [], 0.0, 0
        for row in self.training:
            images = (row["step"] - before) * self.recipe.training.batch_size
            total += images / max(row.get("images_per_s") or 0.0, 1e-9) / 3600
            before = row["step"]
            found.append(total)
        return tuple(found)

    def hours_at(self, step: int) -> float:
        """Hours of training up to a step, between two rows in proportion."""
        before_step, before = 0, 0.0
        for row, hours in zip(self.training, self.hours, strict=True):
            own: int = row["step"]
            if own >= step:
                return before + (step - before_step) / max(own - before_step, 1) * (hours - before)
            before_step, before = own, hours
        return before


def read_history(path: Path, *, warn: Warn) -> RunHistory:
    """Read a run. warn: called once if lines of its records are invalid and skipped.

    Raises ValueError if the folder is not a run, or its recipe is invalid.
    """
    if not (path / RECIPE).is_file():
        what = f"contains no {RECIPE}" if path.is_dir() else "no such folder"
        raise ValueError(f"{path}: {what}; expected the folder of a run")
    rows = read_rows(path / METRICS, warn)
    return RunHistory(
        path=path,
        recipe=load_recipe(path / RECIPE),
        spec=read_config(path) if (path / CONFIG).is_file() else None,
        training=tuple(row for row in rows if "loss" in row),
        evaluations=tuple(row for row in rows if "eval_loss" in row),
        sessions=tuple(read_rows(path / SESSIONS, warn)),
        checkpoints=tuple(saved_steps(path)),
    )


def find_runs(folder: Path) -> Iterator[Path]:
    """Folders of runs in `folder`, itself included, at any depth and sorted; checkpoints are not searched.

    Raises ValueError if there is no such folder.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; expected one that contains runs")
    for place, folders, files in os.walk(folder):
        if RECIPE in files and (FOLDER in folders or METRICS in files):
            yield Path(place)
            folders.clear()
        folders[:] = sorted(name for name in folders if not name.startswith("."))
