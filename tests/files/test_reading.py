"""Reading from unknown sources: only regular files, bounded, and escaped for terminals."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from arm_core.files.errors import MAX_MESSAGE, BadFileError, printable, reading, shown
from arm_core.files.reading import open_regular, parse_json, read_bounded, read_text


def test_a_named_pipe_is_refused_without_waiting_for_a_writer(tmp_path: Path):
    os.mkfifo(tmp_path / "x")
    with pytest.raises(BadFileError, match="x: expected a file, found a named pipe"):
        open_regular(tmp_path / "x")


def test_an_endless_device_and_a_folder_are_refused(tmp_path: Path):
    (tmp_path / "x").symlink_to("/dev/zero")
    with pytest.raises(BadFileError, match="x: expected a file, found a device"):
        read_bounded(tmp_path / "x", 100)
    with pytest.raises(BadFileError, match="expected a file, found a folder"):
        read_bounded(tmp_path, 100)


def test_a_link_is_followed_unless_the_caller_forbids_it(tmp_path: Path):
    (tmp_path / "a").write_bytes(b"abc")
    (tmp_path / "b").symlink_to("a")
    assert read_bounded(tmp_path / "b", 3) == b"abc"
    with pytest.raises(BadFileError, match="b: expected a file, found a symbolic link"):
        read_bounded(tmp_path / "b", 3, follow=False)


def test_no_more_than_the_limit_is_read(tmp_path: Path):
    (tmp_path / "a").write_bytes(bytes(100))
    assert read_bounded(tmp_path / "a", 100) == bytes(100)
    with pytest.raises(BadFileError, match="a: expected at most 99 bytes, found more"):
        read_bounded(tmp_path / "a", 99)
    os.truncate(tmp_path / "a", 2**40)  # sparse
    with pytest.raises(BadFileError, match="expected at most 99 bytes"):
        read_bounded(tmp_path / "a", 99)


def test_text_that_is_not_utf8_is_refused_with_its_position(tmp_path: Path):
    (tmp_path / "a").write_bytes(b"ab\xff")
    with pytest.raises(BadFileError, match="a: not UTF-8 text: invalid start byte at byte 2"):
        read_text(tmp_path / "a", 100)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "a": 2}', "'a' appears twice"),
        ("[]", "expected a JSON object, found list"),
        ("[" * 10**6, "not valid JSON"),
        ('{"a": ' + "9" * 5000 + "}", "not valid JSON"),
        ("{", "not valid JSON"),
    ],
    ids=["twice", "list", "deep", "digits", "cut"],
)
def test_bad_json_is_refused_by_name(text, message):
    with pytest.raises(BadFileError, match=f"name: .*{message}"):
        parse_json("name", text)


def test_control_characters_and_undecodable_bytes_are_escaped():
    assert printable("a\x1b[2J\x9b\u202eb\n\udcff\u00e9") == r"a\x1b[2J\x9b\u202eb\n\udcff" + "\u00e9"


def test_long_messages_are_truncated_in_the_middle():
    text = shown("start" + "x" * 10**7 + "end")
    assert len(text) < MAX_MESSAGE + 10
    assert text.startswith("start")
    assert text.endswith("end")
    assert len(str(BadFileError("\x1b" * 10**6))) < 10 * MAX_MESSAGE


@pytest.mark.parametrize("error", [MemoryError(), RecursionError(), OverflowError("too large")])
def test_all_errors_from_hostile_content_become_one_typed_error(error):
    with pytest.raises(BadFileError, match=r"^name: .*corrupt\?"), reading("name"):
        raise error
