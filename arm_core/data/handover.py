"""Handing arrays from worker processes to the one that trains: through short-lived files.

Shared memory would do as well, but what is on its way when a run stops stays behind until the
interpreter complains at exit, and where little of it is granted (containers) a full one kills the
process. Files in memory (`/dev/shm`) or in the temporary folder are as fast, fail with an error that
names them, and go with their folder.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Arrays = dict[str, npt.NDArray[Any]]

PREFIX, LOCK = "arm-batches-", "lock"
"""Names of the folders, and of the file in each that its owner keeps locked."""

MEMORY_FILES = Path("/dev/shm")
ROOM = 4 * 2**30
"""Free bytes that memory files must offer; with less, batches go through the temporary folder."""


class Maker(Protocol):
    """Sets of arrays by number; it can be pickled, since each worker process holds a copy."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int) -> Arrays: ...


@dataclass(frozen=True)
class Parcel:
    """A set of arrays on its way."""

    path: Path
    names: tuple[str, ...]

    def open(self) -> Arrays:
        """The arrays; the file is gone afterwards."""
        with self.path.open("rb") as file:
            arrays = {name: np.load(file) for name in self.names}
        self.path.unlink()
        return arrays


@dataclass(frozen=True)
class Parcels:
    """A maker's sets as parcels in a folder; worker processes index it."""

    maker: Maker
    folder: Path

    def __len__(self) -> int:
        return len(self.maker)

    def __getitem__(self, number: int) -> Parcel:
        path = self.folder / f"{number}.npy"
        try:
            arrays = self.maker[number]
            with path.open("wb") as file:
                for array in arrays.values():
                    np.save(file, array, allow_pickle=False)
        except OSError as error:
            reason = error.strerror or error
            advice = "lower the batch size or the number of workers, or let TMPDIR name a larger disk"
            raise ValueError(f"{self.folder}: cannot hold prepared batches ({reason}); {advice}") from error
        return Parcel(path, tuple(arrays))


class Folder:
    """A new folder for parcels, in memory where there is room, until `remove`.

    Its owner holds a lock in it. Folders whose lock is free belong to processes that were killed
    together with all their workers; the next one to open a folder removes them.
    """

    def __init__(self) -> None:
        in_memory = MEMORY_FILES.is_dir() and os.access(MEMORY_FILES, os.W_OK)
        in_memory = in_memory and shutil.disk_usage(MEMORY_FILES).free >= ROOM
        place = MEMORY_FILES if in_memory else Path(tempfile.gettempdir())
        for left_behind in place.glob(f"{PREFIX}*"):
            if _is_unlocked(left_behind / LOCK):
                remove_folder(left_behind)
        self.path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=place))
        self._lock = (self.path / "new").open("wb")
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        (self.path / "new").rename(self.path / LOCK)  # locked before anyone can look for it

    def remove(self) -> None:
        remove_folder(self.path)
        self._lock.close()


def _is_unlocked(path: Path) -> bool:
    try:
        with path.open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # locked, of another user, or gone meanwhile
        return False
    return True


def remove_folder(folder: Path) -> None:
    """Remove it with what is in it; already gone, or still written to by a worker that ends, is fine."""
    shutil.rmtree(folder, ignore_errors=True)
