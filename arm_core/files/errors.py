"""The error for bad files, and the printing of text from files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MAX_MESSAGE = 1500
"""Longest error message, characters; a file can hold names of many megabytes."""


class BadFileError(ValueError):
    """A file that is corrupt, hostile or of another format; the message names file, tensor and remedy.

    Messages may quote the file, so control characters are escaped and long messages are truncated.
    """

    def __init__(self, message: str) -> None:
        super().__init__(shown(message))


def located(path: Path | str, error: ValueError) -> BadFileError:
    """The same error as one of a file: its message starts with the file's name."""
    message = str(error)
    return BadFileError(message if message.startswith(str(path)) else f"{path}: {message}")


def printable(text: str) -> str:
    """Text for a terminal: control characters, invisible ones and undecodable bytes as escapes."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def shown(text: str, limit: int = MAX_MESSAGE) -> str:
    """`printable` text of at most about `limit` characters; the middle of longer text is omitted."""
    if len(text) > limit:
        text = f"{text[: limit * 2 // 3]} ... {text[-limit // 3 :]}"
    return printable(text)


@contextmanager
def reading(path: Path | str) -> Iterator[None]:
    """Convert the errors that hostile content can cause in Python to a BadFileError that names the file.

    A safety net for the block that parses `path`: sizes are checked before memory is allocated, so
    running out of it is not expected.
    """
    try:
        yield
    except (MemoryError, RecursionError, ArithmeticError) as error:
        what = {MemoryError: "needs more memory than is available", RecursionError: "is nested too deeply"}
        reason = what.get(type(error), f"holds numbers that are out of range ({error})")
        raise BadFileError(f"{path}: {reason}; is the file corrupt?") from None
