"""Buffers between stretches of inaccessible memory, so that a kernel that leaves its array is caught."""

from __future__ import annotations

import ctypes
import mmap

import numpy as np

PAGE = mmap.PAGESIZE
GUARD = 64 * 2**20
"""Bytes of inaccessible memory on both sides; costs addresses, not memory."""
POISON = 0xFF
"""Fills every unwritten byte: NaN in each floating type, -1 in integers."""
_libc = ctypes.CDLL(None, use_errno=True)


def _protect(address: int, size: int, mode: int) -> None:
    if _libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(size), mode):
        raise OSError(ctypes.get_errno(), "mprotect failed")


class Buffer:
    """One array's memory: it ends where a guard page begins, or begins where one ends.

    The rest of its pages is poisoned; `overrun()` returns whether it was written.
    """

    def __init__(self, name: str, content: np.ndarray | None, size: int, *, at_end: bool) -> None:
        self.name, self.size = name, size
        self._whole = -(-size // PAGE) * PAGE
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        self._map = mmap.mmap(-1, self._whole + 2 * GUARD, flags=flags)
        self.first_page = ctypes.addressof(ctypes.c_char.from_buffer(self._map)) + GUARD
        self.address = self.first_page + (self._whole - size if at_end else 0)
        ctypes.memset(self.first_page, POISON, self._whole)
        if content is not None:
            ctypes.memmove(self.address, content.ctypes.data, size)
            _protect(self.first_page, self._whole, mmap.PROT_READ)
        for guard in (self.first_page - GUARD, self.first_page + self._whole):
            _protect(guard, GUARD, 0)  # PROT_NONE

    def contains(self, address: int) -> bool:
        """Whether an address is in the buffer, its pages or its guards."""
        return self.first_page - GUARD <= address < self.first_page + self._whole + GUARD

    def read(self, dtype: np.dtype) -> np.ndarray:
        return np.frombuffer(ctypes.string_at(self.address, self.size), dtype).copy()

    def overrun(self) -> bool:
        """Whether the unused memory beside the array was written."""
        before = ctypes.string_at(self.first_page, self.address - self.first_page)
        end = self.address + self.size
        after = ctypes.string_at(end, self.first_page + self._whole - end)
        return (before + after).strip(bytes([POISON])) != b""
