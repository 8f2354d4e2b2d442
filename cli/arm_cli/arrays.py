"""Images as arrays in .npy files."""

from __future__ import annotations

import math
import os
import re
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from arm_core.files.errors import BadFileError, reading
from arm_core.files.reading import open_regular

Array = npt.NDArray[np.float32]

_HEADER = re.compile(
    rb"\{'descr': '([^']{1,20})', 'fortran_order': (True|False), "
    rb"'shape': \(((?:\d{1,15}, ?){0,32}\d{0,15})\), ?\} *\n"
)
_MAX_HEADER = 4096


def read_array(name: str, size: tuple[int, int], channels: int) -> Array:
    """Normalised images (B, 3, H, W) float32 from a .npy file, as (B, H, W, 3).

    The header must be what `numpy.save` writes, and its shape must match the size of the file, before
    memory is allocated. Raises ValueError naming the file.
    """
    expected = f"expected float32 (images, {channels}, {size[0]}, {size[1]})"
    with open_regular(name) as file, reading(name):
        dtype, fortran, shape = _read_header(name, file, expected)
        if dtype != "<f4" or len(shape) != 4 or shape[1:] != (channels, *size) or not shape[0]:
            raise BadFileError(f"{name}: {expected}, found {dtype} {shape}")
        found, needed = os.fstat(file.fileno()).st_size - file.tell(), 4 * math.prod(shape)
        if found != needed:
            raise BadFileError(
                f"{name}: {shape} takes {needed:,} bytes, found {found:,}: truncated or corrupt"
            )
        array = np.fromfile(file, "<f4").reshape(shape, order="F" if fortran else "C")
    if not np.isfinite(array).all():
        raise BadFileError(f"{name}: contains NaN or infinite values")
    return np.ascontiguousarray(array.transpose(0, 2, 3, 1))


def _read_header(name: str, file: BinaryIO, expected: str) -> tuple[str, bool, tuple[int, ...]]:
    """Type, memory order and shape in the header of a .npy file. The file's position moves to the values."""
    start = file.read(8)
    if start[:4] == b"PK\3\4":
        raise BadFileError(f"{name}: {expected} in a .npy file, found an .npz archive; save the array alone")
    if start[:6] != b"\x93NUMPY" or start[6:] not in (b"\1\0", b"\2\0", b"\3\0"):
        raise BadFileError(f"{name}: {expected} in a .npy file; this is not one")
    length = int.from_bytes(file.read(2 if start[6] == 1 else 4), "little")
    header = _HEADER.fullmatch(file.read(min(length, _MAX_HEADER)))
    if header is None or length > _MAX_HEADER:
        raise BadFileError(
            f"{name}: expected the header of a .npy file as numpy.save writes it; is it corrupt?"
        )
    shape = tuple(int(side) for side in re.findall(rb"\d+", header[3]))
    return header[1].decode("latin-1"), header[2] == b"True", shape
