"""Compiles `scan_backward.cu` for the CPU and runs it, a warp at a time; see emulator.cpp."""

from __future__ import annotations

import atexit
import ctypes
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

from torch import Tensor

from arm_cuda.nvrtc import launch
from arm_cuda.nvrtc.launch import Build

HERE = Path(__file__).parent


def missing() -> str | None:
    return None if shutil.which("g++") else "needs g++ to emulate the CUDA kernel"


@cache
def folder() -> Path:
    path = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


@cache
def compiled(build: Build, source: str) -> Callable[..., int]:
    kernel = folder() / "scan_backward.cu"
    kernel.write_text(source)
    library = folder() / f"{abs(hash((build, source)))}.so"
    macros = [f"-D{name}={value}" for name, value in build.macros.items()]
    subprocess.run(
        ["g++", "-std=c++20", "-O1", "-fPIC", "-shared", "-DEMULATED", f'-DSOURCE="{kernel}"', f"-I{HERE}",
         *macros, "-o", library, HERE / "emulator.cpp"],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    run: Callable[..., int] = ctypes.CDLL(str(library)).run
    return run


def execute(build: Build, programs: int, tensors: list[Tensor], sizes: list[int]) -> None:
    """Stands in for `arm_cuda.nvrtc.launch.execute`."""
    pointers = (ctypes.c_void_p * len(tensors))(*(tensor.data_ptr() for tensor in tensors))
    values = (ctypes.c_int * len(sizes))(*sizes)
    diverged = compiled(build, launch.source())(programs, pointers, values)
    assert not diverged, "the lanes of a warp wait at different exchanges"
