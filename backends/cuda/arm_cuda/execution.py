"""How a model's forward pass is run: compiled by torch, or with blocks recomputed in the backward pass.

Neither changes parameter names or results. Passes without gradients are not compiled: their batch sizes
differ, and each size would be compiled again.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from arm_core.engine.protocol import Compile, EngineOptions
from arm_cuda.model import PretrainModel

COMPILABLE = ("triton", "cuda", "reference")
"""Scans that torch can compile: plain operators, or custom operators with registered shapes."""

Forward = Callable[..., dict[str, Tensor]]


def choose_compile(options: EngineOptions, scan: str, device: torch.device) -> Compile:
    """The parts of the model to compile. Raises ValueError if they cannot be compiled here.

    `AUTO` compiles the blocks on a GPU if the scan is `triton` or `cuda`, which need the same compilers.
    Otherwise it compiles nothing: the loop of `reference` would be unrolled, and `mamba-ssm` cannot be
    compiled.
    """
    if options.compile is Compile.AUTO:
        on_gpu = device.type == "cuda" and scan in ("triton", "cuda")
        return Compile.BLOCKS if on_gpu else Compile.NONE
    if options.compile is Compile.NONE:
        return Compile.NONE
    if scan not in COMPILABLE:
        raise ValueError(
            f"scan {scan!r} cannot be compiled; --compile {options.compile} needs --scan "
            f"{' or '.join(COMPILABLE)}"
        )
    if options.compile is Compile.MODEL and (options.shard or options.recompute):
        raise ValueError(
            "--compile model works neither with --shard nor with --recompute; use --compile blocks"
        )
    compiler = os.environ.get("CXX", "g++")
    if device.type == "cpu" and shutil.which(compiler) is None:
        raise ValueError(f"--compile on a CPU needs a C++ compiler, but {compiler} is not installed")
    return options.compile


def execute(model: nn.Module, options: EngineOptions) -> Forward:
    """The model's forward pass with these options; the blocks are changed in place."""
    if options.recompute or options.compile is Compile.BLOCKS:
        for block in model.get_submodule("layers").children():
            block.forward = _block_forward(block.forward, options)
    if options.compile is Compile.BLOCKS and isinstance(model, PretrainModel):
        for block in model.decoder.children():
            block.forward = _compiled_in_training(block.forward)
    if options.compile is not Compile.MODEL:
        forward: Forward = model.forward
        return forward
    compiled: Forward = torch.compile(model.forward, fullgraph=True)
    return compiled


def _block_forward(plain: Callable[..., Tensor], options: EngineOptions) -> Callable[..., Tensor]:
    compile_it = options.compile is Compile.BLOCKS
    run: Callable[..., Tensor] = torch.compile(plain, fullgraph=True) if compile_it else plain

    def forward(x: Tensor, order: Tensor, scale: Tensor | None, name: str, seen: Any) -> Tensor:
        if not torch.is_grad_enabled():
            return plain(x, order, scale, name, seen)
        # No name: with names, the compiler would make one version per block.
        if not options.recompute:
            return run(x, order, scale, "", None)
        # No block draws random numbers: the drop-path factors are inputs.
        again = checkpoint(run, x, order, scale, "", None, use_reentrant=False, preserve_rng_state=False)
        assert isinstance(again, Tensor)
        return again

    return forward


def _compiled_in_training(plain: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Compiled if gradients are computed; without gradients, each batch size would be compiled again."""
    compiled: Callable[..., Tensor] = torch.compile(plain, fullgraph=True)

    def forward(*tensors: Tensor) -> Tensor:
        return compiled(*tensors) if torch.is_grad_enabled() else plain(*tensors)

    return forward
