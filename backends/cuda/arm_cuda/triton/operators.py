"""The two operators on Triton kernels, with gradients.

torch.compile and torch.export see them as operators of torch.library. Other calls take autograd functions,
which need less CPU time. A second derivative is refused. Sizes: K directions, B images, L tokens, D channels,
N states, W convolution width.
"""

# No `from __future__ import annotations`: torch.library reads the types below.
from typing import Any, NoReturn

import torch
from torch import Tensor

from arm_core.engine.scans import HasShape, check_axes
from arm_cuda.nvrtc import launch as native
from arm_cuda.triton import launch
from arm_cuda.triton.arithmetic import INTERPRETED

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
STATES = tuple(launch.GROUP)
"""State sizes that the scan kernels take."""
LARGEST_OFFSET = 2**31 - 1
"""Kernels count elements within an image in 32 bits."""


def directional_conv(x: Tensor, weight: Tensor, bias: Tensor, order: Tensor) -> Tensor:
    """Same as `arm_cuda.scan.directional_conv`; x may be a slice of wider rows; others are contiguous."""
    tensors = x, weight, bias, order
    if _checks_needed(tensors):
        sizes = _check_shapes(x=(x, "BLD"), weight=(weight, "KDW"), bias=(bias, "KD"), order=(order, "KL"))
        _check_kind(order, x=x, weight=weight, bias=bias)
        _check_contiguous(weight=weight, bias=bias, order=order)
        _check_rows(sizes["L"], x=x)
        _remember(tensors)
    if _traced(x):
        result: Tensor = conv(x, weight.mT.contiguous(), bias, order)
    else:
        result = _Conv.apply(*tensors)
    return result


def selective_scan(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor, z: Tensor,
    order: Tensor, *, kernel: str = "triton",
) -> Tensor:  # fmt: skip
    """Same as `arm_cuda.scan.selective_scan`; B, C, z may be slices of wider rows; others are contiguous.

    kernel: of the scan's backward pass, `triton` or `cuda`.
    """
    tensors = u, dt, A, B, C, D, dt_bias, z, order
    if _checks_needed(tensors):
        _check_scan(*tensors)
        _remember(tensors)
    if kernel == "cuda" and A.shape[2] not in native.STATES:
        raise ValueError(
            f"scan 'cuda': state size {A.shape[2]}; its kernel takes {', '.join(map(str, native.STATES))}; "
            "use scan 'triton'"
        )
    save_for_backward = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    if _traced(u):
        rates = A.mT.contiguous()
        result: Tensor = scan(u, dt, rates, B, C, D, dt_bias, z, order, save_for_backward, kernel)[0]
    else:
        result = _Scan.apply(save_for_backward, kernel, *tensors)
    return result


def _traced(tensor: Tensor) -> bool:
    """Whether the call is compiled or has fake tensors; it must then be a registered operator."""
    return torch.compiler.is_compiling() or type(tensor) is not Tensor


# checks

_accepted: set[tuple[object, ...]] = set()
"""Shapes, strides, types and devices that have passed the checks."""
MOST_ACCEPTED = 1024


def _layout(tensors: tuple[Tensor, ...]) -> tuple[object, ...]:
    return tuple((t.shape, t.stride(), t.dtype, t.device) for t in tensors)


def _checks_needed(tensors: tuple[Tensor, ...]) -> bool:
    """False if tensors of the same layout were accepted before: the checks take longer than a launch."""
    return torch.compiler.is_compiling() or _layout(tensors) not in _accepted


def _remember(tensors: tuple[Tensor, ...]) -> None:
    if not torch.compiler.is_compiling():
        if len(_accepted) >= MOST_ACCEPTED:
            _accepted.clear()
        _accepted.add(_layout(tensors))


