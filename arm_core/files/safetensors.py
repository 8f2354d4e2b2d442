"""safetensors files: headers checked by the `safetensors` library, tensors streamed one at a time.

A file is an 8-byte little-endian length, that many bytes of JSON
`{"name": {"dtype", "shape", "data_offsets"}, "__metadata__": {str: str}}`, and the tensors' bytes, which
fill the rest without gaps.

The library validates headers. This module does the rest, for these reasons:

- Reading tensors: the library's NumPy interface cannot return bfloat16, and its memory map would end the
  process (SIGBUS) if the file were cut off while in use. A `Tensor` has a shape, a type and the offset of
  its bytes, which are read on demand.
- Writing: the library takes all tensors in memory at once, sorts them by name and follows symbolic links.
  Here they are computed and written one at a time, in the given order, to a new file that is flushed.

`tests/files/test_safetensors.py` reads the files of the library with this module, and the reverse.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from arm_core.files import bfloat16
from arm_core.files.atomic import create_file
from arm_core.files.errors import BadFileError, printable
from arm_core.files.reading import open_regular, parse_json

AnyArray = npt.NDArray[Any]
Shape = tuple[int, ...]

DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),  # its bits
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
"""Storage types by their safetensors names, as the NumPy type that holds their bits."""

FLOATS = ("F64", "F32", "F16", "BF16")

MAX_HEADER = 16 * 2**20
"""Largest header that is read, bytes; the largest official model needs 0.2 MB."""

MAX_AXES = 32


@dataclass(frozen=True)
class Tensor:
    """Shape and storage type of a tensor whose bytes are read on demand."""

    shape: Shape
    dtype: str
    """A key of `DTYPES`."""
    fetch: Callable[[], AnyArray]
    """Returns the stored values in `DTYPES[dtype]`, bfloat16 as its bits."""

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    def bits(self) -> AnyArray:
        """The stored values in `DTYPES[dtype]`, bfloat16 as its bits."""
        return self.fetch().reshape(self.shape)

    def read(self) -> AnyArray:
        """The values: float32 for F32, F16 and BF16, else the stored type."""
        bits = self.bits()
        if self.dtype == "BF16":
            return bfloat16.decode(bits)
        return bits.astype(np.float32) if self.dtype == "F16" else bits

    def map(self, shape: Shape, layout: Callable[[AnyArray], AnyArray]) -> Tensor:
        """The same values in another layout, converted by `layout` when they are read."""
        return Tensor(shape, self.dtype, lambda: layout(self.bits()))

    def cast(self, dtype: str) -> Tensor:
        """The same values rounded to another float type."""
        return self if dtype == self.dtype else Tensor(self.shape, dtype, lambda: encode(self.read(), dtype))

    @staticmethod
    def of(array: AnyArray) -> Tensor:
        """A tensor that holds the array; ValueError for a type that safetensors does not know."""
        plain = np.asarray(array)
        for name, dtype in DTYPES.items():
            if name != "BF16" and dtype == plain.dtype.newbyteorder("<"):
                return Tensor(plain.shape, name, lambda: plain)
        raise ValueError(f"cannot store an array of type {plain.dtype}; known are {', '.join(DTYPES)}")


def encode(values: AnyArray, dtype: str) -> AnyArray:
    """Values in a float storage type, rounded to nearest: `DTYPES[dtype]`, bfloat16 as its bits.

    Raises ValueError if a finite value does not fit the type (the limit of float16 is 65504).
    """
    if dtype == "BF16":
        return bfloat16.encode(values)
    with np.errstate(over="ignore"):
        cast = values.astype(DTYPES[dtype])
    if np.isinf(cast).any() and not np.array_equal(np.isinf(cast), np.isinf(values)):
        raise ValueError(f"{np.abs(values).max():.4g} is too large for {dtype}; choose BF16 or F32")
    return cast


@dataclass(frozen=True)
class TensorFile:
    """The content of one safetensors file; tensors are read on demand."""

    path: Path
    tensors: dict[str, Tensor]
    metadata: dict[str, str]


def read_tensors(path: Path) -> TensorFile:
    """Open a safetensors file: the whole header is checked, tensors are read later, one at a time.

    The `safetensors` library checks sizes, types and that the tensors fill the file. Checked here, since
    the library accepts them: names or keys that appear twice, names that cannot be printed, types that
    NumPy does not have, headers over 16 MiB. Raises BadFileError.
    """
    if not path.exists():
        raise BadFileError(f"{path}: no such file")
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        length, first = int.from_bytes(file.read(8), "little"), file.read(1)
        if size < 8 or first not in (b"{", b""):
            raise BadFileError(f"{path}: not a safetensors file")
        if length > size - 8:
            raise BadFileError(
                f"{path}: truncated: the header takes {length} bytes, the file has {size}; "
                "download or copy it again"
            )
        if length > MAX_HEADER:
            raise BadFileError(f"{path}: the header takes {length} bytes; at most {MAX_HEADER} are supported")
        text = first + file.read(length - 1)
    _check_with_library(path, text, size - 8 - length)
    header = parse_json(path, text)
    metadata: dict[str, str] = header.pop("__metadata__", None) or {}
    check_names(path, header)
    tensors = {name: _tensor(path, name, 8 + length, entry) for name, entry in header.items()}
    return TensorFile(path, tensors, metadata)


def _check_with_library(path: Path, header: bytes, available: int) -> None:
    """header: the JSON text.  available: bytes of the file after it."""
    try:
        with safe_open(str(path), "np"):
            pass
    except SafetensorError as error:
        reason = str(error).removeprefix("Error while deserializing header: ")
        if "not fully covered" in reason and (needed := _bytes_of_tensors(path, header)) > available:
            raise BadFileError(
                f"{path}: truncated: the tensors take {needed} bytes, the file has {available} of them; "
                "download or copy it again"
            ) from None
        raise BadFileError(f"{path}: corrupt safetensors header: {reason}") from None


def _bytes_of_tensors(path: Path, header: bytes) -> int:
    """The largest end of a tensor that a header names; 0 if the header is not valid."""
    try:
        entries = parse_json(path, header)
        entries.pop("__metadata__", None)
        return max((int(entry["data_offsets"][1]) for entry in entries.values()), default=0)
    except (BadFileError, TypeError, KeyError, IndexError, ValueError):
        return 0


def _tensor(path: Path, name: str, data: int, entry: dict[str, Any]) -> Tensor:
    """The tensor of a header entry that the library has accepted; data: offset of the tensors, bytes."""
    dtype, shape, start = entry["dtype"], tuple(entry["shape"]), data + entry["data_offsets"][0]
    if dtype not in DTYPES:
        raise BadFileError(f"{path}: {name}: type {dtype} is not supported; known are {', '.join(DTYPES)}")
    if len(shape) > MAX_AXES:
        raise BadFileError(f"{path}: {name}: expected at most {MAX_AXES} axes, found {len(shape)}")
    fetch = partial(read_range, path, name, start, DTYPES[dtype], math.prod(shape))
    return Tensor(shape, dtype, fetch)


def check_names(path: Path, names: Iterable[str]) -> None:
    """Refuse tensor names that contain control characters or are not Unicode."""
    for name in names:
        if not name.isprintable():
            raise BadFileError(f"{path}: {name[:80]}: expected a printable name")


def read_range(path: Path, name: str, start: int, dtype: np.dtype[Any], count: int) -> AnyArray:
    """`count` values of `dtype` from byte `start` on."""
    values = np.empty(count, dtype)
    with open_regular(path, buffering=0) as file:
        file.seek(start)
        view, done = values.view(np.uint8).data, 0
        while done < values.nbytes:
            got = file.readinto(view[done:])  # type: ignore[attr-defined]
            if not got:
                raise BadFileError(f"{path}: {name}: the file ends early; was it changed while being read?")
            done += got
    return values


def as_tensors(arrays: Mapping[str, Tensor | AnyArray]) -> dict[str, Tensor]:
    """Arrays and tensors as tensors."""
    return {name: value if isinstance(value, Tensor) else Tensor.of(value) for name, value in arrays.items()}


def write_tensors(
    path: Path, arrays: Mapping[str, Tensor | AnyArray], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a new safetensors file, one tensor at a time, and flush it to the disk.

    Wide types are first, so that every tensor is aligned. Otherwise the order is kept, so that equal content
    gives equal bytes. For an atomic write, write to a draft (`arm_core.files.atomic`). Raises ValueError
    for metadata that is not Unicode.
    """
    tensors = as_tensors(arrays)
    names = sorted(tensors, key=lambda name: -DTYPES[tensors[name].dtype].itemsize)
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for name in names:
        tensor = tensors[name]
        stop = position + tensor.nbytes
        header[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [position, stop]}
        position = stop
    try:
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        quoted = error.object[max(0, error.start - 30) : error.end + 30]
        raise ValueError(f"{path.name}: metadata is not valid Unicode: {printable(quoted)}") from None
    text += b" " * (-len(text) % 8)
    with create_file(path, buffering=0) as file:
        _write_all(file.fileno(), len(text).to_bytes(8, "little") + text)
        for name in names:
            values = np.ascontiguousarray(tensors[name].bits(), DTYPES[tensors[name].dtype])
            _write_all(file.fileno(), values.reshape(-1).view(np.uint8).data)
        os.fsync(file.fileno())


def _write_all(descriptor: int, data: bytes | memoryview) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
