"""Atomic writes: never through a link, never over foreign files, and without leftovers."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest

from arm_core.files import atomic
from arm_core.files.atomic import (
    append_text,
    create_file,
    new_file,
    new_folder,
    open_in_place,
    replace_text,
    write_text,
)


def names(folder: Path) -> list[str]:
    return sorted(item.name for item in folder.iterdir())


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    """A foreign file; nothing may write to it."""
    path = tmp_path / "victim"
    path.write_text("precious")
    yield path
    assert path.read_text() == "precious"


@pytest.mark.parametrize("write", [write_text, replace_text])
@pytest.mark.parametrize("place", ["out", "out.tmp"])
def test_text_is_not_written_through_a_link(tmp_path: Path, victim, write, place):
    (tmp_path / place).symlink_to(victim)
    write(tmp_path / "out", "new")
    assert (tmp_path / "out").read_text() == "new"


def test_a_file_is_created_with_the_permissions_of_the_process(tmp_path: Path):
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "a", "x")
        with new_folder(tmp_path / "b") as draft:
            write_text(draft / "c", "x")
    finally:
        os.umask(before)
    modes = [(tmp_path / name).stat().st_mode & 0o777 for name in ("a", "b", "b/c")]
    assert modes == [0o640, 0o750, 0o640]


def test_a_log_or_a_lock_that_is_a_link_is_refused(tmp_path: Path, victim):
    (tmp_path / "log").symlink_to(victim)
    with pytest.raises(ValueError, match="log: expected a file; remove the link"):
        append_text(tmp_path / "log", "row")
    with pytest.raises(ValueError, match="log: expected a file; remove the link"):
        open_in_place(tmp_path / "log", os.O_RDWR)


@pytest.mark.parametrize("flags", [os.O_RDWR, os.O_WRONLY | os.O_APPEND])
def test_a_log_or_a_lock_that_is_a_named_pipe_is_refused_immediately(tmp_path: Path, flags):
    os.mkfifo(tmp_path / "log")
    with pytest.raises(ValueError, match="log: expected a file; remove the"):
        open_in_place(tmp_path / "log", flags)


def test_a_planted_draft_is_not_written_through_and_not_removed(tmp_path: Path, victim):
    planted = [tmp_path / f".out.{suffix}" for suffix in ("tmp", f"tmp-{os.getpid()}")]
    for path in planted:
        path.symlink_to(victim)
    with new_file(tmp_path / "out", force=False) as draft, create_file(draft) as file:
        file.write(b"new")
    assert (tmp_path / "out").read_bytes() == b"new"
    assert all(path.is_symlink() for path in planted)


def test_a_folder_with_the_name_of_a_draft_is_kept(tmp_path: Path):
    other = tmp_path / f".out.tmp-{os.getpid()}"
    other.mkdir()
    (other / "thesis.tex").write_text("years of work")
    with new_folder(tmp_path / "out") as draft:
        write_text(draft / "a", "x")
    assert (other / "thesis.tex").exists()
    assert names(tmp_path) == [other.name, "out"]


def test_an_existing_file_with_a_draft_name_is_not_changed(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(atomic.secrets, "token_hex", lambda _: "1")
    (tmp_path / ".out.tmp-1").mkdir()
    (tmp_path / ".out.tmp-1" / "a").write_text("precious")
    with pytest.raises(FileExistsError), new_folder(tmp_path / "out"):
        pass
    assert (tmp_path / ".out.tmp-1" / "a").exists()


def fill_and_fail(draft: Path) -> None:
    write_text(draft / "part" if draft.is_dir() else draft, "x")
    raise RuntimeError


def test_an_error_leaves_neither_draft_nor_new_parents(tmp_path: Path):
    for make in (new_folder, lambda path: new_file(path, force=False)):
        with pytest.raises(RuntimeError), make(tmp_path / "a" / "b" / "out") as draft:
            fill_and_fail(draft)
        assert names(tmp_path) == []


def test_a_full_disk_is_reported_with_the_name_of_the_output(tmp_path: Path):
    for make in (new_folder, lambda path: new_file(path, force=False)):
        with pytest.raises(OSError, match="No space left") as caught, make(tmp_path / "out"):
            raise OSError(errno.ENOSPC, "No space left on device")
        assert caught.value.filename == str(tmp_path / "out")


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_of_many_writers_of_one_new_name_exactly_one_succeeds(tmp_path: Path, kind):
    barrier, done, refused = threading.Barrier(8), [], []

    def write(number: int) -> None:
        try:
            if kind == "folder":
                with new_folder(tmp_path / "out") as draft:
                    write_text(draft / "a", str(number))
                    barrier.wait()
            else:
                with new_file(tmp_path / "out", force=False) as draft:
                    write_text(draft, str(number))
                    barrier.wait()
            done.append(number)
        except ValueError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=write, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(done) == 1
    assert all("was created by another process" in message for message in refused)
    assert len(refused) == 7
    written = tmp_path / "out" / "a" if kind == "folder" else tmp_path / "out"
    assert written.read_text() == str(done[0])
    assert names(tmp_path) == ["out"]


def test_a_folder_is_replaced_on_request_and_restored_after_an_error(tmp_path: Path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("x")
    rename = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if target == tmp_path / "out" and ".tmp-" in self.name:
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="Input/output error"), new_folder(tmp_path / "out", replace=True):
        pass
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["old"]
    monkeypatch.undo()
    with new_folder(tmp_path / "out", replace=True) as draft:
        write_text(draft / "new", "x")
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["new"]
