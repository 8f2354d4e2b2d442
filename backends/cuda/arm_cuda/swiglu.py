"""The gate of the MLP in torch: one pass over the memory on a CPU, plain operators elsewhere."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F  # noqa: N812 (the field's name for it)
from torch import Tensor
from torch.autograd.function import once_differentiable

from arm_core import cpu_scan


def swiglu(a: Tensor, b: Tensor) -> Tensor:
    """silu(a) * b, element by element; a and b have one shape and dtype.

    float32 tensors on the CPU take the core's kernel, unless torch.compile, which fuses by itself, is
    tracing: a base model's step there is 3 % shorter for it.
    """
    kernel = a.device.type == "cpu" and a.dtype == b.dtype == torch.float32
    if kernel and not torch.compiler.is_compiling():
        return cast(Tensor, _CpuSwiGLU.apply(a, b))
    return F.silu(a) * b


class _CpuSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        arrays = (t.detach().numpy() for t in (a, b))
        return torch.from_numpy(cpu_scan.swiglu_forward(*arrays, threads=torch.get_num_threads()))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        arrays = (t.detach().numpy() for t in (grad, *ctx.saved_tensors))
        gradients = cpu_scan.swiglu_backward(*arrays, threads=torch.get_num_threads())
        return tuple(torch.from_numpy(g) for g in gradients)
