"""How a training step is run in MLX: as one compiled graph, or operation by operation."""

from __future__ import annotations

import mlx.core as mx

from arm_core.engine.protocol import Compile, EngineOptions


def choose_compile(options: EngineOptions, scan: str, device: mx.Device) -> Compile:
    """The part of the step to compile. `AUTO`: the whole step with scan `metal` on a GPU, else nothing.

    On a CPU, MLX compiles with the system's C++ compiler, which takes half a minute for the first step and
    saves little time. With scan `reference`, the graph has tens of thousands of operations and compiles
    slowly.    Raises ValueError for parts that MLX cannot compile.
    """
    wanted = options.compile
    if wanted is Compile.AUTO:
        wanted = Compile.MODEL if device.type == mx.gpu and scan == "metal" else Compile.NONE
    if wanted is Compile.BLOCKS:
        raise ValueError("--compile: MLX compiles the whole step only; expected model or none, found blocks")
    if wanted is Compile.MODEL and scan == "cpu":
        raise ValueError("--compile: scan 'cpu' runs outside of MLX's graph; use --scan reference")
    if options.recompute and wanted is not Compile.MODEL:
        raise ValueError("--recompute saves memory in MLX only if the step is compiled; add --compile model")
    return wanted
