"""One direction of the official mixer without its output projection, like `mamba_inner_fn_no_out_proj`.

It is one autograd function from the projected tokens to the gated result. The forward pass saves neither the
convolution's output nor dt. The backward pass recomputes both, and writes the gradients of x and z into the
halves of one buffer. The four kernels are an argument: those of mamba-ssm and causal-conv1d, or plain torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (the field's name for it)
from torch import Tensor

Function = Callable[..., Any]


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """The kernels below mamba-ssm's public functions. Tensors are (B, D, L), B and C (B, 1, N, L)."""

    conv_forward: Function
    """(x, weight (D, W), bias) -> silu of the convolution"""
    conv_backward: Function
    """(x, weight, bias, gradient, dx to write) -> dx, dweight, dbias"""
    scan_forward: Function
    """(u, dt, A, B, C, D, z, dt_bias) -> y before the gate, intermediates, y after the gate"""
    scan_backward: Function
    """(u, dt, A, B, C, D, z, dt_bias, gradient, intermediates, y, dz to write)
    -> du, ddt, dA, dB, dC, dD, ddt_bias"""


def mamba_kernels() -> Kernels:
    """Those of the installed packages."""
    import selective_scan_cuda
    from causal_conv1d.cpp_functions import causal_conv1d_bwd_function, causal_conv1d_fwd_function

    def conv_backward(x: Tensor, weight: Tensor, bias: Tensor, grad: Tensor, dx: Tensor) -> Any:
        return causal_conv1d_bwd_function(x, weight, bias, grad, None, None, None, dx, False, True)[:3]

    def scan_backward(*arguments: Tensor) -> Any:
        return selective_scan_cuda.bwd(*arguments, True, False)[:7]

    return Kernels(
        conv_forward=lambda x, weight, bias: causal_conv1d_fwd_function(
            x, weight, bias, None, None, None, True
        ),
        conv_backward=conv_backward,
        scan_forward=lambda *arguments: selective_scan_cuda.fwd(*arguments, True),
        scan_backward=scan_backward,
    )


def plain_kernels(scan: Function, conv: Function) -> Kernels:
    """The same signatures on functions with autograd."""

    def differentiated(function: Function, inputs: list[Tensor], grad: Tensor) -> tuple[Tensor, ...]:
        leaves = [t.detach().requires_grad_() for t in inputs]
        with torch.enable_grad():
            out = function(*leaves)
        return torch.autograd.grad(out, leaves, grad)

    def conv_backward(x: Tensor, weight: Tensor, bias: Tensor, grad: Tensor, dx: Tensor) -> Any:
        found = differentiated(lambda *t: conv(*t, activation="silu"), [x, weight, bias], grad)
        return dx.copy_(found[0]), *found[1:]

    def gated(*t: Tensor) -> Tensor:
        out: Tensor = scan(*t[:6], z=t[6], delta_bias=t[7], delta_softplus=True)
        return out

    def scan_backward(*arguments: Tensor) -> Any:
        *inputs, grad, _, _, dz = arguments
        *found, of_z, of_bias = differentiated(gated, inputs, grad)
        dz.copy_(of_z)
        return *found, of_bias

    def scan_forward(*inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        out = gated(*inputs)
        return out, out.new_empty(0), out

    return Kernels(
        conv_forward=lambda *t: conv(*t, activation="silu"), conv_backward=conv_backward,
        scan_forward=scan_forward, scan_backward=scan_backward,
    )  # fmt: skip


def inner(
    xz: Tensor, weight: Tensor, bias: Tensor, x_proj: Tensor, dt_proj: Tensor, A: Tensor, D: Tensor,
    dt_bias: Tensor, *, kernels: Kernels,
) -> Tensor:  # fmt: skip
    """xz: (B, 2 D, L) in scan order.  weight: (D, W).  x_proj: (R + 2 N, D).  dt_proj: (D, R).  A: (D, N).

    Returns the gated result, (B, D, L).
    """
    if torch.is_autocast_enabled(xz.device.type):
        dtype = torch.get_autocast_dtype(xz.device.type)
        xz, weight, bias, x_proj, dt_proj = (t.to(dtype) for t in (xz, weight, bias, x_proj, dt_proj))
    with torch.autocast(xz.device.type, enabled=False):
        result: Tensor = _Inner.apply(kernels, xz, weight, bias, x_proj, dt_proj, A, D, dt_bias)
    return result


class _Inner(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kernels: Kernels, *tensors: Tensor) -> Tensor:
        xz, weight, bias, x_proj, dt_proj, A, D, dt_bias = tensors
        x, z = xz.chunk(2, dim=1)
        u = kernels.conv_forward(x, weight, bias)
        low = F.linear(u.transpose(1, 2).reshape(-1, u.shape[1]), x_proj)
        rank, states = dt_proj.shape[1], A.shape[1]
        dt = _steps(dt_proj, low, u)
        B, C = (_rows(part, u) for part in low[:, rank:].split(states, dim=1))
        y, intermediates, out = kernels.scan_forward(u, dt, A, B, C, D, z, dt_bias)
        ctx.kernels = kernels
        ctx.save_for_backward(*tensors, low, B, C, y, intermediates)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        kernels = ctx.kernels
        xz, weight, bias, x_proj, dt_proj, A, D, dt_bias, low, B, C, y, intermediates = ctx.saved_tensors
        x, z = xz.chunk(2, dim=1)
        u = kernels.conv_forward(x, weight, bias)
        dt = _steps(dt_proj, low, u)
        grad_xz = torch.empty_like(xz)
        dx, dz = grad_xz.chunk(2, dim=1)
        du, ddt, dA, dB, dC, dD, ddt_bias = kernels.scan_backward(
            u, dt, A, B, C, D, z, dt_bias, grad.contiguous(), intermediates, y, dz
        )
        rank = dt_proj.shape[1]
        grad_low = torch.empty_like(low)
        steps = ddt.transpose(0, 1).reshape(len(dt_proj), -1)  # (D, B L)
        grad_low[:, rank:] = torch.cat([part.squeeze(1) for part in (dB, dC)], 1).mT.reshape(len(low), -1)
        grad_low[:, :rank] = steps.t() @ dt_proj
        grad_dt_proj = steps @ low[:, :rank]
        by_token = u.transpose(1, 2).reshape(len(low), -1)
        grad_x_proj = grad_low.t() @ by_token
        du = du + (grad_low @ x_proj).view(len(u), -1, u.shape[1]).transpose(1, 2)
        _, grad_weight, grad_bias = kernels.conv_backward(x, weight, bias, du.contiguous(), dx)
        return None, grad_xz, grad_weight, grad_bias, grad_x_proj, grad_dt_proj, dA, dD, ddt_bias


def _steps(dt_proj: Tensor, low: Tensor, u: Tensor) -> Tensor:
    """dt before bias and softplus, (B, D, L) contiguous."""
    flat = dt_proj @ low[:, : dt_proj.shape[1]].t()
    return flat.view(len(dt_proj), len(u), -1).transpose(0, 1).contiguous()


def _rows(part: Tensor, u: Tensor) -> Tensor:
    """(B L, N) -> (B, 1, N, L)"""
    return part.view(len(u), -1, part.shape[1]).transpose(1, 2).unsqueeze(1).contiguous()
