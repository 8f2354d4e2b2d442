"""The directory of an uncompressed zip archive, checked before anything in it is read.

`torch.save` stores its records without compression, so a record is a range of bytes in the file. Nothing
is ever inflated: an archive cannot grow in memory, and its names are never used as paths.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from arm_core.files.errors import BadFileError

MAX_DIRECTORY = 64 * 2**20
"""Largest central directory read, bytes: half a million records."""

CHUNK = 2**20

_END = struct.Struct("<4s4H2LH")  # end of central directory
_END64_PLACE = struct.Struct("<4sLQL")
_END64 = struct.Struct("<4sQ2H2L4Q")
_ENTRY = struct.Struct("<4s6H3L5H2L")  # central directory entry
_LOCAL = struct.Struct("<4s5H3L2H")  # header in front of a record


@dataclass(frozen=True)
class Record:
    """One stored file: the range of its bytes and their checksum."""

    name: str
    start: int
    size: int
    crc: int


def read_directory(path: Path) -> dict[str, Record]:
    """All records of the archive by name; BadFileError for anything `torch.save` would not write."""
    size = path.stat().st_size
    with path.open("rb") as file:
        count, directory_size, directory_start = _find_end(path, file, size)
        if directory_start + directory_size > size:
            raise BadFileError(f"{path}: the zip directory lies outside the file: truncated or damaged")
        if directory_size > MAX_DIRECTORY:
            raise BadFileError(f"{path}: the zip directory claims {directory_size} bytes")
        file.seek(directory_start)
        directory = file.read(directory_size)
        records: dict[str, Record] = {}
        place = 0
        for _ in range(count):
            record, place = _read_entry(path, file, directory, place, directory_start)
            if record.name in records:
                raise BadFileError(f"{path}: {record.name!r} stands twice in the zip directory")
            records[record.name] = record
    previous: Record | None = None
    for record in sorted(records.values(), key=lambda r: (r.start, r.size)):
        if previous and record.start < previous.start + previous.size:
            raise BadFileError(f"{path}: the records {previous.name!r} and {record.name!r} overlap")
        previous = record
    return records


def _find_end(path: Path, file: BinaryIO, size: int) -> tuple[int, int, int]:
    """(records, directory bytes, directory start) from the end of the archive."""
    tail_start = max(0, size - _END.size - 0xFFFF)
    file.seek(tail_start)
    tail = file.read(size - tail_start)
    at = tail.rfind(b"PK\5\6")
    if at < 0 or len(tail) - at < _END.size:
        raise BadFileError(f"{path}: the zip archive has no end: truncated")
    _, disk, first_disk, here, count, directory_size, start, _ = _END.unpack_from(tail, at)
    place = tail_start + at - _END64_PLACE.size
    if place >= 0:
        file.seek(place)
        magic, _, end64, _ = _END64_PLACE.unpack(file.read(_END64_PLACE.size))
        if magic == b"PK\6\7":
            file.seek(min(end64, size))
            data = file.read(_END64.size)
            if len(data) < _END64.size or data[:4] != b"PK\6\6":
                raise BadFileError(f"{path}: the zip64 end record is damaged")
            _, _, _, _, disk, first_disk, here, count, directory_size, start = _END64.unpack(data)
    if disk or first_disk or here != count:
        raise BadFileError(f"{path}: the zip archive is one part of several")
    return count, directory_size, start


def _read_entry(path: Path, file: BinaryIO, data: bytes, place: int, limit: int) -> tuple[Record, int]:
    if len(data) - place < _ENTRY.size or data[place : place + 4] != b"PK\1\2":
        raise BadFileError(f"{path}: the zip directory is damaged at byte {place}")
    fields = _ENTRY.unpack_from(data, place)
    flags, method, crc, packed, size = fields[3], fields[4], *fields[7:10]
    name_length, extra_length, comment_length, start = *fields[10:13], fields[16]
    name_end = place + _ENTRY.size + name_length
    following = name_end + extra_length + comment_length
    if following > len(data):
        raise BadFileError(f"{path}: the zip directory is damaged at byte {place}")
    raw_name = data[place + _ENTRY.size : name_end]
    try:
        name = raw_name.decode()
    except UnicodeDecodeError:
        raise BadFileError(f"{path}: the record name {raw_name[:40]!r} is not UTF-8") from None
    if name.startswith("/") or "\\" in name or "\0" in name or ".." in name.split("/"):
        raise BadFileError(f"{path}: the record name {name[:80]!r} is not one that torch.save writes")
    size, packed, start = _wide(data[name_end : name_end + extra_length], size, packed, start)
    if flags & 1:
        raise BadFileError(f"{path}: the record {name!r} is encrypted")
    if method != 0 or packed != size:
        raise BadFileError(
            f"{path}: the record {name!r} is compressed, and torch.save writes none such; "
            "unpack the archive, pack it again without compression (zip -0), and retry"
        )
    if start + _LOCAL.size > limit:
        raise BadFileError(f"{path}: the record {name!r} lies outside the file")
    file.seek(start)
    local = _LOCAL.unpack(file.read(_LOCAL.size))
    begin = start + _LOCAL.size + local[9] + local[10]
    if local[0] != b"PK\3\4" or file.read(local[9]) != raw_name or begin + size > limit:
        raise BadFileError(f"{path}: the record {name!r} is not where the zip directory says: damaged")
    return Record(name, begin, size, crc), following


def _wide(extra: bytes, size: int, packed: int, start: int) -> tuple[int, int, int]:
    """The 64-bit values that replace fields too large for the entry."""
    place = 0
    while len(extra) - place >= 4:
        kind, length = struct.unpack_from("<2H", extra, place)
        values = extra[place + 4 : place + 4 + length]
        if kind == 1:
            wide = iter(struct.unpack(f"<{len(values) // 8}Q", values[: len(values) // 8 * 8]))
            size = next(wide, size) if size == 0xFFFFFFFF else size
            packed = next(wide, packed) if packed == 0xFFFFFFFF else packed
            start = next(wide, start) if start == 0xFFFFFFFF else start
        place += 4 + length
    return size, packed, start


def read_record(path: Path, record: Record) -> bytes:
    """The bytes of a small record, checked against its checksum."""
    with path.open("rb") as file:
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
    with path.open("rb") as file:
        file.seek(record.start)
        while left and (data := file.read(min(left, CHUNK))):
            crc, left = zlib.crc32(data, crc), left - len(data)
    if left or crc != record.crc:
        raise _damaged(path, record)


def _damaged(path: Path, record: Record) -> BadFileError:
    return BadFileError(f"{path}: {record.name}: the checksum does not match: the file is damaged")
