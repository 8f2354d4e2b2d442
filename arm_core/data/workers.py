"""Making numbered sets of arrays: in this process, or ahead of time in Grain's worker processes.

A `Maker` builds set number k from k alone, so it does not matter who builds it, or when.
"""

from __future__ import annotations

import gc
import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from multiprocessing import connection
from typing import Any, Protocol, Self

import numpy as np
import numpy.typing as npt

Arrays = dict[str, npt.NDArray[Any]]


class Maker(Protocol):
    """Sets of arrays by number; it can be pickled, since each worker process holds a copy."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int) -> Arrays: ...


class Stream:
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
        self._grain: Any = None
        if workers == 0:
            self._sets: Iterator[Arrays] = (maker[k] for k in range(start, len(maker), step))
        else:
            self._grain = _open_workers(maker, slice(start, None, step), workers, prefetch)
            self._sets = _received(self._grain)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Arrays:
        return next(self._sets)

    def close(self) -> None:
        """Stop the workers; nothing can be read afterwards."""
        grain, self._grain, self._sets = self._grain, None, iter(())
        if grain is not None:
            grain.close()
            # Grain's iterators hold their last arrays in reference cycles; at interpreter exit it is
            # too late to give that shared memory back quietly.
            del grain
            gc.collect()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _open_workers(maker: Maker, part: slice, workers: int, prefetch: int) -> Any:
    if find_spec("grain") is None:
        raise ValueError(
            f"{workers} data workers need the package 'grain', which is missing: install it or use 0 workers"
        )
    # Grain remarks through absl that JAX, which nothing here uses, is missing.
    from absl import logging as absl_logging

    absl_logging.set_verbosity(absl_logging.ERROR)
    import grain

    # Slicing before iterating keeps the numbers; Grain's own multi-worker state does not survive a
    # change of the worker count. One thread per process: the processes are the parallelism.
    dataset = grain.MapDataset.source(_Reporting(maker))[part]
    reading = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)
    options = grain.multiprocessing.MultiprocessingOptions(
        num_workers=workers, per_worker_buffer_size=prefetch
    )
    return iter(dataset.to_iter_dataset(reading).mp_prefetch(options, worker_init_fn=_start_worker))


_ERROR = "error"
"""Name of the one array in a set that stands for a ValueError."""


@dataclass(frozen=True)
class _Reporting:
    """A maker whose ValueErrors are sets too: Grain leaks shared memory when a worker raises."""

    maker: Maker

    def __len__(self) -> int:
        return len(self.maker)

    def __getitem__(self, number: int) -> Arrays:
        try:
            return self.maker[number]
        except ValueError as error:
            return {_ERROR: np.array(str(error))}


def _received(grain_iterator: Iterator[Arrays]) -> Iterator[Arrays]:
    with _quiet_children():  # the first call starts the workers
        arrays = next(grain_iterator, None)
    while arrays is not None:
        # Out of shared memory, which is scarce in containers and unmapped behind our back at exit.
        owned = {name: np.array(array) for name, array in arrays.items()}
        del arrays
        if _ERROR in owned:
            raise ValueError(str(owned[_ERROR]))
        yield owned
        arrays = next(grain_iterator, None)


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


def _start_worker(index: int, count: int) -> None:
    """Leave Ctrl-C to the main process, and end with it even where it is killed."""
    logging.disable(logging.NOTSET)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_exit_with, args=(parent.sentinel,), daemon=True).start()


def _exit_with(sentinel: int) -> None:
    connection.wait([sentinel])
    os._exit(1)
