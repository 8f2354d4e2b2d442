"""Ctrl-C and a scheduler's SIGTERM as a request to stop in good order."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any, Self

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopOnSignal:
    """Inside the block, a first SIGINT or SIGTERM is only noted in `signal`; a second acts as ever.

    say: is told that the first one arrived. Outside the main thread, where Python allows no handlers,
    nothing is caught.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self.signal: str | None = None
        """Name of the signal that arrived."""
        self._say = say
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._restore()
        self.signal = signal.Signals(number).name
        # A handler can interrupt the very print that it would repeat; Python then refuses.
        with suppress(RuntimeError):
            self._say(f"{self.signal}: finishing this step, then saving; once more stops at once")

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
