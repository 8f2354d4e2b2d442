"""Chooses the library of MLX's matrix products on a CPU; this must happen before MLX is imported.

MLX's Linux wheel contains netlib's reference BLAS. It takes 1230 ms for a float32 product of
2048x768 and 768x2048; OpenBLAS takes 22 ms (two cores). The dynamic linker takes the first
`cblas_sgemm` that it finds, so a library that is loaded before MLX replaces it.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import sys
from dataclasses import dataclass
from functools import cache

BUNDLED = "the BLAS that MLX carries (netlib's reference BLAS in the wheel for Linux)"
INSTALL = "install OpenBLAS (Debian and Ubuntu: libopenblas0-pthread) for products that are 50x faster"


@dataclass(frozen=True, kw_only=True)
class Blas:
    """The library of MLX's matrix products on the CPU."""

    library: str
    """The name that is printed."""
    advice: str | None = None
    """How to make the products faster, if possible."""
    handle: ctypes.CDLL | None = None
    """The library itself, if it was loaded here."""


@cache
def load() -> Blas:
    """Load a system OpenBLAS for MLX, once per process; call it before `import mlx.core`.

    Returns the library that products will use. Never raises, since MLX works without OpenBLAS.
    """
    if sys.platform == "darwin":
        return Blas(library="Accelerate")
    if hasattr(ctypes.CDLL(None), "cblas_sgemm"):
        return Blas(library="a BLAS that this process had loaded before MLX")
    if "mlx.core" in sys.modules:
        return Blas(library=BUNDLED, advice="MLX was imported before arm_mlx: import arm_mlx first")
    name = ctypes.util.find_library("openblas")
    if name is None:
        return Blas(library=BUNDLED, advice=INSTALL)
    try:
        handle = ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        return Blas(library=BUNDLED, advice=f"{name} cannot be loaded: {error}")
    return Blas(library=f"OpenBLAS ({name})", handle=handle)


def set_threads(count: int) -> bool:
    """Set the CPU threads of matrix products; False if their library has no such setting."""
    handle = load().handle
    if handle is None:
        return False
    handle.openblas_set_num_threads(ctypes.c_int(count))
    return True
