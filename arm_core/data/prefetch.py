"""Making numbered sets of arrays: in this process, or ahead of time in Grain's worker processes.

A `Maker` builds set number k from k alone, so it does not matter who builds it, or when.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from multiprocessing import connection
from pathlib import Path
from typing import Any, Self

from arm_core.data.handover import Arrays, Folder, Maker, Parcel, Parcels, remove_folder


class Prefetcher:
    """Sets `start`, `start + step`, ... of a maker, in order; close it, or use it in a `with` statement.

    workers:   processes that make them; 0 makes each in this process, when it is asked for. Processes
               are spawned, so a script that uses them needs the `if __name__ == "__main__"` guard.
    prefetch:  finished sets that each worker process keeps ready.

    A ValueError of the maker reaches the caller of `next` as it is, from workers as well.
    """

    def __init__(
        self, maker: Maker, *, start: int = 0, step: int = 1, workers: int = 0, prefetch: int = 2
    ) -> None:
        if min(start, workers) < 0 or min(step, prefetch) < 1:
            raise ValueError(
                f"data: expected start and workers of 0 or more, step and prefetch of 1 or more; "
                f"found start={start}, workers={workers}, step={step}, prefetch={prefetch}"
            )
        self._close: Callable[[], object] = _nothing
        if workers == 0:
            self._sets: Iterator[Arrays] = (maker[k] for k in range(start, len(maker), step))
        else:
            team = _Workers(maker, slice(start, None, step), workers, prefetch)
            self._sets = iter(team)
            self._close = weakref.finalize(
                self, team.close
            )  # also where nobody closes, before the interpreter ends

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Arrays:
        return next(self._sets)

    def close(self) -> None:
        """Stop the workers; nothing can be read afterwards."""
        self._close()
        self._sets = iter(())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _nothing() -> None:
    pass


class _Workers:
    """Grain's worker processes, and the folder through which they hand over what they make."""

    def __init__(self, maker: Maker, part: slice, workers: int, prefetch: int) -> None:
        if find_spec("grain") is None:
            raise ValueError(f"{workers} data workers need the package 'grain': install it, or use 0 workers")
        # Grain remarks through absl that JAX, which nothing here uses, is missing.
        from absl import logging as absl_logging

        absl_logging.set_verbosity(absl_logging.ERROR)
        import grain

        self._folder = Folder()
        # Slicing before iterating keeps the numbers; Grain's own multi-worker state does not survive a
        # change of the worker count. One thread per process: the processes are the parallelism.
        dataset = grain.MapDataset.source(Parcels(maker, self._folder.path))[part]
        reading = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)
        options = grain.multiprocessing.MultiprocessingOptions(
            num_workers=workers, per_worker_buffer_size=prefetch
        )
        start_worker = partial(_start_worker, self._folder.path)
        self._parcels: Any = iter(
            dataset.to_iter_dataset(reading).mp_prefetch(options, worker_init_fn=start_worker)
        )

    def __iter__(self) -> Iterator[Arrays]:
        with _quiet_children():  # the first call starts the processes
            parcel: Parcel | None = next(self._parcels, None)
        while parcel is not None:
            yield parcel.open()
            parcel = next(self._parcels, None)

    def close(self) -> None:
        parcels, self._parcels = self._parcels, iter(())
        parcels.close()
        self._folder.remove()


class _LoggingOff:
    """Switches warnings off where it is unpickled."""

    def __reduce__(self) -> tuple[Callable[[int], None], tuple[int]]:
        return logging.disable, (logging.WARNING,)


@contextmanager
def _quiet_children() -> Iterator[None]:
    """Spawned children import Grain before any of our code runs; keep each from remarking about JAX.

    A child unpickles the configuration that it inherits first of all; `_start_worker` undoes this.
    """
    config = multiprocessing.current_process()._config  # type: ignore[attr-defined]
    config["arm_core.logging"] = _LoggingOff()
    try:
        yield
    finally:
        del config["arm_core.logging"]


def _start_worker(folder: Path, index: int, count: int) -> None:
    """Leave signals to the main process, which may want more batches; end with it even where it is killed."""
    logging.disable(logging.NOTSET)
    for name in (signal.SIGINT, signal.SIGTERM):  # sent to the whole group by Ctrl-C and by schedulers
        signal.signal(name, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent.sentinel, folder), daemon=True).start()


def _end_with(sentinel: int, folder: Path) -> None:
    connection.wait([sentinel])
    remove_folder(folder)
    os._exit(1)
