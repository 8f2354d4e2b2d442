"""Reads files of `torch.save` without torch, and without executing anything in them.

Both formats are supported: the zip archive of torch 1.6 and later (`data.pkl` describes the objects,
`data/0`, `data/1`, ... hold the storages) and the earlier sequence of pickles. Tensors are returned as
`Tensor`s whose bytes are read on demand.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TypeGuard

import numpy as np

from arm_convert.pickle_machine import Attributes, Function, Name, Readable, brief, read_pickle
from arm_convert.zip_file import Record, check_bytes, check_record, read_directory, read_record
from arm_core.files.errors import BadFileError
from arm_core.files.reading import open_regular
from arm_core.files.safetensors import DTYPES, AnyArray, Shape, Tensor, read_range

STORAGES = {
    "DoubleStorage": "F64",
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
}
"""torch's storage classes and their types in `DTYPES`."""

MAX_PICKLE = 16 * 2**20
"""Largest pickle that is read, bytes; official checkpoints have 0.3 MB."""

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001


@dataclass(frozen=True)
class Storage:
    """A range of values in the file; tensors are views of it."""

    key: str
    dtype: str
    count: int
    fetch: Callable[[int, int], AnyArray]
    """Returns `count` values from index `start`."""


@dataclass(frozen=True)
class TorchFile:
    """The content of a file: dicts, lists, plain values and `Tensor`s."""

    path: Path
    value: Any
    format: str
    """`zip` or `legacy`."""


def is_torch_file(start: bytes) -> bool:
    """Whether these are the first bytes of a zip archive or a pickle, the formats of `torch.save`."""
    return start[:4] == b"PK\3\4" or (len(start) >= 4 and start[0] == 0x80 and start[1] <= 5)


def read_torch(path: Path) -> TorchFile:
    """Open a file of `torch.save`; the bytes of its tensors are read later."""
    with open_regular(path) as file:
        if file.read(4) == b"PK\3\4":
            return TorchFile(path, _read_zip(path), "zip")
    return TorchFile(path, _read_legacy(path), "legacy")


def _known() -> dict[str, Function | Name]:
    """All names that a checkpoint may use."""
    known: dict[str, Function | Name] = {
        f"{module}.{name}": Name(name, dtype)
        for name, dtype in STORAGES.items()
        for module in ("torch", "torch.cuda")
    }
    functions: dict[str, Callable[..., Any]] = {
        "collections.OrderedDict": _ordered_dict,
        "argparse.Namespace": _namespace,
        "torch._utils._rebuild_tensor": _rebuild_tensor,
        "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
        "torch._utils._rebuild_parameter": _rebuild_parameter,
    }
    return known | {name: Function(name, call) for name, call in functions.items()}


def _ordered_dict(items: object = ()) -> dict[Any, Any]:
    if items != () and items != []:
        raise ValueError("an OrderedDict with arguments")
    return {}


def _namespace() -> Attributes:
    return Attributes()


def _rebuild_parameter(data: object, requires_grad: object = True, hooks: object = None) -> Tensor:
    if not isinstance(data, Tensor):
        raise ValueError("a parameter without a tensor")
    return data


def _rebuild_tensor(storage: object, offset: object, shape: object, stride: object, *_: object) -> Tensor:
    """A view of a storage; the arguments after the stride (grad flag, hooks) are not needed."""
    if not isinstance(storage, Storage) or not _is_count(offset):
        raise ValueError("a tensor without a storage")
    name = f"storage {storage.key}"
    if not (isinstance(shape, tuple) and isinstance(stride, tuple) and len(shape) == len(stride) <= 32):
        raise ValueError(f"{name}: expected equally many sizes and strides")
    if not all(_is_count(value) for value in (*shape, *stride)):
        raise ValueError(f"{name}: expected sizes and strides of 0 or more")
    count = math.prod(shape)
    last = (
        offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=True)) if count else offset
    )
    if count > storage.count or (count and last >= storage.count) or offset > storage.count:
        raise ValueError(
            f"{name}: a tensor of {count} values from value {offset} does not fit its {storage.count} values"
        )
    return Tensor(shape, storage.dtype, partial(_view, storage, offset, shape, stride))


def _is_count(value: object) -> TypeGuard[int]:
    return type(value) is int and 0 <= value < 2**63


def _view(storage: Storage, offset: int, shape: Shape, stride: Shape) -> AnyArray:
    count = math.prod(shape)
    if not count:
        return np.empty(shape, DTYPES[storage.dtype])
    dense = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    if all(size == 1 or have == want for size, have, want in zip(shape, stride, dense, strict=True)):
        return storage.fetch(offset, count).reshape(shape)
    extent = 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    values = storage.fetch(offset, extent)
    steps = [step * values.itemsize for step in stride]
    return np.ascontiguousarray(np.lib.stride_tricks.as_strided(values, shape, steps))


# -- the zip format ------------------------------------------------------------------------------------


