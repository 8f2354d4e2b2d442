"""Reading and repairing the rows of `metrics.jsonl` and `sessions.jsonl`."""

from __future__ import annotations

import json
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

from arm_core.files.atomic import open_in_place
from arm_core.files.reading import read_bounded
from arm_core.model.checks import shortened
from arm_core.training.checkpoint import Warn

NUMBERS = ("epoch", "lr", "loss", "grad_norm", "images_per_s", "score", "eval_loss", "ema_loss")
"""Keys of a row whose values are numbers."""
MAX_LINE, MAX_ROWS = 2**20, 2**30
"""Bytes of a row and of a file of rows; longer ones are not written."""


def read_rows(path: Path, warn: Warn | None = None) -> list[dict[str, Any]]:
    """The rows of `metrics.jsonl` or `sessions.jsonl`; an incomplete last line is omitted.

    warn: called once if lines are not rows; they are skipped. Without it they raise ValueError.
    """
    if not path.exists():
        return []
    lines = read_bounded(path, MAX_ROWS).decode(errors="replace").split("\n")
    rows: list[dict[str, Any]] = []
    problems: list[str] = []
    for number, line in enumerate(lines[:-1], 1):  # a complete line ends in a newline
        try:
            rows.append(_row(line))
        except ValueError as error:
            problems.append(f"{path}, line {number}: {error}")
    if problems and warn is None:
        raise ValueError(problems[0])
    if problems and warn is not None:
        more = f" and {len(problems) - 1} more lines" if len(problems) > 1 else ""
        warn(f"{problems[0]}{more}; skipped")
    return rows


def _row(line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        raise ValueError(f"not valid JSON: {shortened(line)}") from None
    if not isinstance(row, dict) or not isinstance(row.get("step"), int) or isinstance(row["step"], bool):
        raise ValueError(f"expected an object with a whole number 'step', found {shortened(line)}")
    wrong = [name for name in NUMBERS if not isinstance(row.get(name, 0.0), int | float)]
    if wrong:
        raise ValueError(f"{wrong[0]}: expected a number, found {shortened(row[wrong[0]])}")
    return row


def cut_torn_line(path: Path) -> None:
    """Remove an incomplete last line, which a killed process left."""
    if not path.exists():
        return
    with os.fdopen(open_in_place(path, os.O_RDWR), "rb+") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - MAX_LINE))
        tail = file.read()
        if tail and not tail.endswith(b"\n"):
            file.truncate(size - len(tail) + tail.rfind(b"\n") + 1)


def environment() -> dict[str, str]:
    """This package's version, Python and the machine, for the record of a session."""
    try:
        version = metadata.version("arm-vision")
    except metadata.PackageNotFoundError:  # a checkout that is not installed
        version = "not installed"
    machine = f"{platform.system()} {platform.machine()}, {os.cpu_count() or 1} CPU cores"
    return {"arm_vision": version, "python": platform.python_version(), "machine": machine}


def ignore(sentence: str) -> None:
    """A `warn` for readers that do not report."""