def _check_scan(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor, z: Tensor,
    order: Tensor,
) -> None:  # fmt: skip
    sizes = _check_shapes(
        u=(u, "KBLD"), dt=(dt, "KBLD"), A=(A, "KDN"), B=(B, "KBLN"), C=(C, "KBLN"), D=(D, "KD"),
        dt_bias=(dt_bias, "KD"), z=(z, "BLD"), order=(order, "KL"),
    )  # fmt: skip
    if sizes["N"] not in STATES:
        raise ValueError(
            f"scan 'triton': state size {sizes['N']}; its kernels take {', '.join(map(str, STATES))}, "
            "scan 'reference' takes any"
        )
    _check_kind(order, u=u, dt=dt, A=A, B=B, C=C, D=D, dt_bias=dt_bias, z=z)
    _check_contiguous(u=u, dt=dt, A=A, D=D, dt_bias=dt_bias, order=order)
    _check_rows(sizes["L"], u=u, B=B, C=C, z=z)


def _check_shapes(**tensors: tuple[HasShape, str]) -> dict[str, int]:
    sizes = check_axes("scan 'triton': ", **tensors)
    if sizes["L"] == 0:
        raise ValueError("scan 'triton': expected at least one token, found none")
    return sizes


def _check_kind(order: Tensor, **tensors: Tensor) -> None:
    """Types, and one device for all; on a CPU only Triton's interpreter can run."""
    if order.dtype != torch.int32:
        raise ValueError(f"scan 'triton': order: expected int32, found {order.dtype}; call .int()")
    device = order.device
    if device.type != ("cpu" if INTERPRETED else "cuda"):
        raise ValueError(
            f"scan 'triton': expected tensors on an NVIDIA GPU, found {device}; move the model to the GPU, "
            "or use scan 'reference'"
        )
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATS:
            raise ValueError(
                f"scan 'triton': {name}: expected float32, bfloat16 or float16, found {tensor.dtype}; "
                "scan 'reference' takes float64"
            )
        if tensor.device != device:
            raise ValueError(f"scan 'triton': {name} is on {tensor.device}, order on {device}; move one")


def _check_contiguous(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if not tensor.is_contiguous():
            raise ValueError(
                f"scan 'triton': {name}: expected a contiguous tensor, found strides {tensor.stride()} for "
                f"shape {tuple(tensor.shape)}; call .contiguous()"
            )


def _check_rows(length: int, **tensors: Tensor) -> None:
    """Rows of channels or states may be anywhere, but each row must be contiguous."""
    for name, tensor in tensors.items():
        *_, token, column = tensor.stride()
        if column != 1 and tensor.shape[-1] != 1:
            raise ValueError(
                f"scan 'triton': {name}: expected the last axis in one piece (stride 1), found strides "
                f"{tensor.stride()}; call .contiguous()"
            )
        if length * token > LARGEST_OFFSET:
            raise ValueError(
                f"scan 'triton': {name}: {length} tokens of {token} elements exceed the {LARGEST_OFFSET} "
                "that its kernels count; shorten the sequence"
            )


# outside of a compiler


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, order: Tensor) -> Tensor:
        transposed = weight.mT.contiguous()
        ctx.save_for_backward(x, transposed, bias, order)
        return launch.conv_forward(x, transposed, bias, order)

    @staticmethod
    def backward(ctx: Any, grad_u: Tensor) -> tuple[Tensor | None, ...]:
        # Gradients are enabled here only for a second derivative; the operator refuses it.
        backward = conv_backward if torch.is_grad_enabled() else launch.conv_backward
        grad_x, grad_weight, grad_bias = backward(grad_u, *ctx.saved_tensors)
        return grad_x, grad_weight.mT.contiguous(), grad_bias, None


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, save_for_backward: bool, kernel: str, *tensors: Tensor) -> Tensor:
        u, dt, A, B, C, D, dt_bias, z, order = tensors
        tensors = u, dt, A.mT.contiguous(), B, C, D, dt_bias, z, order
        out, mean, states = launch.scan_forward(*tensors, save_for_backward=save_for_backward)
        if save_for_backward:
            ctx.save_for_backward(mean, states, *tensors)
            ctx.kernel = kernel
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        backward = scan_backward if torch.is_grad_enabled() else launch.scan_backward
        saved = *ctx.saved_tensors, ctx.kernel
        grad_u, grad_dt, grad_rates, *rest = backward(grad_out, *saved)
        return None, None, grad_u, grad_dt, grad_rates.mT.contiguous(), *rest, None