def _read_zip(path: Path) -> Any:
    records = read_directory(path)
    tops = [name for name in records if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(tops) != 1:
        raise BadFileError(
            f"{path}: a zip archive, but expected one */data.pkl as torch.save writes, found {len(tops)}"
        )
    top = tops[0].removesuffix("data.pkl")
    if top + "constants.pkl" in records:
        raise BadFileError(f"{path}: a TorchScript program, not a checkpoint; save its state_dict() instead")
    if top + "byteorder" in records and records[top + "byteorder"].size < 16:
        order = read_record(path, records[top + "byteorder"])
        if order != b"little":
            raise BadFileError(f"{path}: expected little-endian numbers, found {order!r}")
    description = records[tops[0]]
    if description.size > MAX_PICKLE:
        raise BadFileError(
            f"{path}: {description.name} claims {description.size} bytes; at most {MAX_PICKLE} are read"
        )
    checked: set[str] = set()

    def persistent(identifier: object) -> Storage:
        key, dtype, count = _storage_of(identifier)
        record = records.get(f"{top}data/{key}")
        if record is None or record.size != count * DTYPES[dtype].itemsize:
            found = "no such record" if record is None else f"{record.size} bytes"
            raise BadFileError(f"{path}: storage {key}: expected {count} values of {dtype}, found {found}")
        return Storage(key, dtype, count, partial(_fetch_record, path, record, dtype, checked))

    data = io.BytesIO(read_record(path, description))
    return read_pickle(data, f"{path}: {description.name}", _known(), persistent)


def _fetch_record(
    path: Path, record: Record, dtype: str, checked: set[str], start: int, count: int
) -> AnyArray:
    """Values of a record; its checksum is compared at the first access."""
    width = DTYPES[dtype].itemsize
    values = read_range(path, record.name, record.start + start * width, DTYPES[dtype], count)
    if record.name not in checked:
        if values.nbytes == record.size:  # the usual case: a tensor is the whole storage
            check_bytes(path, record, values.view(np.uint8).data)
        else:
            check_record(path, record)
        checked.add(record.name)
    return values


def _storage_of(identifier: object) -> tuple[str, str, int]:
    """(key, dtype, count) of a persistent id ('storage', type, key, location, count[, view])."""
    if not isinstance(identifier, tuple) or len(identifier) not in (5, 6) or identifier[0] != "storage":
        raise ValueError(f"unknown persistent id {brief(identifier)}")
    _, kind, key, _, count, *view = identifier
    if not isinstance(kind, Name) or not isinstance(key, str) or not _is_count(count):
        raise ValueError(f"unknown persistent id {brief(identifier)}")
    if view and view[0] is not None:
        raise ValueError(
            f"storage {key} is a view of another, as torch before 0.4 wrote; save the file again"
        )
    return key, str(kind.value), count


# -- the legacy format ---------------------------------------------------------------------------------


def _read_legacy(path: Path) -> Any:
    """Five pickles (magic, protocol, system, objects, keys), then each storage: its count and its bytes."""
    storages: dict[str, tuple[str, int]] = {}
    starts: dict[str, int] = {}

    def persistent(identifier: object) -> Storage:
        key, dtype, count = _storage_of(identifier)
        if storages.setdefault(key, (dtype, count)) != (dtype, count):
            raise ValueError(f"storage {key} is described in two ways")
        return Storage(key, dtype, count, partial(_fetch_legacy, path, key, dtype, starts))

    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        bounded = _Bounded(file, MAX_PICKLE)
        if _plain(bounded, path) != _LEGACY_MAGIC:
            raise BadFileError(f"{path}: a pickle, but not one of torch.save")
        if (protocol := _plain(bounded, path)) != _LEGACY_PROTOCOL:
            raise BadFileError(f"{path}: expected torch protocol {_LEGACY_PROTOCOL}, found {brief(protocol)}")
        system = _plain(bounded, path)
        if not isinstance(system, Mapping) or system.get("little_endian") is not True:
            raise BadFileError(f"{path}: expected little-endian numbers, found {brief(system)}")
        value = read_pickle(bounded, str(path), _known(), persistent)
        keys = _plain(bounded, path)
        known = isinstance(keys, list) and all(isinstance(key, str) and key in storages for key in keys)
        if not known or len(set(keys)) != len(keys) or len(keys) != len(storages):
            raise BadFileError(f"{path}: the storages listed are not those that the tensors need")
        for key in keys:
            dtype, count = storages[key]
            found = int.from_bytes(file.read(8), "little")
            if found != count:
                raise BadFileError(f"{path}: storage {key}: expected {count} values, found {found}")
            starts[key] = file.tell()
            file.seek(min(starts[key] + count * DTYPES[dtype].itemsize, size + 1))
        if file.tell() != size:
            raise BadFileError(f"{path}: expected {file.tell()} bytes, found {size}: truncated or corrupt")
    return value


def _fetch_legacy(
    path: Path, key: str, dtype: str, starts: dict[str, int], start: int, count: int
) -> AnyArray:
    width = DTYPES[dtype].itemsize
    return read_range(path, f"storage {key}", starts[key] + start * width, DTYPES[dtype], count)


def _plain(file: Readable, path: Path) -> Any:
    return read_pickle(file, str(path), {}, _no_storage)


def _no_storage(identifier: object) -> Any:
    raise ValueError(f"unknown persistent id {brief(identifier)}")


class _Bounded:
    """Reads from a file up to a limit, and moves its position."""

    def __init__(self, file: BinaryIO, limit: int) -> None:
        self._file, self._left = file, limit

    def read(self, size: int, /) -> bytes:
        return self._count(self._file.read(min(size, self._left + 1)))

    def readline(self) -> bytes:
        return self._count(self._file.readline(self._left + 1))

    def _count(self, data: bytes) -> bytes:
        self._left -= len(data)
        if self._left < 0:
            raise ValueError(f"the pickle is larger than {MAX_PICKLE:,} bytes")
        return data
