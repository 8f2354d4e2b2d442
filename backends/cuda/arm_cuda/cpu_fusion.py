"""Passes over the memory that the model saves on a CPU, where memory is slow beside arithmetic.

float32 tensors on the CPU take them, unless autocast or torch.compile, which fuses by itself, is at work;
elsewhere the same functions are plain operators.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F  # noqa: N812 (the field's name for it)
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from arm_core import cpu_kernels


def swiglu(x: Tensor, w1: nn.Linear, w2: nn.Linear) -> Tensor:
    """silu(w1(x)) * w2(x).

    The gate takes one pass of the core's kernel forward and one backward, and both gradients of x are added
    by the second matrix product: a base classifier's step is 1 % shorter.

    x: (B, T, in).  Returns (B, T, out).
    """
    parameters = w1.weight, w1.bias, w2.weight, w2.bias
    if _fuses(x, *parameters):
        rows: Tensor = _SwiGLU.apply(x.flatten(0, 1), *parameters)
        return rows.view(*x.shape[:2], -1)
    return cast(Tensor, F.silu(w1(x)) * w2(x))


def project(x: Tensor, weight: Tensor) -> Tensor:
    """One matrix product per direction. x: (K, B, T, in).  weight: (K, out, in).  -> (K, B, T, out)."""
    return torch.bmm(x.flatten(1, 2), weight.mT).view(*x.shape[:3], -1)


def project_and_pass(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """`project`, and x itself for its one other use.

    With the use of what is returned both gradients of x come back together, and the matrix product adds its
    own to the other in place: a base classifier's step is 1 % shorter than with a pass for the sum.
    """
    if _fuses(x, weight):
        return cast(tuple[Tensor, Tensor], _ProjectAndPass.apply(x, weight))
    return project(x, weight), x


def _fuses(*tensors: Tensor) -> bool:
    fits = all(t.device.type == "cpu" and t.dtype == torch.float32 for t in tensors)
    return fits and not torch.is_autocast_enabled("cpu") and not torch.compiler.is_compiling()


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        a, b = torch.addmm(b1, x, w1.mT), torch.addmm(b2, x, w2.mT)
        ctx.save_for_backward(x, w1, w2, a, b)
        out = cpu_kernels.swiglu_forward(a.numpy(), b.numpy(), threads=torch.get_num_threads())
        return torch.from_numpy(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        x, w1, w2, a, b = ctx.saved_tensors
        arrays = (t.numpy() for t in (grad, a, b))
        gradients = cpu_kernels.swiglu_backward(*arrays, threads=torch.get_num_threads())
        grad_a, grad_b = (torch.from_numpy(g) for g in gradients)
        grad_x = torch.mm(grad_a, w1).addmm_(grad_b, w2)
        return grad_x, grad_a.mT @ x, grad_a.sum(0), grad_b.mT @ x, grad_b.sum(0)


class _ProjectAndPass(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, weight)
        return project(x, weight), x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_x: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        grad = grad.flatten(1, 2)
        # In place: the other use of x made this gradient, and nobody else holds it.
        total = grad_x.flatten(1, 2).baddbmm_(grad, weight)
        return total.view_as(x), torch.bmm(grad.mT, x.flatten(1, 2))
