"""The two operators on the kernels of mamba-ssm and causal-conv1d, if they are installed.

All K directions are one call: they become K groups of channels. Tokens are put into scan order before it
and back into token order after it.

Sizes: K directions, B images, L tokens, D channels, N states, W convolution width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (the field's name for it)
from torch import Tensor

from arm_cuda.triton.availability import numbered

INSTALL = (
    "build it for this torch: MAMBA_FORCE_BUILD=TRUE pip install --no-build-isolation --no-deps mamba-ssm "
    "(and pip install einops transformers)"
)
CONV_WIDTHS = (2, 3, 4)
"""Convolution widths that causal-conv1d takes."""


def directional_conv(x: Tensor, weight: Tensor, bias: Tensor, order: Tensor) -> Tensor:
    """Same as `arm_cuda.scan.directional_conv`, with causal-conv1d if it can compute it, else torch.

    Both compute the same function. If torch runs, the printed name of the scan says so (`convolution_note`).
    """
    directions, channels, width = weight.shape
    batch, length, _ = x.shape
    steps = x[:, order.long()].mT.contiguous().view(batch, -1, length)  # (B, K D, L) in scan order
    weight, bias = weight.reshape(-1, width).to(x.dtype), bias.reshape(-1).to(x.dtype)
    if on_gpu(x) and _conv_reason(width) is None:
        u = _causal_conv1d()(steps, weight, bias, activation="silu")
    else:
        padded = F.pad(steps, (width - 1, 0))
        u = F.silu(F.conv1d(padded, weight[:, None], bias, groups=directions * channels))
    u = u.reshape(batch, directions, channels, length).permute(1, 0, 3, 2)
    return _reorder(u, order.argsort(1))


def selective_scan(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor, z: Tensor,
    order: Tensor,
) -> Tensor:  # fmt: skip
    """Same as `arm_cuda.scan.selective_scan`: one call of `selective_scan_fn` with the directions as groups.

    mamba-ssm takes u, dt, B and C in one type, and A, D and dt_bias in float32.
    """
    directions, batch, length, channels = u.shape
    kinds = {tensor.dtype for tensor in (u, dt, B, C)}
    if kinds - {torch.float32, torch.bfloat16, torch.float16} or len(kinds) > 1:
        raise ValueError(
            "scan 'mamba-ssm': u, dt, B and C: expected one of float32, bfloat16, float16 for all, found "
            f"{', '.join(sorted(str(kind) for kind in kinds))}"
        )
    if u.shape != dt.shape or order.shape != (directions, length):
        raise ValueError(
            f"scan 'mamba-ssm': expected u and dt (K, B, L, D) and order (K, L), found {tuple(u.shape)}, "
            f"{tuple(dt.shape)} and {tuple(order.shape)}"
        )

    def steps(tensor: Tensor) -> Tensor:
        """(K, B, L, X) in token order -> (B, K, X, L) in scan order, contiguous."""
        return _reorder(tensor, order).permute(1, 0, 3, 2).contiguous()

    y = _selective_scan_fn()(
        steps(u).view(batch, -1, length),
        steps(dt).view(batch, -1, length),
        A.float().reshape(directions * channels, -1),
        steps(B),
        steps(C),
        D.float().reshape(-1),
        z=None,
        delta_bias=dt_bias.float().reshape(-1),
        delta_softplus=True,
    )
    y = _reorder(y.reshape(batch, directions, channels, length).permute(1, 0, 3, 2), order.argsort(1))
    return (F.silu(z) * y.mean(0)).to(u.dtype)


def unusable(device: str) -> str | None:
    """None if mamba-ssm runs on the device (`cuda`: the current GPU), else the reason and what to install."""
    if torch.device(device).type != "cuda":
        return "its kernels run on NVIDIA GPUs"
    if not torch.cuda.is_available():
        return "torch finds no NVIDIA GPU here"
    return _scan_unusable(str(numbered(device)))


def convolution_note(conv_width: int) -> str | None:
    """The note in the printed name of the scan if the convolution runs in torch."""
    reason = _conv_reason(conv_width)
    return f"convolution by torch: {reason}" if reason else None


def _conv_reason(width: int) -> str | None:
    """The reason why causal-conv1d cannot run; None if it can."""
    if width not in CONV_WIDTHS:
        return f"causal-conv1d takes widths {', '.join(map(str, CONV_WIDTHS))}, not {width}"
    return _conv_unusable()


def on_gpu(tensor: Tensor) -> bool:
    return tensor.is_cuda


@cache
def _scan_unusable(device: str) -> str | None:
    """Check it by a call: its kernels may be missing even if `import mamba_ssm` works."""
    if find_spec("mamba_ssm") is None:
        return f"mamba-ssm is not installed; {INSTALL}"
    try:
        row = torch.ones((1, 2, 1), device=device, requires_grad=True)
        rate, group = -torch.ones((2, 1), device=device), torch.ones((1, 2, 1, 1), device=device)
        y = _selective_scan_fn()(row, row, rate, group, group, delta_softplus=True)
        (gradient,) = torch.autograd.grad(y.sum(), row)
        return None if bool(gradient.isfinite().all()) else f"mamba-ssm gives wrong results here; {INSTALL}"
    except Exception as error:  # an extension built for another torch fails in many ways
        return f"mamba-ssm is installed but cannot run ({_first_line(error)}); {INSTALL}"


@cache
def _conv_unusable() -> str | None:
    if find_spec("causal_conv1d") is None:
        return "causal-conv1d is not installed"
    try:
        row = torch.ones((1, 8, 2), device="cuda")
        _causal_conv1d()(row, torch.ones((8, 2), device="cuda"), None, activation="silu")
        return None
    except Exception as error:
        return f"causal-conv1d is installed but cannot run ({_first_line(error)})"


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"


def _selective_scan_fn() -> Callable[..., Any]:
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    function: Callable[..., Any] = selective_scan_fn
    return function


def _causal_conv1d() -> Callable[..., Any]:
    from causal_conv1d import causal_conv1d_fn

    function: Callable[..., Any] = causal_conv1d_fn
    return function


def _reorder(x: Tensor, order: Tensor) -> Tensor:
    """Tokens of (K, B, L, ...), put into each direction's order."""
    return torch.take_along_dim(x, order.long()[:, None, :, None], dim=2)
