"""Devices of the torch engine, their memory, and the CPU threads."""

from __future__ import annotations

import ctypes
import os
import sys

import torch


def devices() -> list[str]:
    """`cuda:0` and so on for every NVIDIA GPU, then `cpu`."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [*(f"cuda:{i}" for i in range(count)), "cpu"]


def resolve_device(name: str) -> torch.device:
    """The device with this name; `auto` is the first GPU, or the CPU without one. Raises ValueError."""
    if name == "auto":
        name = devices()[0]
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device: expected auto, cpu, cuda or cuda:N, found {name!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device: expected auto, cpu, cuda or cuda:N, found {name!r}")
    if device.type == "cpu":
        return torch.device("cpu")
    index = device.index or 0
    if index >= (count := torch.cuda.device_count()):
        raise ValueError(f"device {name!r} is not available: torch finds {count} GPU(s) here")
    return torch.device("cuda", index)


def local_device(name: str) -> torch.device:
    """The device of one of several processes on this machine: one GPU each, or the CPU. Raises ValueError."""
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if name not in ("auto", "cuda"):
        raise ValueError(
            f"device: torchrun assigns one device to each process; expected cuda or cpu, found {name!r}"
        )
    local_rank = int(os.environ["LOCAL_RANK"])
    if local_rank >= (count := torch.cuda.device_count()):
        raise ValueError(
            f"torchrun started at least {local_rank + 1} processes here, but torch finds {count} GPU(s)"
        )
    return torch.device("cuda", local_rank)


def device_name(device: torch.device) -> str:
    """Human-readable name, also written to the run's record."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def device_memory(device: torch.device) -> int:
    """Memory in bytes of the GPU, or of the machine for the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def set_threads(count: int | None) -> None:
    """Set the CPU threads of torch and of the CPU kernels; None keeps torch's default."""
    threads = count or torch.get_num_threads()
    from arm_core import cpu_kernels  # not on a GPU: Numba is not needed there

    cpu_kernels.start_threads()  # resets torch's count, on which the last bits of a sum depend
    torch.set_num_threads(threads)


def keep_freed_memory() -> None:
    """Let the process keep freed memory for the next step, if the C library is glibc.

    Every step frees and allocates gradients and activations. By default glibc returns them to the system,
    and allocating them again costs a page fault per page: a tenth of the time of a base model's step.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        m_trim_threshold, m_mmap_threshold = -1, -3  # malloc.h
        libc.mallopt(m_trim_threshold, -1)  # never
        libc.mallopt(m_mmap_threshold, 1 << 30)  # bytes; larger blocks are returned
