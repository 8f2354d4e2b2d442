"""Reads files from unknown sources: only regular files, and never more bytes than expected."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

from arm_core.files.errors import BadFileError

MAX_JSON = 16 * 2**20
"""Largest JSON file that is read, bytes."""

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def open_regular(path: Path | str, *, follow: bool = True, buffering: int = -1) -> BinaryIO:
    """Open a regular file to read bytes from it.

    Named pipes, sockets, devices and folders raise BadFileError without being waited for or read.
    follow: whether `path` may be a symbolic link (the cache of the Hugging Face hub consists of links).
    Raises OSError if the file is missing or unreadable.
    """
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    if not follow and Path(path).is_symlink():
        raise BadFileError(f"{path}: expected a file, found a symbolic link")
    descriptor = os.open(path, flags if follow else flags | os.O_NOFOLLOW)
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        found = _KINDS.get(stat.S_IFMT(mode), "something else")
        raise BadFileError(f"{path}: expected a file, found {found}")
    return os.fdopen(descriptor, "rb", buffering)


def read_bounded(path: Path | str, limit: int, *, follow: bool = True) -> bytes:
    """The content of a regular file of at most `limit` bytes; BadFileError if it is larger."""
    with open_regular(path, follow=follow) as file:
        size = os.fstat(file.fileno()).st_size
        content = file.read(limit + 1) if size <= limit else b""
    if max(size, len(content)) > limit:
        raise BadFileError(f"{path}: expected at most {limit:,} bytes, found more")
    return content


def read_text(path: Path | str, limit: int, *, follow: bool = True) -> str:
    """The content of a UTF-8 text file of at most `limit` bytes; BadFileError if it is not UTF-8."""
    try:
        return read_bounded(path, limit, follow=follow).decode()
    except UnicodeDecodeError as error:
        raise BadFileError(f"{path}: not UTF-8 text: {error.reason} at byte {error.start}") from None


def read_json_file(path: Path) -> dict[str, Any]:
    """The JSON object in a file of at most `MAX_JSON` bytes."""
    return parse_json(path, read_bounded(path, MAX_JSON))


def parse_json(path: Path | str, text: bytes | str) -> dict[str, Any]:
    """A JSON object in which no key appears twice. path: its name in errors."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in pairs:
            if name in found:
                raise ValueError(f"{name[:80]!r} appears twice")
            found[name] = value
        return found

    try:
        value = json.loads(text if isinstance(text, str) else text.decode(), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:  # includes UnicodeDecodeError and JSONDecodeError
        raise BadFileError(f"{path}: not valid JSON: {str(error)[:200]}") from None
    if not isinstance(value, dict):
        raise BadFileError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value
