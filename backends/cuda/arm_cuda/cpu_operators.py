"""The CPU kernels as torch operators with registered shapes, for torch.compile, torch.export and torch.func.

Eager code calls the kernels through plain autograd functions (`arm_cuda.scan`), which cost less per call.
torch.func needs autograd functions with a `setup_context`; they are at the end of this file.
"""

from __future__ import annotations

from typing import Any, NoReturn

import numpy.typing as npt
import torch
from torch import Tensor


def directional_conv(x: Tensor, weight: Tensor, bias: Tensor, order: Tensor) -> Tensor:
    """Same as `arm_cuda.scan.directional_conv`, on the CPU."""
    tensors = (*(t.float() for t in (x, weight, bias)), order)
    result: Tensor = _Conv.apply(*tensors) if function_transform() else conv(*tensors)
    return result.to(x.dtype)


def selective_scan(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor, z: Tensor,
    order: Tensor,
) -> Tensor:  # fmt: skip
    """Same as `arm_cuda.scan.selective_scan`, on the CPU."""
    tensors = [t.float() for t in (u, dt, A, B, C, D, dt_bias, z)]
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    results = _Scan.apply(*tensors, order, True) if function_transform() else scan(*tensors, order, keep)
    result: Tensor = results[0]
    return result.to(u.dtype)


def function_transform() -> bool:
    """Whether torch.func transforms the code; registered operators have no gradients there."""
    active: bool = torch._C._are_functorch_transforms_active()
    return active


def _arrays(*tensors: Tensor) -> list[npt.NDArray[Any]]:
    return [t.detach().numpy() for t in tensors]


def _kernels() -> Any:
    """The kernels of the core; importing them imports Numba, which other scans do not need."""
    from arm_core import cpu_kernels

    return cpu_kernels


def _threads() -> int:
    return torch.get_num_threads()


@torch.library.custom_op("arm_cuda::cpu_conv", mutates_args=(), device_types="cpu")
def conv(x: Tensor, weight: Tensor, bias: Tensor, order: Tensor) -> Tensor:
    return torch.from_numpy(_kernels().conv_forward(*_arrays(x, weight, bias, order), threads=_threads()))


@torch.library.custom_op("arm_cuda::cpu_conv_backward", mutates_args=(), device_types="cpu")
def conv_backward(
    grad_u: Tensor, x: Tensor, weight: Tensor, bias: Tensor, order: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    found = _kernels().conv_backward(*_arrays(grad_u, x, weight, bias, order), threads=_threads())
    grad_x, grad_weight, grad_bias = (torch.from_numpy(g).contiguous() for g in found)
    return grad_x, grad_weight, grad_bias


@torch.library.custom_op("arm_cuda::cpu_scan", mutates_args=(), device_types="cpu")
def scan(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor, z: Tensor,
    order: Tensor, save_for_backward: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    arrays = _arrays(u, dt, A, B, C, D, dt_bias, z, order)
    out, residuals = _kernels().scan_forward(*arrays, save_for_backward=save_for_backward, threads=_threads())
    if residuals is None:
        return torch.from_numpy(out), u.new_empty(0), u.new_empty(0)
    return torch.from_numpy(out), torch.from_numpy(residuals.mean), torch.from_numpy(residuals.states)


@torch.library.custom_op("arm_cuda::cpu_scan_backward", mutates_args=(), device_types="cpu")
def scan_backward(
    grad_out: Tensor, mean: Tensor, states: Tensor, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor,
    D: Tensor, dt_bias: Tensor, z: Tensor, order: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    grad, kept, states_, *arrays = _arrays(grad_out, mean, states, u, dt, A, B, C, D, dt_bias, z, order)
    residuals = _kernels().ScanResiduals(kept, states_)
    found = _kernels().scan_backward(grad, residuals, *arrays, threads=_threads())
    du, ddt, dA, dB, dC, dD, dbias, dz = (torch.from_numpy(g).contiguous() for g in found)
    return du, ddt, dA, dB, dC, dD, dbias, dz


def _like(tensor: Tensor) -> Tensor:
    return tensor.new_empty(tensor.shape)


@conv.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, order: Tensor) -> Tensor:
    return x.new_empty((weight.shape[0], *x.shape))


@conv_backward.register_fake
def _(
    grad_u: Tensor, x: Tensor, weight: Tensor, bias: Tensor, order: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return _like(x), _like(weight), _like(bias)


@scan.register_fake
def _(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor, z: Tensor,
    order: Tensor, save_for_backward: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    if not save_for_backward:
        return _like(z), u.new_empty(0), u.new_empty(0)
    from arm_core.cpu_kernels.scan import CHUNK
    from arm_core.cpu_kernels.simd import LANES

    directions, batch, length, width = u.shape
    blocks, chunks = (width + LANES - 1) // LANES, (length + CHUNK - 1) // CHUNK
    mean = u.new_empty((batch, length, blocks * LANES))
    return _like(z), mean, u.new_empty((directions, batch, chunks, blocks, A.shape[2], LANES))


@scan_backward.register_fake
def _(
    grad_out: Tensor, mean: Tensor, states: Tensor, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor,
    D: Tensor, dt_bias: Tensor, z: Tensor, order: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return _like(u), _like(dt), _like(A), _like(B), _like(C), _like(D), _like(dt_bias), _like(z)


def _save_conv(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _conv_gradients(ctx: Any, grad_u: Tensor) -> tuple[Tensor | None, ...]:
    return *conv_backward(grad_u.contiguous(), *ctx.saved_tensors), None


def _save_scan(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, _ = inputs
    _, mean, states = output
    ctx.save_for_backward(mean, states, *tensors)


def _scan_gradients(ctx: Any, grad_out: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    return *scan_backward(grad_out.contiguous(), *ctx.saved_tensors), None, None


def _refuse(ctx: Any, *gradients: Tensor) -> NoReturn:
    raise RuntimeError("scan 'cpu' has no second derivative; use scan 'reference' to differentiate twice")


conv.register_autograd(_conv_gradients, setup_context=_save_conv)
scan.register_autograd(_scan_gradients, setup_context=_save_scan)
conv_backward.register_autograd(_refuse)
scan_backward.register_autograd(_refuse)


# torch.func needs a `setup_context` in every function, backward passes included


def _no_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    pass


class _ConvBackward(torch.autograd.Function):
    @staticmethod
    def forward(*tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        found: tuple[Tensor, Tensor, Tensor] = conv_backward(*tensors)
        return found

    setup_context = staticmethod(_no_context)
    backward = staticmethod(_refuse)


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(*tensors: Tensor) -> Tensor:
        u: Tensor = conv(*tensors)
        return u

    setup_context = staticmethod(_save_conv)

    @staticmethod
    def backward(ctx: Any, grad_u: Tensor) -> tuple[Tensor | None, ...]:
        return *_ConvBackward.apply(grad_u.contiguous(), *ctx.saved_tensors), None


class _ScanBackward(torch.autograd.Function):
    @staticmethod
    def forward(*tensors: Tensor) -> tuple[Tensor, ...]:
        found: tuple[Tensor, ...] = scan_backward(*tensors)
        return found

    setup_context = staticmethod(_no_context)
    backward = staticmethod(_refuse)


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(*tensors: Any) -> tuple[Tensor, Tensor, Tensor]:
        found: tuple[Tensor, Tensor, Tensor] = scan(*tensors)
        return found

    setup_context = staticmethod(_save_scan)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        return *_ScanBackward.apply(grad_out.contiguous(), *ctx.saved_tensors), None, None
