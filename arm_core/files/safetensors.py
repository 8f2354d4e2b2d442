"""safetensors, read strictly and one tensor at a time, and written as a stream.

A file is an 8-byte little-endian length, that many bytes of JSON
`{"name": {"dtype", "shape", "data_offsets"}, "__metadata__": {str: str}}`, and the tensors' bytes, which
must fill the rest without gaps. A `Tensor` knows its shape and type and fetches its bytes when asked,
so a conversion holds one of them at a time. No framework is needed, and bfloat16 works.
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

from arm_core.files import bfloat16

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
"""Largest header read, bytes; the largest official model needs 0.2 MB."""


class BadFileError(ValueError):
    """A file that is damaged, hostile or of another kind; the message names file, tensor and repair.

    What the file itself says may stand in the message, so control characters are escaped.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


def printable(text: str) -> str:
    """Text of a file for a terminal: control characters and the like as escapes."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


@dataclass(frozen=True)
class Tensor:
    """Shape and storage type of a tensor whose bytes are fetched on demand."""

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
        """The same values in another layout, moved by `layout` when they are fetched."""
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

    Raises ValueError where a finite value does not fit the type (float16 ends at 65504).
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
    """Check the whole header of a safetensors file; tensor bytes are read later, one at a time."""
    if not path.is_file():
        raise BadFileError(f"{path}: no such file")
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise BadFileError(
                f"{path}: the header claims {length} bytes, the file has {size}: truncated or not safetensors"
            )
        if length > MAX_HEADER:
            raise BadFileError(f"{path}: the header claims {length} bytes; at most {MAX_HEADER} are read")
        header = parse_json(path, file.read(length))
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise BadFileError(f"{path}: __metadata__ must map names to strings")
    check_names(path, header)
    if not all(map(_is_unicode, (*metadata, *metadata.values()))):
        raise BadFileError(f"{path}: __metadata__ is not Unicode")
    ranges = {name: _tensor_range(path, name, entry) for name, entry in header.items()}
    data = 8 + length
    position = 0
    for name, (_, _, start, stop) in sorted(ranges.items(), key=lambda item: item[1][2:]):
        if start != position:
            what = "overlaps another tensor" if start < position else "leaves a gap"
            raise BadFileError(
                f"{path}: {name}: expected to start at byte {position}, found {start}: it {what}"
            )
        position = stop
    if data + position != size:
        raise BadFileError(
            f"{path}: the tensors take {position} bytes, the file holds {size - data}: truncated or damaged"
        )
    tensors = {
        name: Tensor(
            shape, dtype, partial(read_range, path, name, data + start, DTYPES[dtype], math.prod(shape))
        )
        for name, (dtype, shape, start, _) in ranges.items()
    }
    return TensorFile(path, tensors, metadata)


def parse_json(path: Path, text: bytes) -> dict[str, Any]:
    """A JSON object in which no key stands twice."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in pairs:
            if name in found:
                raise ValueError(f"{name!r} stands twice")
            found[name] = value
        return found

    try:
        value = json.loads(text.decode(), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:  # includes UnicodeDecodeError and JSONDecodeError
        raise BadFileError(f"{path}: not valid JSON: {str(error)[:200]}") from None
    if not isinstance(value, dict):
        raise BadFileError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def check_names(path: Path, names: Iterable[str]) -> None:
    """Refuse names that no program gives a tensor and no terminal should be shown."""
    for name in names:
        if not name.isprintable():
            raise BadFileError(f"{path}: {name[:80]}: expected a printable name")


def _is_unicode(text: str) -> bool:
    """False for half of a surrogate pair, which JSON can hold and no file can."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _tensor_range(path: Path, name: str, entry: object) -> tuple[str, Shape, int, int]:
    """(dtype, shape, start, stop) of a header entry, checked for itself."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise BadFileError(f"{path}: {name}: expected dtype, shape and data_offsets, found {str(entry)[:80]}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise BadFileError(f"{path}: {name}: unknown type {str(dtype)[:40]!r}; known are {', '.join(DTYPES)}")
    for what, values in (("shape", shape), ("data_offsets", offsets)):
        if not isinstance(values, list) or not all(type(v) is int and 0 <= v < 2**63 for v in values):
            raise BadFileError(
                f"{path}: {name}: {what} must be whole numbers of 0 or more, found {str(values)[:80]}"
            )
    if len(offsets) != 2 or len(shape) > 32:
        raise BadFileError(f"{path}: {name}: expected two data_offsets and at most 32 axes")
    start, stop = offsets
    expected = math.prod(shape) * DTYPES[dtype].itemsize
    if stop - start != expected:
        raise BadFileError(
            f"{path}: {name}: {dtype} {tuple(shape)} takes {expected} bytes, data_offsets hold {stop - start}"
        )
    return dtype, tuple(shape), start, stop


def read_range(path: Path, name: str, start: int, dtype: np.dtype[Any], count: int) -> AnyArray:
    """`count` values of `dtype` that begin at byte `start`."""
    values = np.empty(count, dtype)
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        view, done = values.view(np.uint8).data, 0
        while done < values.nbytes:
            got = file.readinto(view[done:])
            if not got:
                raise BadFileError(f"{path}: {name}: the file ends early; was it changed while being read?")
            done += got
    return values


def as_tensors(arrays: Mapping[str, Tensor | AnyArray]) -> dict[str, Tensor]:
    """Arrays and tensors alike as tensors."""
    return {name: value if isinstance(value, Tensor) else Tensor.of(value) for name, value in arrays.items()}


def write_tensors(
    path: Path, arrays: Mapping[str, Tensor | AnyArray], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file, one tensor at a time, and flush it to the disk.

    Wide types come first, so that every tensor is aligned, else the order is kept: equal content gives
    equal bytes. The file is written in place; a caller that needs atomicity renames it afterwards.
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
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb", buffering=0) as file:
        _write_all(file.fileno(), len(text).to_bytes(8, "little") + text)
        for name in names:
            values = np.ascontiguousarray(tensors[name].bits(), DTYPES[tensors[name].dtype])
            _write_all(file.fileno(), values.reshape(-1).view(np.uint8).data)
        os.fsync(file.fileno())


def _write_all(descriptor: int, data: bytes | memoryview) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
