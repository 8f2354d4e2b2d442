"""A limit for waits inside MLX, which otherwise waits forever for a process that has ended."""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

WAIT, AFTER_SIGNAL = 600.0, 60.0
"""Seconds that a process waits for the others: the slowest one may write a checkpoint meanwhile. After a
signal the wait is shorter, since launchers end the rest of a job with SIGTERM."""


def wait_limit() -> float:
    """Seconds that a process waits for the others: `ARM_PEER_TIMEOUT`, by default `WAIT`."""
    text = os.environ.get("ARM_PEER_TIMEOUT", str(WAIT))
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not seconds > 0:
        raise ValueError(f"ARM_PEER_TIMEOUT: expected a number of seconds above 0, found {text!r}")
    return seconds


class Watch:
    """Ends this process with exit code 1 if it waits too long for the others.

    MLX waits in C++, where neither an exception nor a Python signal handler interrupts it. A thread
    therefore checks the time. Python writes signals to a file descriptor, from which the thread reads them.

    limit: seconds of a wait; after a signal during the wait, at most `AFTER_SIGNAL` or `limit`.
    """

    def __init__(self, limit: float) -> None:
        self._limit = limit
        self._since: float | None = None
        self._reader, self._writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        if threading.current_thread() is threading.main_thread():
            signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        threading.Thread(target=self._run, name="arm-mlx-watch", daemon=True).start()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Context of a wait; an inner wait is a part of the outer one."""
        before, self._since = self._since, self._since or time.monotonic()
        try:
            yield
        finally:
            self._since = before

    def close(self) -> None:
        """Stop watching."""
        if threading.current_thread() is threading.main_thread():
            signal.set_wakeup_fd(-1)
        os.write(self._writer, b"\0")  # no signal has number 0

    def _run(self) -> None:
        signalled = 0.0
        while True:
            if select.select([self._reader], [], [], min(1.0, self._limit / 4))[0]:
                if 0 in os.read(self._reader, 64):
                    return
                signalled = time.monotonic()
            since = self._since  # read once: the main thread changes it
            if since is None:
                continue
            end = since + self._limit
            if signalled > since:
                end = min(end, signalled + AFTER_SIGNAL)
            if time.monotonic() > end:
                os.write(2, b"Error: another process of the job does not answer; stopping\n")
                os._exit(1)
