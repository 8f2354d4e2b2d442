"""Progress on stderr: a bar with rate and time left on a terminal, otherwise a plain line at intervals."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

from arm_cli.show import echo
from arm_core.files.errors import printable

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

EVERY = 10.0
"""Seconds between two plain lines."""

EARLY = 4
"""Calls after which a first line is printed without waiting."""


class ProgressBar:
    """Shows progress of work of known length; a context manager.

    what:  names the work.  unit: what is counted, in the plural: `images`, `steps`.
    start: the amount that an interrupted run had already done; it does not count for the rate.
    """

    def __init__(self, what: str, total: int, unit: str, *, start: int = 0) -> None:
        self._what, self._total, self._unit = what, total, unit
        self._start = self._done = start
        self._began = self._said = time.monotonic()
        self._calls = 0
        self._warm: tuple[float, int] | None = None
        self._bar: Progress | None = None
        self._task: TaskID
        if sys.stderr.isatty():
            self._bar, self._task = _bar(what, total, unit, start)

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, count: int, note: str = "") -> None:
        """Advance by `count`; `note` is shown beside the bar, such as a loss or an epoch."""
        self._done += count
        if count:
            self._calls += 1
            self._warm = self._warm or (time.monotonic(), self._done)
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, note=note, rate=f"{self._rate():.3g}")
            return
        now = time.monotonic()
        # One early line shows the time left; then one line every EVERY seconds.
        if now - self._said >= EVERY or (count and self._calls == EARLY):
            self._said = now
            echo(self.line(note), err=True)

    def line(self, note: str = "") -> str:
        """The progress as one plain line."""
        rate = self._rate()
        left = f", {duration((self._total - self._done) / rate)} left" if rate > 0 else ""
        tail = f", {note}" if note else ""
        return f"{self._what}: {self._done}/{self._total} {self._unit}, {rate:.3g} {self._unit}/s{left}{tail}"

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        if self._bar is not None:
            self._bar.console.print(printable(text), highlight=False, markup=False)
        else:
            echo(text, err=True)

    def _rate(self) -> float:
        """Counts per second, without the first call if there are others: it compiles and allocates."""
        began, start = self._warm if self._warm and self._calls > 1 else (self._began, self._start)
        return (self._done - start) / max(time.monotonic() - began, 1e-9)


def _bar(what: str, total: int, unit: str, start: int) -> tuple[Progress, TaskID]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]} {task.fields[unit]}/s"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
        console=Console(stderr=True),
    )
    return bar, bar.add_task(what, total=total, completed=start, unit=unit, rate="-", note="")


def duration(seconds: float) -> str:
    """`45 s`, `12:03` or `1:02:03`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"
