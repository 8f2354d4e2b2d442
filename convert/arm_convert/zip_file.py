"""The records of an uncompressed zip archive, as `torch.save` writes it.

Python's `zipfile` reads the directory. `torch.save` stores records without compression, so a record is a
range of bytes in the file. The checks that `zipfile` leaves to its caller are here: nothing is
decompressed, records do not overlap, names are unique and are never used as paths, and the directory has
a bounded size.
"""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from arm_core.files.errors import BadFileError
from arm_core.files.reading import open_regular

MAX_DIRECTORY = 8 * 2**20
"""Largest directory that is read, bytes: over 100,000 records; official checkpoints have about 1,000."""

CHUNK = 2**20

_LOCAL = struct.Struct("<4s5H3L2H")  # header in front of a record


@dataclass(frozen=True)
class Record:
    """A stored file: the range of its bytes and their checksum."""

    name: str
    start: int
    size: int
    crc: int


class _BoundedReads(io.BufferedReader):
    """A file that refuses to read a directory of more than `MAX_DIRECTORY` bytes at once."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > MAX_DIRECTORY:
            raise zipfile.BadZipFile(f"its directory claims {size} bytes")
        return super().read(size)


def read_directory(path: Path) -> dict[str, Record]:
    """All records of the archive by name; BadFileError for anything that `torch.save` would not write."""
    with _BoundedReads(cast(io.RawIOBase, open_regular(path, buffering=0))) as file:
        try:
            with zipfile.ZipFile(file) as archive:
                entries = archive.infolist()
        except (
            zipfile.BadZipFile,
            NotImplementedError,
            ValueError,
            OSError,
            EOFError,
            struct.error,
        ) as error:
            raise BadFileError(
                f"{path}: corrupt or truncated zip archive: {str(error)[:200]}; download or copy it again"
            ) from None
        records: dict[str, Record] = {}
        end = 0
        for entry in sorted(entries, key=lambda entry: (entry.header_offset, entry.file_size)):
            record = _record(path, file, entry)
            if record.name in records:
                raise BadFileError(f"{path}: {record.name!r} appears twice in the zip directory")
            if entry.header_offset < end:
                raise BadFileError(f"{path}: the record {record.name!r} overlaps another one")
            end = record.start + record.size
            records[record.name] = record
    return records


def _record(path: Path, file: BinaryIO, entry: zipfile.ZipInfo) -> Record:
    """The record of a directory entry, compared with the header in front of its bytes."""
    name = entry.orig_filename
    if name.startswith("/") or "\\" in name or "\0" in name or ".." in name.split("/"):
        raise BadFileError(f"{path}: the record name {name[:80]!r} is not one that torch.save writes")
    if entry.flag_bits & 1:
        raise BadFileError(f"{path}: the record {name!r} is encrypted")
    if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
        raise BadFileError(
            f"{path}: the record {name!r} is compressed, which torch.save never does; "
            "unpack the archive, pack it without compression (zip -0), and retry"
        )
    if entry.header_offset < 0:
        raise BadFileError(f"{path}: the record {name!r} begins before the file: corrupt")
    file.seek(entry.header_offset)
    header = file.read(_LOCAL.size)
    damaged = len(header) < _LOCAL.size or header[:4] != b"PK\3\4"
    if not damaged:
        name_length, extra_length = _LOCAL.unpack(header)[-2:]
        encoding = "utf-8" if entry.flag_bits & 0x800 else "cp437"
        damaged = file.read(name_length) != name.encode(encoding)
    if damaged:
        raise BadFileError(f"{path}: the record {name!r} is not where the zip directory says: corrupt")
    start = entry.header_offset + _LOCAL.size + name_length + extra_length
    if start + entry.file_size > file.seek(0, io.SEEK_END):
        raise BadFileError(f"{path}: the record {name!r} extends beyond the file: truncated")
    return Record(name, start, entry.file_size, entry.CRC)


def read_record(path: Path, record: Record) -> bytes:
    """The bytes of a small record, checked against its checksum."""
    with open_regular(path) as file:
        file.seek(record.start)
        data = file.read(record.size)
    check_bytes(path, record, data)
    return data


def check_bytes(path: Path, record: Record, data: bytes | memoryview) -> None:
    """Compare the bytes of a whole record with its checksum."""
    if len(data) != record.size or zlib.crc32(data) != record.crc:
        raise _damaged(path, record)


def check_record(path: Path, record: Record) -> None:
    """Compare a record of any size with its checksum, a chunk at a time."""
    crc, left = 0, record.size
    with open_regular(path) as file:
        file.seek(record.start)
        while left and (data := file.read(min(left, CHUNK))):
            crc, left = zlib.crc32(data, crc), left - len(data)
    if left or crc != record.crc:
        raise _damaged(path, record)


def _damaged(path: Path, record: Record) -> BadFileError:
    return BadFileError(f"{path}: {record.name}: the checksum does not match: corrupt")
