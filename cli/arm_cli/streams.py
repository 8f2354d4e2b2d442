"""Output that may end before the program does: a closed pipe, or a terminal that is gone."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO, TypeVar

T = TypeVar("T")

CLOSED = (errno.EPIPE, errno.EIO)
"""A pipe without a reader (`| head`), and a terminal that was closed."""


class _Stream:
    """A text stream that goes to the null device once it is closed at the other end."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        return self._try(lambda: self._stream.write(text), len(text))

    def flush(self) -> None:
        self._try(self._stream.flush, None)

    def _try(self, action: Callable[[], T], otherwise: T) -> T:
        try:
            return action()
        except OSError as error:
            if error.errno not in CLOSED:
                raise
            # The descriptor itself is redirected, so that what is buffered, and what libraries write, is
            # discarded as well.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
            return otherwise

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def surviving_output() -> Iterator[None]:
    """Inside the block, a closed stdout or stderr is no error; the output is discarded from then on."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = _Stream(before[0]), _Stream(before[1])
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stdout, sys.stderr = before