# registration: the convolution's weight as (K, W, D), A as (K, N, D)


@torch.library.custom_op("arm_cuda::directional_conv", mutates_args=())
def conv(x: Tensor, weight: Tensor, bias: Tensor, order: Tensor) -> Tensor:
    return launch.conv_forward(x, weight, bias, order)


@torch.library.custom_op("arm_cuda::directional_conv_backward", mutates_args=())
def conv_backward(
    grad_u: Tensor, x: Tensor, weight: Tensor, bias: Tensor, order: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return launch.conv_backward(grad_u, x, weight, bias, order)


@torch.library.custom_op("arm_cuda::selective_scan", mutates_args=())
def scan(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor, z: Tensor,
    order: Tensor, save_for_backward: bool, kernel: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """kernel: of the backward pass."""
    return launch.scan_forward(u, dt, A, B, C, D, dt_bias, z, order, save_for_backward)


@torch.library.custom_op("arm_cuda::selective_scan_backward", mutates_args=())
def scan_backward(
    grad_out: Tensor, mean: Tensor, states: Tensor, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor,
    D: Tensor, dt_bias: Tensor, z: Tensor, order: Tensor, kernel: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return launch.scan_backward(grad_out, mean, states, u, dt, A, B, C, D, dt_bias, z, order, kernel)


def _new(tensor: Tensor) -> Tensor:
    """A contiguous tensor of the same shape, type and device."""
    return tensor.new_empty(tensor.shape)


@conv.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, order: Tensor) -> Tensor:
    return x.new_empty((weight.shape[0], *x.shape))


@conv_backward.register_fake
def _(
    grad_u: Tensor, x: Tensor, weight: Tensor, bias: Tensor, order: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return _new(x), _new(weight), _new(bias)


@scan.register_fake
def _(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor, z: Tensor,
    order: Tensor, save_for_backward: bool, kernel: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    states = u.new_empty(launch.state_shape(u, A) if save_for_backward else (0,), dtype=torch.float32)
    return u.new_empty(u.shape[1:]), u.new_empty(u.shape[1:] if save_for_backward else (0,)), states


@scan_backward.register_fake
def _(
    grad_out: Tensor, mean: Tensor, states: Tensor, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor,
    D: Tensor, dt_bias: Tensor, z: Tensor, order: Tensor, kernel: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return _new(u), _new(dt), _new(A), _new(B), _new(C), _new(D), _new(dt_bias), _new(z)


# gradients


def _save_conv(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _conv_gradients(ctx: Any, grad_u: Tensor) -> tuple[Tensor | None, ...]:
    return *conv_backward(grad_u, *ctx.saved_tensors), None


def _save_scan(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, save_for_backward, ctx.kernel = inputs
    assert save_for_backward, "a scan without the states of its forward has no gradient"
    _, mean, states = output
    ctx.mark_non_differentiable(mean, states)
    ctx.save_for_backward(mean, states, *tensors)


def _scan_gradients(ctx: Any, grad_out: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    return *scan_backward(grad_out, *ctx.saved_tensors, ctx.kernel), None, None, None


def _refuse(ctx: Any, *gradients: Tensor) -> NoReturn:
    raise RuntimeError("scan 'triton' has no second derivative; use scan 'reference' to differentiate twice")


conv.register_autograd(_conv_gradients, setup_context=_save_conv)
scan.register_autograd(_scan_gradients, setup_context=_save_scan)
conv_backward.register_autograd(_refuse)
scan_backward.register_autograd(_refuse)
