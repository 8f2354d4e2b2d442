"""Compiles `scan_backward.cu` by NVRTC and launches it, through NVIDIA's Python bindings.

The bindings (`cuda-bindings`) and NVRTC are requirements of torch for CUDA; no toolkit is needed.
"""

from __future__ import annotations

import ctypes
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from arm_cuda.nvrtc.launch import LANES, Build, source
from arm_cuda.triton import availability


def unusable(device: str) -> str | None:
    """None if the bindings and the Triton kernels, which do the rest, can be used; else the reason.

    NVRTC compiles the kernel at its first launch, which takes a second.
    """
    if reason := availability.unusable(device):
        return reason
    if find_spec("cuda") is None or find_spec("cuda.bindings") is None:
        return "cuda-bindings is not installed; pip install cuda-bindings"
    return None


def compile_cubin(build: Build, architecture: str) -> bytes:
    """Machine code for an architecture such as `sm_90`. Needs no GPU. Raises RuntimeError with the log."""
    nvrtc = import_module("cuda.bindings.nvrtc")
    program = _checked(nvrtc.nvrtcCreateProgram(source().encode(), b"scan_backward.cu", 0, [], []))
    options = [f"--gpu-architecture={architecture}", "--std=c++17"]
    options += [f"-D{name}={value}" for name, value in build.macros.items()]
    try:
        (failed,) = nvrtc.nvrtcCompileProgram(program, len(options), [o.encode() for o in options])
        if failed:
            log = b" " * _checked(nvrtc.nvrtcGetProgramLogSize(program))
            _checked(nvrtc.nvrtcGetProgramLog(program, log))
            raise RuntimeError(log.decode(errors="replace").strip("\0 \n"))
        code: bytes = b" " * _checked(nvrtc.nvrtcGetCUBINSize(program))
        _checked(nvrtc.nvrtcGetCUBIN(program, code))
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    return code


@cache
def _kernel(build: Build, device: int) -> Any:
    """The loaded function; the current device is `device`."""
    driver = import_module("cuda.bindings.driver")
    major, minor = torch.cuda.get_device_capability(device)
    module = _checked(driver.cuModuleLoadData(compile_cubin(build, f"sm_{major}{minor}")))
    return _checked(driver.cuModuleGetFunction(module, b"scan_backward"))


def launch(build: Build, programs: int, tensors: list[Tensor], sizes: list[int]) -> None:
    """Launch on the current stream of the current device."""
    driver = import_module("cuda.bindings.driver")
    values = (*(tensor.data_ptr() for tensor in tensors), *sizes)
    kinds = (ctypes.c_void_p,) * len(tensors) + (ctypes.c_int,) * len(sizes)
    function = _kernel(build, torch.cuda.current_device())
    stream = torch.cuda.current_stream().cuda_stream
    _checked(driver.cuLaunchKernel(function, programs, 1, 1, LANES, 1, 1, 0, stream, (values, kinds), 0))


def _checked(result: tuple[Any, ...]) -> Any:
    """The value of a call of the bindings. Raises RuntimeError if it failed."""
    error, *values = result
    if error:
        raise RuntimeError(f"CUDA: {error.name}")
    return values[0] if values else None
