"""Runs MLX's Metal kernels on Linux, from the source that MLX generates for Apple's compiler.

    emulator = Emulator()
    monkeypatch.setattr(launch, "execute", emulator.execute)

Each call is traced for its source, compiled with g++ against a small `metal_stdlib`, and run with one fiber
per GPU thread. Fibers are synchronised at SIMD-group operations and barriers. A `KernelError` is raised for
an access out of bounds, an unwritten element, a barrier or SIMD-group operation that not all threads reach,
and for more threads or threadgroup memory than Apple GPUs have. Uninitialised registers and threadgroup
memory contain NaN or huge numbers, so that they are visible in the results.

It cannot check Apple's compiler and its registers, the accuracy of its exp2 and log, races within an
operation of one SIMD group, and speed.
"""

from __future__ import annotations

import ctypes
import itertools
from dataclasses import dataclass, field
from enum import IntEnum
from math import prod
from typing import Any

import mlx.core as mx
import numpy as np

from emulator.build import build, missing
from emulator.memory import POISON, Buffer
from emulator.trace import Launch, launches, trace

__all__ = ["Emulator", "KernelError", "Launch", "Schedule", "launches", "missing", "trace"]

MAX_THREADS = 1024
MAX_THREADGROUP_BYTES = 32768
STORED = {
    mx.float32: np.float32,
    mx.float16: np.float16,
    mx.bfloat16: np.uint16,
    mx.int32: np.int32,
    mx.uint32: np.uint32,
}


class KernelError(Exception):
    """A kernel did something that is not allowed."""


class Schedule(IntEnum):
    """The order in which threadgroups, SIMD groups and lanes take turns."""

    ASCENDING = 0
    DESCENDING = 1
    SHUFFLED = 2


class _Report(ctypes.Structure):
    _fields_ = (
        ("message", ctypes.c_char * 512),
        ("address", ctypes.c_void_p),
        ("threadgroup_bytes", ctypes.c_long),
    )


@dataclass
class Emulator:
    """Runs kernel calls in one schedule, and records them."""

    schedule: Schedule = Schedule.ASCENDING
    flags: tuple[str, ...] = ()
    """More options for g++."""
    launches: list[Launch] = field(default_factory=list)
    threadgroup_bytes: dict[str, int] = field(default_factory=dict)
    """The largest declared threadgroup memory, by kernel name."""

    def execute(self, kernel: Any, **call: Any) -> tuple[mx.array, ...]:
        """The results of `kernel(**call)` on an Apple GPU. Raises KernelError."""
        launch = trace(kernel, **call)
        self.launches.append(launch)
        if (threads := prod(launch.threadgroup)) > MAX_THREADS:
            raise KernelError(
                f"{launch.name}: {threads} threads in a threadgroup, expected at most {MAX_THREADS}"
            )

        # Arrays end at a guard page in two schedules and begin at one in the third: both ends are checked.
        at_end = self.schedule is not Schedule.DESCENDING
        buffers = []
        for i, (array, asked) in enumerate(zip(call["inputs"], launch.asked, strict=True)):
            values = np.ascontiguousarray(_stored(array)) if launch.rows else _stored(array)
            strides = [stride // values.itemsize for stride in values.strides]
            facts = (np.array(values.shape, np.int32), np.array(strides, np.int64), np.int32([values.ndim]))
            for content in (_in_memory(values), *itertools.compress(facts, asked)):
                buffers.append(Buffer(f"input {i}", content, content.nbytes, at_end=at_end))
        outputs = list(zip(call["output_shapes"], call["output_dtypes"], strict=True))
        for i, (shape, dtype) in enumerate(outputs):
            size = prod(shape) * np.dtype(STORED[dtype]).itemsize
            buffers.append(Buffer(f"output {i}", None, size, at_end=at_end))
        self._run(launch, buffers)

        results = []
        for buffer, (shape, dtype) in zip(buffers[-len(outputs) :], outputs, strict=True):
            stored = buffer.read(np.dtype(STORED[dtype]))
            poison = np.frombuffer(bytes([POISON]) * stored.itemsize, np.uint8).view(f"u{stored.itemsize}")
            if unwritten := int((stored.view(poison.dtype) == poison).sum()):
                raise KernelError(f"{launch.name}: {unwritten} elements of {buffer.name} are not written")
            array = mx.array(stored.reshape(shape))
            results.append(array.view(mx.bfloat16) if dtype == mx.bfloat16 else array)
        return tuple(results)

    def _run(self, launch: Launch, buffers: list[Buffer]) -> None:
        library = build(launch, self.flags)
        pointers = (ctypes.c_void_p * len(buffers))(*(buffer.address for buffer in buffers))
        library.emulator_bind(pointers)
        report, sizes = _Report(), ctypes.c_uint * 3
        library.emulator_launch(
            sizes(*launch.grid), sizes(*launch.threadgroup), int(self.schedule), ctypes.byref(report)
        )
        if message := report.message.decode():
            if report.address is not None:
                places = [buffer for buffer in buffers if buffer.contains(report.address)]
                offset = (
                    f" at byte {report.address - places[0].address} of {places[0].size}" if places else ""
                )
                message += f" of {places[0].name if places else 'threadgroup memory or worse'}{offset}"
            raise KernelError(f"{launch.name}: {message}")
        if overrun := [buffer.name for buffer in buffers if buffer.overrun()]:
            raise KernelError(f"{launch.name}: wrote beside {', '.join(overrun)}")
        most = max(report.threadgroup_bytes, self.threadgroup_bytes.get(launch.name, 0))
        self.threadgroup_bytes[launch.name] = most
        if most > MAX_THREADGROUP_BYTES:
            raise KernelError(
                f"{launch.name}: {most} bytes of threadgroup memory, expected at most {MAX_THREADGROUP_BYTES}"
            )


def _in_memory(values: np.ndarray) -> np.ndarray:
    """The memory from a view's first element to its last, with poison between its elements."""
    if values.flags.c_contiguous:
        return values
    assert min(values.strides) >= 0, "a view with negative strides"
    last = sum((size - 1) * stride for size, stride in zip(values.shape, values.strides, strict=True))
    memory = np.full(last + values.itemsize, POISON, np.uint8).view(values.dtype)
    np.lib.stride_tricks.as_strided(memory, values.shape, values.strides)[...] = values
    return memory


def _stored(array: mx.array) -> np.ndarray:
    """The array's values as NumPy can hold them, bfloat16 as its bits."""
    return np.asarray(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array)
