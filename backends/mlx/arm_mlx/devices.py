"""Devices of the MLX engine, and the CPU threads."""

from __future__ import annotations

import logging

import mlx.core as mx

from arm_core import cpu_kernels
from arm_mlx import blas

log = logging.getLogger("arm_mlx")


def devices() -> list[str]:
    """`gpu` if MLX has Metal, then `cpu`."""
    return ["gpu", "cpu"] if mx.metal.is_available() else ["cpu"]


def resolve_device(name: str) -> mx.Device:
    """The device with this name; `auto` is the Apple GPU, or the CPU without one. Raises ValueError."""
    if name == "auto":
        name = devices()[0]
    if name not in ("cpu", "gpu"):
        raise ValueError(f"device: expected auto, cpu or gpu, found {name!r}")
    if name not in devices():
        raise ValueError("device 'gpu' is not available: MLX finds no Metal GPU here")
    return mx.Device(mx.gpu if name == "gpu" else mx.cpu)


def device_name(device: mx.Device) -> str:
    """Human-readable name, also written to the run's record."""
    return str(mx.device_info()["device_name"]) if device.type == mx.gpu else "CPU"


def set_threads(count: int | None) -> None:
    """Set the threads of the CPU kernels and of OpenBLAS, the two that can be set; None changes nothing."""
    if count is None:
        return
    cpu_kernels.set_threads(count)
    if not blas.set_threads(count):
        library = blas.load().library
        log.warning("threads=%d applies to the CPU kernels only: %s has no such setting", count, library)
