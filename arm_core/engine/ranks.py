"""The processes that train one model together, as each of them sees the job.

A launcher (`torchrun`, `mlx.launch`) starts the same command several times; each process has a *rank*.
A backend's `join` returns its `Ranks`. Tensors are the engines' business; here small values are
exchanged: who met a signal, what rank 0 decided, how many images each has evaluated.

All ranks run the same steps. Rank 0 alone writes files and speaks; what depends on the disk, the clock
or a signal is decided by one rank and told to all, or they would part ways and wait for each other.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

T = TypeVar("T")

PACE = 1.0
"""Seconds between two questions to all ranks whether one met a signal; each costs a round trip."""


class Ranks(Protocol):
    """The job from one of its processes."""

    @property
    def rank(self) -> int:
        """Number of this process, from 0."""

    @property
    def world(self) -> int:
        """Processes in the job."""

    @property
    def restarts(self) -> int:
        """How often the launcher has started the job again after a failure."""

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, in their order; every rank calls it at the same point.

        value: anything that JSON can hold, small.  Waits for the slowest rank.
        Raises PeerFailed where another process has ended.
        """

    def close(self) -> None:
        """Leave the job in good order, after every rank is done with it."""


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
    """Another process of the job has ended, so this one cannot go on."""


class FailedElsewhere(Exception):  # noqa: N818
    """The job ends because of an error of another rank; rank 0 reports it."""


def title(ranks: Ranks) -> str:
    """`process 2 of 4`."""
    return f"process {ranks.rank + 1} of {ranks.world}"


@contextmanager
def together(ranks: Ranks) -> Iterator[None]:
    """All ranks run the block and leave it together: an error on one of them ends it on each.

    The block may not exchange anything itself. Rank 0 raises its own error, or a ValueError with the
    words of the first rank that failed; every other rank raises FailedElsewhere.
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
    """What `work` returns on rank 0, on every rank; only rank 0 runs it.

    The result must be something that JSON can hold. Rank 0 raises an error, the others FailedElsewhere.
    """
    result: list[T] = []
    with together(ranks):
        if ranks.rank == 0:
            result = [work()]
    return result[0] if ranks.world == 1 else next(v[0] for v in ranks.gather(result) if v)


def confirm(ranks: Ranks, value: int) -> None:
    """Check that every rank is reached, and with the same value; PeerFailed otherwise.

    For use before rank 0 writes a result to which all ranks contributed: what a lost rank sent may be wrong.
    """
    if (found := ranks.gather(value)) != [value] * ranks.world:
        raise PeerFailed(f"another process of the job has ended (expected {value} of all, found {found})")


def agree(ranks: Ranks, value: T | None) -> T | None:
    """The first value that is not None, in the order of the ranks."""
    return next((found for found in ranks.gather(value) if found is not None), None)


class StopTogether:
    """One decision of all ranks to stop, from what each of them has noted.

    noted: name of the signal that this process met, or None.
    The ranks ask each other about every `PACE` seconds by the clock of rank 0, at the same calls.
    """

    def __init__(self, ranks: Ranks, noted: Callable[[], str | None]) -> None:
        self._ranks, self._noted = ranks, noted
        self.signal: str | None = None
        """Name of the signal that ends the work of all ranks."""
        self._calls, self._next = 0, 1
        self._asked = time.monotonic()

    def asked(self) -> bool:
        """Whether all ranks are to stop; every rank calls it at the same points of its work."""
        if self._ranks.world == 1:
            self.signal = self._noted()
        elif self.signal is None:
            self._calls += 1
            if self._calls >= self._next:
                self._ask()
        return self.signal is not None

    def _ask(self) -> None:
        seconds = max(time.monotonic() - self._asked, 1e-9)
        # At most twice as long as before: the first steps of a run are no measure of the others.
        calls = max(1, min(2 * self._calls, int(self._calls * PACE / seconds)))
        found = self._ranks.gather([self._noted(), calls])
        self.signal = next((name for name, _ in found if name is not None), None)
        self._calls, self._next, self._asked = 0, found[0][1], time.monotonic()
