"""Several processes that train one model: the job, from the view of one process.

A launcher (`torchrun`, `mlx.launch`) starts the same command several times; each process has a *rank*.
A backend's `join` returns its `Ranks`. Engines exchange tensors; this module exchanges small values: a
received signal, a decision of rank 0, the number of images that each rank has evaluated.

All ranks run the same steps. Only rank 0 writes files and prints. A decision that depends on the disk, the
clock or a signal is made by one rank and sent to all; otherwise ranks would wait for each other forever.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

T = TypeVar("T")

PACE = 1.0
"""Seconds between two exchanges of received signals; each takes a round trip."""


class Ranks(Protocol):
    """The job, from the view of one of its processes."""

    @property
    def rank(self) -> int:
        """Index of this process, from 0."""

    @property
    def world(self) -> int:
        """Processes in the job."""

    @property
    def restarts(self) -> int:
        """The number of times that the launcher has restarted the job after a failure."""

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, in rank order; every rank calls this at the same point.

        value: small, of types that JSON supports.  Waits for the slowest rank.
        Raises PeerFailed if another process has ended, or if its message is invalid.
        """

    def close(self) -> None:
        """Leave the job, once every rank has finished."""


@dataclass(frozen=True)
class Alone:
    """A job of one process."""

    rank: int = 0
    world: int = 1
    restarts: int = 0

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def close(self) -> None:
        pass


ALONE = Alone()


class PeerFailed(RuntimeError):  # noqa: N818
    """Another process of the job has ended, so this one cannot continue."""


class FailedElsewhere(Exception):  # noqa: N818
    """Another rank had an error, which rank 0 reports."""


def title(ranks: Ranks) -> str:
    """`process 2 of 4`."""
    return f"process {ranks.rank + 1} of {ranks.world}"


@contextmanager
def together(ranks: Ranks) -> Iterator[None]:
    """All ranks run the block and leave it together: an error on one rank is an error on all.

    The block must not exchange values itself. Rank 0 raises its own error, or a ValueError with the message
    of the first rank that failed; every other rank raises FailedElsewhere.
    """
    if ranks.world == 1:
        yield
        return
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    words = None if error is None else str(error) or type(error).__name__
    failed = [(r, found) for r, found in enumerate(ranks.gather(words)) if found is not None]
    if not failed:
        return
    if ranks.rank != 0:
        raise FailedElsewhere(failed[0][1]) from error
    if error is not None:
        raise error
    raise ValueError(f"process {failed[0][0] + 1} of {ranks.world}: {failed[0][1]}")


def lead(ranks: Ranks, work: Callable[[], T]) -> T:
    """Run `work` on rank 0 only, and return its result on every rank.

    The result must be of types that JSON supports. Rank 0 raises an error of `work`, the others
    FailedElsewhere.
    """
    result: list[T] = []
    with together(ranks):
        if ranks.rank == 0:
            result = [work()]
    return result[0] if ranks.world == 1 else next(v[0] for v in ranks.gather(result) if v)


def confirm(ranks: Ranks, value: int) -> None:
    """Check that every rank answers, with the same value; PeerFailed otherwise.

    For use before rank 0 writes a result to which all ranks contributed: data from a lost rank may be wrong.
    """
    if (found := ranks.gather(value)) != [value] * ranks.world:
        raise PeerFailed(f"another process of the job has ended (expected {value} from all, found {found})")


def agree(ranks: Ranks, value: T | None) -> T | None:
    """The first value that is not None, in rank order."""
    return next((found for found in ranks.gather(value) if found is not None), None)


class StopTogether:
    """A common decision of all ranks to stop, from the signals that each of them has received.

    noted: name of the signal that this process received, or None.
    The ranks exchange them in the same calls, about every `PACE` seconds by the clock of rank 0.
    """

    def __init__(self, ranks: Ranks, noted: Callable[[], str | None]) -> None:
        self._ranks, self._noted = ranks, noted
        self.signal: str | None = None
        """Name of the signal that stops all ranks."""
        self._calls, self._next = 0, 1
        self._asked = time.monotonic()

    def asked(self) -> bool:
        """Whether all ranks should stop; every rank calls it at the same points."""
        if self._ranks.world == 1:
            self.signal = self._noted()
        elif self.signal is None:
            self._calls += 1
            if self._calls >= self._next:
                self._ask()
        return self.signal is not None

    def _ask(self) -> None:
        seconds = max(time.monotonic() - self._asked, 1e-9)
        # At most twice as long as before: the first steps of a run are slower than the others.
        calls = max(1, min(2 * self._calls, int(self._calls * PACE / seconds)))
        found = self._ranks.gather([self._noted(), calls])
        self.signal = next((name for name, _ in found if name is not None), None)
        self._calls, self._next, self._asked = 0, found[0][1], time.monotonic()
