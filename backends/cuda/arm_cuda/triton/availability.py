"""Checks whether the Triton kernels can run on this machine, by running one."""

from __future__ import annotations

import os
import re
from functools import cache
from importlib.metadata import PackageNotFoundError, version

import torch

OLDEST_TRITON = (3, 6)
OLDEST_GPU = (8, 0)
"""Compute capability of Ampere, the first with bfloat16."""


def unusable(device: str) -> str | None:
    """None if the kernels run on the device (`cuda`: the current GPU), else the reason and a remedy."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "TRITON_INTERPRET is set, and Triton's interpreter is for tests; unset it"
    if torch.device(device).type != "cuda":
        return "its kernels run on NVIDIA GPUs"
    try:
        found = version("triton")
    except PackageNotFoundError:
        return "Triton is not installed; pip install 'triton>=3.6'"
    return _too_old(found) or _no_gpu(device) or _broken(numbered(device))


def _too_old(found: str) -> str | None:
    numbers = tuple(int(number) for number in re.findall(r"\d+", found)[:2])
    oldest = ".".join(map(str, OLDEST_TRITON))
    return None if numbers >= OLDEST_TRITON else f"needs Triton {oldest} or newer, found {found}"


def numbered(device: str) -> torch.device:
    """The GPU with its index; `cuda` is the current one."""
    index = torch.device(device).index
    return torch.device("cuda", torch.cuda.current_device() if index is None else index)


def _no_gpu(device: str) -> str | None:
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA; install torch for CUDA from pytorch.org"
    if not torch.cuda.is_available():
        return "torch finds no NVIDIA GPU here"
    gpu = numbered(device)
    name, capability = torch.cuda.get_device_name(gpu), torch.cuda.get_device_capability(gpu)
    if capability < OLDEST_GPU:
        return (
            f"needs compute capability {OLDEST_GPU[0]}.{OLDEST_GPU[1]} (Ampere) or newer; "
            f"{name} has {capability[0]}.{capability[1]}"
        )
    return None


@cache
def _broken(device: torch.device) -> str | None:
    """Compile and run a small scan with its gradients; once per device."""
    try:
        from arm_cuda.triton import operators

        ones = torch.ones((1, 1, 1, 8), device=device, requires_grad=True)
        order = torch.zeros((1, 1), dtype=torch.int32, device=device)
        u = operators.directional_conv(ones[0], ones[0, 0, :, :, None], ones[0, 0], order)
        rows, vector = torch.ones_like(ones), ones[0, 0]
        rate = -torch.ones((1, 8, 8), device=device)
        out = operators.selective_scan(u, rows, rate, rows, rows, vector, vector, ones[0], order)
        (gradient,) = torch.autograd.grad(out.sum(), ones)
        return None if bool(gradient.isfinite().all()) else "its kernels give wrong results on this GPU"
    except Exception as error:  # the cause may be Triton's compiler, the driver or the C compiler
        text = str(error).strip() or "no message"
        return f"Triton {version('triton')} cannot run here: {type(error).__name__}: {text.splitlines()[0]}"
