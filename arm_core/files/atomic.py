"""Atomic writes: files and folders are written under a temporary name, flushed and renamed.

Nothing is written through a symbolic link: files are newly created (`O_CREAT | O_EXCL`), and a file that is
extended in place is opened with `O_NOFOLLOW`. Temporary names are random if another process could write the
same target.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


def create_file(path: Path, *, buffering: int = -1) -> BinaryIO:
    """Create a file to write bytes to.

    A file or link with this name is removed first; the target of a link is not changed.
    """
    path.unlink(missing_ok=True)
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.fdopen(os.open(path, flags, 0o666), "wb", buffering)


def open_in_place(path: Path, flags: int) -> int:
    """Descriptor of a file that is kept and changed in place (a log, a lock); created if it is missing.

    flags: `os.O_RDWR`, `os.O_WRONLY | os.O_APPEND`, ...  Raises ValueError if `path` is a symbolic
    link, a folder, a named pipe or a device.
    """
    extra = os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags | extra, 0o666)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EMLINK, errno.EISDIR, errno.ENXIO):
            raise ValueError(f"{path}: expected a file; remove the link, folder or pipe") from None
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError(f"{path}: expected a file; remove the pipe or device")
    return descriptor


def append_text(path: Path, text: str) -> None:
    """Append to a text file, which is created if it is missing."""
    with os.fdopen(open_in_place(path, os.O_WRONLY | os.O_APPEND), "a", encoding="utf-8") as file:
        file.write(text)


def write_text(path: Path, text: str) -> None:
    """Create a text file and flush it to the disk."""
    with create_file(path) as file:
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())


def replace_text(path: Path, text: str) -> None:
    """Replace a text file atomically, through `path` with the suffix `.tmp`.

    For files of a folder that one process at a time writes; a leftover draft is overwritten.
    """
    draft = path.with_name(f"{path.name}.tmp")
    with naming(path):
        write_text(draft, text)
        draft.replace(path)


@contextmanager
def new_folder(target: Path, *, replace: bool = False) -> Iterator[Path]:
    """A folder to fill; it is renamed to `target` when the block ends without an error.

    replace: whether an existing folder is replaced; the caller has checked that this is allowed. Otherwise a
    folder that was created meanwhile is kept, and ValueError is raised.
    """
    made = _make_parents(target)
    draft = target.with_name(f".{target.name}.tmp-{secrets.token_hex(4)}")
    try:
        draft.mkdir()  # fails if the name exists, even as a link
        try:
            with naming(target):
                yield draft
                sync_folder(draft)
            _put_folder(draft, target, replace)
            sync_folder(target.parent)
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)
            raise
    except BaseException:
        _remove(made)
        raise


def _put_folder(draft: Path, target: Path, replace: bool) -> None:
    if not replace or not target.exists():
        try:
            draft.rename(target)  # fails if the target is a file, or a folder that is not empty
        except OSError as error:
            if error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                raise ValueError(f"{target}: was created by another process; choose another name") from None
            raise
        return
    old = target.with_name(f".{target.name}.old-{secrets.token_hex(4)}")
    target.rename(old)
    try:
        draft.rename(target)
    except BaseException:
        old.rename(target)
        raise
    shutil.rmtree(old)


@contextmanager
def new_file(target: Path, *, force: bool) -> Iterator[Path]:
    """A path to write to with `create_file`; it is renamed to `target` when the block ends without an error.

    force: replace an existing file or link, but never a folder.
    """
    if target.exists() and not target.is_file():
        raise ValueError(f"{target}: exists and is not a file; choose another name")
    if not force and (target.exists() or target.is_symlink()):
        raise ValueError(f"{target}: already exists; choose another name or pass --force to replace it")
    made = _make_parents(target)
    draft = target.with_name(f".{target.name}.tmp-{secrets.token_hex(4)}")
    try:
        with naming(target):
            yield draft
            with draft.open("rb") as file:
                os.fsync(file.fileno())
        _put_file(draft, target, force)
        sync_folder(target.parent)
    except BaseException:
        draft.unlink(missing_ok=True)
        _remove(made)
        raise


def _put_file(draft: Path, target: Path, force: bool) -> None:
    if not force:
        try:
            os.link(draft, target)  # unlike a rename, this fails if the target exists
        except FileExistsError:
            raise ValueError(f"{target}: was created by another process; choose another name") from None
        except OSError:  # a file system without hard links
            force = True
        else:
            draft.unlink()
    if force:
        draft.replace(target)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Add `path` to system errors that name no file, such as a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def _make_parents(target: Path) -> list[Path]:
    """Create the folders above `target`; returns those that were missing, the innermost first."""
    missing = [folder for folder in target.absolute().parents if not folder.exists()]
    target.parent.mkdir(parents=True, exist_ok=True)
    return missing


def _remove(folders: list[Path]) -> None:
    """Remove folders that were created for a failed output and are still empty."""
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
