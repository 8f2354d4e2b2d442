"""Files and folders that appear whole or not at all: written beside their place, flushed, then renamed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Write a text file and flush it to the disk."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder to fill, which takes its place as `target` when the block ends without an error.

    An existing folder is replaced; the caller checks before that it may be.
    """
    made = _make_parents(target)
    draft = target.with_name(f".{target.name}.tmp-{os.getpid()}")
    try:
        draft.mkdir()
        yield draft
        sync_folder(draft)
        if target.exists():
            old = target.with_name(f".{target.name}.old-{os.getpid()}")
            target.rename(old)
            try:
                draft.rename(target)
            except BaseException:
                old.rename(target)
                raise
            shutil.rmtree(old)
        else:
            draft.rename(target)
        sync_folder(target.parent)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        _remove(made)
        raise


@contextmanager
def new_file(target: Path, *, force: bool) -> Iterator[Path]:
    """A path to write to, which takes its place as `target` when the block ends without an error.

    `force` replaces an existing file, but never a folder.
    """
    if target.exists() and not target.is_file():
        raise ValueError(f"{target}: exists and is not a file; choose another name")
    if target.exists() and not force:
        raise ValueError(f"{target}: exists already; choose another name or pass --force to replace it")
    made = _make_parents(target)
    draft = target.with_name(f".{target.name}.tmp-{os.getpid()}")
    try:
        yield draft
        with draft.open("rb") as file:
            os.fsync(file.fileno())
        draft.replace(target)
        sync_folder(target.parent)
    except BaseException:
        draft.unlink(missing_ok=True)
        _remove(made)
        raise


def _make_parents(target: Path) -> list[Path]:
    """Make the folders above `target`; returns those that were missing, the innermost first."""
    missing = [folder for folder in target.absolute().parents if not folder.exists()]
    target.parent.mkdir(parents=True, exist_ok=True)
    return missing


def _remove(folders: list[Path]) -> None:
    """Remove folders that were made for nothing, as far as they are still empty."""
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
