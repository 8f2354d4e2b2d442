"""The mixer's two sequence operators in torch, by implementation.

`IMPLEMENTATIONS` is the table that `--scan` chooses from. Every implementation computes what
`arm_core.model.reference.scan` defines, with all gradients. Sizes: K directions, B images, L tokens,
D channels, N states, W convolution width.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F  # noqa: N812 (the field's name for it)
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from arm_core.engine.scans import Implementation, Implementations
from arm_cuda import cpu_operators, mamba_ssm
from arm_cuda.gate import transformed
from arm_cuda.triton import availability


def directional_conv(x: Tensor, weight: Tensor, bias: Tensor, order: Tensor, *, impl: str) -> Tensor:
    """Depthwise causal convolution along each direction's order, then SiLU.

    u[k, b, p_t] = silu(bias_k + sum_j weight_k[:, j] x[b, p_(t - W + 1 + j)]) with p = order[k];
    tokens before the first count as 0.

    x: (B, L, D).  weight: (K, D, W).  bias: (K, D).  order: (K, L) int32.  impl: see `IMPLEMENTATIONS`.
    Returns u: (K, B, L, D) in x.dtype.
    Raises ValueError on an unknown impl, and on a shape, dtype or device that impl does not take.
    """
    return IMPLEMENTATIONS[impl].directional_conv(x, weight, bias, order)


def selective_scan(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor, z: Tensor,
    order: Tensor, *, impl: str,
) -> Tensor:  # fmt: skip
    """Selective scan over K directions, their mean, and the gate.

    Along p = order[k], with step = softplus(dt[k, b, p] + dt_bias_k) and h = 0 before the first token:

        h = exp(step A_k) h + step B[k, b, p] u[k, b, p]          h: (D, N) float32
        y_k[p] = <C[k, b, p], h> + D_k u[k, b, p]
        out[b, p] = silu(z[b, p]) mean_k y_k[p]

    u, dt: (K, B, L, D); dt before bias and softplus.  A: (K, D, N), negative.  B, C: (K, B, L, N).
    D, dt_bias: (K, D).  z: (B, L, D).  order: (K, L) int32.  impl: see `IMPLEMENTATIONS`.
    Returns out: (B, L, D) in u.dtype; the state stays float32 (float64 for float64 inputs).
    Raises ValueError on an unknown impl, and on a shape, dtype or device that impl does not take.
    """
    return IMPLEMENTATIONS[impl].selective_scan(u, dt, A, B, C, D, dt_bias, z, order)


def scans(device: str) -> dict[str, str | None]:
    """Implementations in order of preference: None if usable on the device, else the reason."""
    return IMPLEMENTATIONS.usable(device)


# reference: plain torch with autograd, any device and dtype


def _reference_conv(x: Tensor, weight: Tensor, bias: Tensor, order: Tensor) -> Tensor:
    length, width = x.shape[1], weight.shape[2]
    steps = F.pad(x[:, order.long()], (0, 0, width - 1, 0)).transpose(0, 1)  # (K, B, W - 1 + L, D)
    weight = weight[:, None, None]  # (K, 1, 1, D, W)
    total = sum(steps[:, :, j : j + length] * weight[..., j] for j in range(width)) + bias[:, None, None]
    return _reorder(F.silu(total), order.argsort(1)).to(x.dtype)


def _reference_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    z: Tensor,
    order: Tensor,
) -> Tensor:
    """The recurrence as a loop over `unbind`: the backward pass of indexing `[:, t]` is quadratic in L."""
    dtype = u.dtype
    state_dtype = torch.promote_types(dtype, torch.float32)  # long products of decays lose bits in bfloat16
    u, dt, A, B, C, D, dt_bias, z = (t.to(state_dtype) for t in (u, dt, A, B, C, D, dt_bias, z))
    step = _reorder(F.softplus(dt + dt_bias[:, None, None], threshold=40), order)  # 20 loses float64's bits
    drive = step * _reorder(u, order)
    rate, ys = A[:, None], []  # (K, 1, D, N)
    h = u.new_zeros(*u.shape[:2], *A.shape[1:])  # (K, B, D, N)
    tokens = (t.unbind(2) for t in (step, drive, _reorder(B, order), _reorder(C, order)))
    for s, x, b, c in zip(*tokens, strict=True):
        h = torch.exp(s.unsqueeze(-1) * rate) * h + x.unsqueeze(-1) * b.unsqueeze(-2)
        ys.append((h * c.unsqueeze(-2)).sum(-1))
    y = _reorder(torch.stack(ys, 2), order.argsort(1)) + D[:, None, None] * u
    return (F.silu(z) * y.mean(0)).to(dtype)


def _reorder(x: Tensor, order: Tensor) -> Tensor:
    """Tokens of (K, B, L, ...), put into each direction's order."""
    return torch.take_along_dim(x, order.long()[:, None, :, None], dim=2)


# cpu: the Numba kernels of the core; the first call imports them, since GPUs do not need Numba


