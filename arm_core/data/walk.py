"""Finds and reads image files in folders; folders and files may be hostile.

Every command finds images with `find_images` and reads them with `read_file`: regular files only, opened
without blocking, up to a size; each folder is visited once, so that cycles of links end.
"""

from __future__ import annotations

import os
import stat
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from arm_core.files.reading import open_regular

IMAGE_SUFFIXES = (
    ".jpg",
    ".jpeg",
    ".png",
    ".webp",
    ".bmp",
    ".gif",
    ".tif",
    ".tiff",
    ".ppm",
    ".pgm",
    ".avif",
    ".jp2",
)
"""Suffixes of image files, in upper or lower case."""

UNREADABLE_SUFFIXES = (
    ".heic",
    ".heif",
    ".jxl",
    ".svg",
    ".psd",
    ".dng",
    ".cr2",
    ".nef",
    ".arw",
    ".exr",
    ".hdr",
)
"""Image formats that are reported but not read."""

MAX_FILE_BYTES = 2**28
"""Larger image files are refused: 256 MiB, above the size of the largest accepted uncompressed image."""


@dataclass
class Found:
    """The contents of a folder."""

    images: list[str] = field(default_factory=list)
    """Sorted paths relative to the root, with `/`."""
    unreadable: Counter[str] = field(default_factory=Counter)
    """Files in image formats that are not read, by suffix."""
    special: list[str] = field(default_factory=list)
    """FIFOs, sockets and devices with the suffix of an image, links to them, and broken links."""
    repeated: list[str] = field(default_factory=list)
    """Folders that were already visited under another name: links, and cycles of links."""

    def warn(self, root: Path) -> None:
        """Report what was skipped."""
        if self.unreadable:
            kinds = ", ".join(f"{count} {suffix}" for suffix, count in sorted(self.unreadable.items()))
            warnings.warn(
                f"{root}: skipped files in formats that are not read ({kinds}); convert them to JPEG or PNG",
                stacklevel=3,
            )
        if self.special:
            warnings.warn(
                f"{root}: skipped {len(self.special)} entries that are not regular files: "
                f"{_some(self.special)}",
                stacklevel=3,
            )
        if self.repeated:
            warnings.warn(
                f"{root}: skipped {len(self.repeated)} links to folders that are already included: "
                f"{_some(self.repeated)}",
                stacklevel=3,
            )


def find_images(root: Path, below: str = "", found: Found | None = None) -> Found:
    """The images under `root/below` at any depth. Links are followed; hidden entries are not listed.

    `found` is added to. A folder counts once: a link to `root`, or to a folder below it that was visited
    before, is skipped. Raises ValueError for a folder that cannot be listed.
    """
    found = Found() if found is None else found
    first = root / below
    visited = {_identity(root.stat()), _identity(first.stat())}
    images: list[str] = []
    pending = [below]
    while pending:
        folder = pending.pop()
        for entry in _entries(root / folder):
            path = f"{folder}/{entry.name}" if folder else entry.name
            try:
                status = entry.stat()
            except OSError:  # a broken link, or deleted meanwhile
                if _is_image(entry.name):
                    found.special.append(path)
                continue
            if stat.S_ISDIR(status.st_mode):
                if (identity := _identity(status)) in visited:
                    found.repeated.append(path)
                else:
                    visited.add(identity)
                    pending.append(path)
            elif _is_image(entry.name):
                (images if stat.S_ISREG(status.st_mode) else found.special).append(path)
            elif (suffix := Path(entry.name).suffix.lower()) in UNREADABLE_SUFFIXES:
                found.unreadable[suffix] += 1
    found.images += sorted(images)
    return found


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """Sorted by name, so that the order does not depend on the disk."""
    try:
        with os.scandir(folder) as entries:
            return sorted((e for e in entries if not is_hidden(e.name)), key=lambda entry: entry.name)
    except OSError as error:
        raise ValueError(f"{folder}: cannot be listed ({error.strerror or error})") from None


def is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES)


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def looked_for() -> str:
    return f"looked for {' '.join(suffix[1:] for suffix in IMAGE_SUFFIXES)}"


def read_file(path: Path, limit: int = MAX_FILE_BYTES) -> bytes:
    """The bytes of a regular file.

    Raises ValueError, which names the file, if it cannot be read, is not a regular file (a FIFO is not
    waited for), or has more than `limit` bytes.
    """
    try:
        with open_regular(path, buffering=0) as file:
            content = file.read(limit + 1)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error})") from None
    if len(content) > limit:
        raise ValueError(
            f"{path}: expected an image file of at most {limit / 2**20:.0f} MiB, found a larger one"
        )
    return content


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
