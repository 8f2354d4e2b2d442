"""Makes numbered batches, on request or ahead of time in threads.

A `Maker` builds batch number k only from k, so any thread can build it at any time. Pillow and NumPy release
the interpreter lock while they decode, resize and compute; docs/performance.md has the figures.
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, Protocol, Self, TypeVar

B = TypeVar("B")
B_co = TypeVar("B_co", covariant=True)


class Maker(Protocol[B_co]):
    """Batches by number; several threads may call it at the same time."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int) -> B_co: ...


class Prefetcher(Generic[B]):
    """Batches `start`, `start + step`, ... of a maker, in order; close it, or use it in a `with` statement.

    workers:   threads that make them; 0 makes each in the caller's thread, on request.
    prefetch:  batches that each thread makes ahead, including the current one.

    An error of the maker is raised unchanged by the `next` call for its batch.
    """

    def __init__(
        self, maker: Maker[B], *, start: int = 0, step: int = 1, workers: int = 0, prefetch: int = 2
    ) -> None:
        if min(start, workers) < 0 or min(step, prefetch) < 1:
            raise ValueError(
                f"data: expected start and workers of 0 or more, step and prefetch of 1 or more; "
                f"found start={start}, workers={workers}, step={step}, prefetch={prefetch}"
            )
        self._numbers = iter(range(start, len(maker), step))
        self._threads = ThreadPoolExecutor(workers, "arm-data") if workers else None
        self._pending: deque[Future[B]] = deque()
        self._maker, self._ahead = maker, workers * prefetch

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> B:
        if self._threads is None:
            return self._maker[next(self._numbers)]
        self._fill()
        if not self._pending:
            raise StopIteration
        batch = self._pending.popleft().result()
        self._fill()  # before the caller works on this batch
        return batch

    def _fill(self) -> None:
        assert self._threads is not None
        while len(self._pending) < self._ahead and (number := next(self._numbers, None)) is not None:
            self._pending.append(self._threads.submit(self._maker.__getitem__, number))

    def close(self) -> None:
        """Stop the threads, each after its current batch; nothing can be read afterwards."""
        self._numbers = iter(range(0))
        self._pending.clear()
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