def _cpu_conv(x: Tensor, weight: Tensor, bias: Tensor, order: Tensor) -> Tensor:
    if transformed():
        return cpu_operators.directional_conv(x, weight, bias, order)
    result: Tensor = _CpuConv.apply(*_unshared(x, weight, bias, order))
    return result


def _cpu_scan(*tensors: Tensor) -> Tensor:
    if transformed():
        return cpu_operators.selective_scan(*tensors)
    save_for_backward = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    result: Tensor = _CpuScan.apply(save_for_backward, *_unshared(*tensors))
    return result


def _unshared(*tensors: Tensor) -> list[Tensor]:
    """The tensors, with the parameters among them copied; parameters are small.

    Sharding frees the memory of parameters between passes; torch forbids this for memory shared with NumPy.
    """
    return [t.clone() if isinstance(t, nn.Parameter) else t for t in tensors]


class _CpuConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        from arm_core import cpu_kernels

        u = cpu_kernels.conv_forward(*_arrays(*tensors), threads=torch.get_num_threads())
        return torch.from_numpy(u).to(tensors[0].dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_u: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        from arm_core import cpu_kernels

        gradients = cpu_kernels.conv_backward(*_arrays(grad_u, *tensors), threads=torch.get_num_threads())
        return *_like(gradients, tensors), None


class _CpuScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, save_for_backward: bool, *tensors: Tensor) -> Tensor:
        arrays = _arrays(*tensors)
        from arm_core import cpu_kernels

        out, residuals = cpu_kernels.scan_forward(
            *arrays, save_for_backward=save_for_backward, threads=torch.get_num_threads()
        )
        ctx.save_for_backward(*tensors)
        ctx.residuals = residuals
        return torch.from_numpy(out).to(tensors[0].dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        grad, *arrays = _arrays(grad_out, *tensors)
        from arm_core import cpu_kernels

        gradients = cpu_kernels.scan_backward(grad, ctx.residuals, *arrays, threads=torch.get_num_threads())
        return None, *_like(gradients, tensors), None


def _arrays(*tensors: Tensor) -> list[npt.NDArray[Any]]:
    """float32 and int32 tensors as zero-copy views, half-precision ones as float32 copies."""
    return [_array(tensor) for tensor in tensors]


def _array(tensor: Tensor) -> npt.NDArray[Any]:
    if tensor.device.type != "cpu":
        raise ValueError(
            f"scan 'cpu': expected tensors on the CPU, found {tensor.device}; move the model to the CPU"
        )
    if tensor.dtype in (torch.bfloat16, torch.float16):
        tensor = tensor.float()
    array: npt.NDArray[Any] = tensor.detach().numpy()
    if array.dtype not in (np.float32, np.int32):
        raise ValueError(f"scan 'cpu': expected float32, found {tensor.dtype}; use scan 'reference'")
    return array


def _like(gradients: tuple[npt.NDArray[Any], ...], tensors: tuple[Tensor, ...]) -> list[Tensor]:
    pairs = zip(gradients, tensors, strict=False)
    # Flattened first, so that axes of length 1 get torch's strides: DDP compares them.
    return [torch.from_numpy(g.reshape(-1)).view(t.shape).to(t.dtype) for g, t in pairs]


def _cpu_unusable(device: str) -> str | None:
    if device != "cpu":
        return "its kernels run on the CPU"
    return None if find_spec("numba") else "Numba is not installed; run: pip install numba"


# triton: kernels of this package; imported on use, since not every machine has Triton


def _triton_conv(*tensors: Tensor) -> Tensor:
    from arm_cuda.triton import operators

    return operators.directional_conv(*tensors)


def _triton_scan(*tensors: Tensor) -> Tensor:
    from arm_cuda.triton import operators

    return operators.selective_scan(*tensors)


def _native_scan(*tensors: Tensor) -> Tensor:
    from arm_cuda.triton import operators

    return operators.selective_scan(*tensors, kernel="cuda")


def _native_unusable(device: str) -> str | None:
    from arm_cuda.nvrtc import compiler

    return compiler.unusable(device)


IMPLEMENTATIONS: Implementations[Tensor] = Implementations(
    {
        "cpu": Implementation(
            directional_conv=_cpu_conv,
            selective_scan=_cpu_scan,
            unusable=_cpu_unusable,
        ),
        "triton": Implementation(
            directional_conv=_triton_conv,
            selective_scan=_triton_scan,
            unusable=availability.unusable,
        ),
        # Triton's, except for the scan's backward pass. After Triton until a GPU has measured it.
        "cuda": Implementation(
            directional_conv=_triton_conv,
            selective_scan=_native_scan,
            unusable=_native_unusable,
        ),
        "mamba-ssm": Implementation(
            directional_conv=mamba_ssm.directional_conv,
            selective_scan=mamba_ssm.selective_scan,
            unusable=mamba_ssm.unusable,
            note=mamba_ssm.convolution_note,
        ),
        "reference": Implementation(directional_conv=_reference_conv, selective_scan=_reference_scan),
    }
)
"""The choices of `--scan`; `auto` takes the first usable one."""
