"""Ctrl-C, a scheduler's SIGTERM and a closed terminal's SIGHUP as requests to save and stop."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any, Self

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""SIGHUP arrives when a terminal or a connection is closed; under `nohup` it stays ignored."""


class StopOnSignal:
    """Inside the block the first signal of `SIGNALS` is recorded in `signal`; a second one acts as usual.

    say: called with a sentence for the user when the first signal arrives. Outside the main thread, where
    Python allows no handlers, signals are not caught.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self.signal: str | None = None
        """Name of the signal that arrived."""
        self._say = say
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            wanted = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
            self._before = {number: signal.signal(number, self._note) for number in wanted}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._restore()
        self.signal = signal.Signals(number).name
        # Python refuses to print if the handler interrupted a print; after SIGHUP the terminal is gone.
        with suppress(RuntimeError, OSError):
            self._say(f"{self.signal}: saving and stopping; press Ctrl-C again to stop immediately")

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
