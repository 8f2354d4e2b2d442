"""Writes `.pth` files without torch, one tensor at a time; `torch.load(..., weights_only=True)` reads them.

The zip archive holds a pickle of `{"model": OrderedDict of tensors, ...}`, built here, and one record for
each tensor.
"""

from __future__ import annotations

import math
import struct
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from arm_convert.torch_file import STORAGES
from arm_core.files.atomic import create_file
from arm_core.files.safetensors import DTYPES, Shape, Tensor

_CLASSES = {dtype: name for name, dtype in STORAGES.items()}
_TIME = (1980, 1, 1, 0, 0, 0)  # a constant, so that equal content gives equal bytes


def write_torch(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> None:
    """Write `{"model": tensors, "arm_vision": about}` to a new file; the caller flushes and renames it."""
    with create_file(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(zipfile.ZipInfo("archive/data.pkl", _TIME), _pickle(tensors, about))
        archive.writestr(zipfile.ZipInfo("archive/byteorder", _TIME), b"little")
        for key, tensor in enumerate(tensors.values()):
            values = np.ascontiguousarray(tensor.bits(), DTYPES[tensor.dtype])
            entry = zipfile.ZipInfo(f"archive/data/{key}", _TIME)
            with archive.open(entry, "w", force_zip64=values.nbytes >= 2**31) as record:
                record.write(values.reshape(-1).view(np.uint8).data)
        archive.writestr(zipfile.ZipInfo("archive/version", _TIME), b"3\n")


def _pickle(tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> bytes:
    """Pickle protocol 2, the same as in `torch.save`."""
    model = b"".join(_text(name) + _tensor(key, t) for key, (name, t) in enumerate(tensors.items()))
    words = b"".join(_text(name) + _text(value) for name, value in about.items())
    return b"".join(
        [
            b"\x80\x02}(",  # PROTO 2, EMPTY_DICT, MARK
            *(_text("model"), _ORDERED_DICT, b"(", model, b"u"),  # MARK, items, SETITEMS
            *(_text("arm_vision"), b"}(", words, b"u"),
            b"u.",  # SETITEMS, STOP
        ]
    )


_ORDERED_DICT = b"ccollections\nOrderedDict\n)R"  # GLOBAL, EMPTY_TUPLE, REDUCE


def _tensor(key: int, tensor: Tensor) -> bytes:
    storage = [
        b"(" + _text("storage"),  # MARK
        f"ctorch\n{_CLASSES[tensor.dtype]}\n".encode(),  # GLOBAL
        _text(str(key)) + _text("cpu") + _integer(math.prod(tensor.shape)),
        b"tQ",  # TUPLE, BINPERSID
    ]
    rebuild = b"ctorch._utils\n_rebuild_tensor_v2\n("
    view = _integer(0) + _sizes(tensor.shape) + _sizes(tuple(_strides(tensor.shape)))
    return rebuild + b"".join(storage) + view + b"\x89" + _ORDERED_DICT + b"tR"  # NEWFALSE .. TUPLE, REDUCE


def _strides(shape: Shape) -> Iterator[int]:
    return (math.prod(shape[i + 1 :]) for i in range(len(shape)))


def _text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data  # BINUNICODE


def _integer(value: int) -> bytes:
    if value < 2**31:
        return b"J" + struct.pack("<i", value)  # BININT
    return b"\x8a\x09" + value.to_bytes(9, "little")  # LONG1


def _sizes(values: Shape) -> bytes:
    return b"(" + b"".join(map(_integer, values)) + b"t"
