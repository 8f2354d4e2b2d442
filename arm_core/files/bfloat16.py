"""bfloat16 for NumPy, which lacks the type: its bits as uint16, the upper half of a float32."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt


def decode(bits: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    """The float32 values of bfloat16 bits; exact."""
    return np.left_shift(bits, 16, dtype=np.uint32).view(np.float32)


def encode(values: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.uint16]:
    """bfloat16 bits of float32 values, rounded to nearest, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    nearest = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    upper = (nearest >> np.uint32(16)).astype(np.uint16)
    nan = np.isnan(values)
    if nan.any():
        kept = (bits >> np.uint32(16)).astype(np.uint16)
        # Dropping a payload in the lower half would give the bits of infinity: set the quiet bit.
        upper = np.where(nan, np.where(kept & np.uint16(0x7F), kept, kept | np.uint16(0x40)), upper)
    return upper.reshape(np.shape(values))
