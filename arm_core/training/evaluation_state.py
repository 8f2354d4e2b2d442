"""The results of an unfinished evaluation, kept in a small file, so that a repeated call continues there."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from arm_core.engine.protocol import Array
from arm_core.engine.ranks import Ranks
from arm_core.files.atomic import replace_text
from arm_core.files.reading import read_json_file
from arm_core.training.evaluation import BatchSums
from arm_core.training.predictions import Row

SAVE_EVERY = 30.0
"""Seconds between two writes of the file."""


def state_folder() -> Path:
    """`$XDG_CACHE_HOME/arm-vision/evaluations`, by default below `~/.cache`."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "arm-vision" / "evaluations"


def model_key(parameters: Mapping[str, Array]) -> str:
    """A hash of a model's values."""
    found = hashlib.sha256()
    for name in sorted(parameters):
        array = parameters[name]
        found.update(f"{name} {array.shape}\n".encode())
        found.update(np.ascontiguousarray(array).data)
    return found.hexdigest()


class EvaluationState:
    """The finished batches of this rank: what `evaluate` sums, and the prediction for each image.

    key: JSON values that determine the result (model, data, protocol, number of ranks); another key means
    another file. All ranks create it at the same point, and continue at the same batch.
    """

    def __init__(self, key: Mapping[str, Any], ranks: Ranks, folder: Path | None = None) -> None:
        name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
        self._path = (folder or state_folder()) / f"{name}-{ranks.rank}.json"
        self.sums: list[BatchSums] = []
        """One entry per batch; `evaluate` appends to it."""
        self.rows: list[Row] = []
        """One entry per image of a classifier; `Collector` appends to it."""
        self._consistent, self._saved = (0, 0), time.monotonic()
        self._read()
        shared = min(ranks.gather(len(self.sums)))
        images = sum(int(batch[0]) for batch in self.sums[:shared])
        del self.sums[shared:], self.rows[images:]
        self.note()

    def note(self) -> None:
        """Call after each batch: `sums` and `rows` belong together now. Writes the file if it is due."""
        self._consistent = len(self.sums), len(self.rows)
        if time.monotonic() - self._saved > SAVE_EVERY:
            self.save()

    def save(self) -> None:
        """Write the file. A folder that cannot be written only costs the chance to resume."""
        batches, images = self._consistent
        if not batches:
            return
        text = json.dumps({"sums": self.sums[:batches], "rows": self.rows[:images]})
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            replace_text(self._path, text)
        except OSError:
            return
        finally:
            self._saved = time.monotonic()

    def remove(self) -> None:
        """Delete the file, after the last batch."""
        with suppress(OSError):
            self._path.unlink()

    def _read(self) -> None:
        """Read the file; one that is missing or damaged is ignored."""
        try:
            found = read_json_file(self._path)
            sums = [(int(n), int(top1), int(top5), float(loss)) for n, top1, top5, loss in found["sums"]]
            rows = [(int(i), int(label), int(p), float(c)) for i, label, p, c in found["rows"]]
        except (OSError, ValueError, KeyError, TypeError):
            return
        if rows and len(rows) != sum(batch[0] for batch in sums):
            return
        self.sums, self.rows = sums, rows
