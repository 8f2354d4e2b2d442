"""The peer of the CUDA benchmarks: the mixer in the arrangement of the official code, on mamba-ssm.

The official code keeps channels before tokens. Its one pretraining direction is a call of `mamba_inner_fn`.
In a classifier each direction flips or transposes the projected tokens by views and concatenations, runs one
autograd function over them (`cuda_inner.py`), and turns the result back; the directions are averaged before
the output projection. `official_mixer` does the same on the parameters of our mixer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (the field's name for it)
from cuda_inner import Kernels, inner, mamba_kernels, plain_kernels
from torch import Tensor

from arm_core.model.spec import ModelSpec
from arm_cuda import layers, mamba_ssm

ScanFunction = Callable[..., Tensor]


def plain_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor | None = None,
    delta_bias: Tensor | None = None, delta_softplus: bool = True,
) -> Tensor:  # fmt: skip
    """A torch loop with mamba-ssm's public signature, for runs of the benchmark without it."""
    assert delta_bias is not None
    assert delta_softplus
    step = F.softplus(delta.float() + delta_bias[:, None])
    per_group = u.shape[1] // B.shape[1]
    B, C = (t.float().repeat_interleave(per_group, dim=1) for t in (B, C))
    h, ys = torch.zeros(*u.shape[:2], A.shape[1], device=u.device), []
    for s, x, b, c in zip(step.unbind(-1), u.float().unbind(-1), B.unbind(-1), C.unbind(-1), strict=True):
        h = torch.exp(s[..., None] * A) * h + (s * x)[..., None] * b
        ys.append((h * c).sum(-1))
    y = torch.stack(ys, -1) + D[:, None] * u.float()
    return (y if z is None else y * F.silu(z.float())).to(u.dtype)


def plain_conv(x: Tensor, weight: Tensor, bias: Tensor, activation: str = "silu") -> Tensor:
    assert activation == "silu"
    padded = F.pad(x, (weight.shape[1] - 1, 0))
    return F.silu(F.conv1d(padded, weight[:, None], bias, groups=x.shape[1]))


def peer_functions(device: str) -> tuple[ScanFunction, ScanFunction, str]:
    """Scan and convolution of the peers, or loops in torch; and a description of the choice."""
    if reason := mamba_ssm.unusable(device):
        return plain_scan, plain_conv, f"torch loops in place of mamba-ssm: {reason}"
    if reason := mamba_ssm._conv_unusable():
        return mamba_ssm._selective_scan_fn(), plain_conv, f"mamba-ssm; torch's conv1d: {reason}"
    return mamba_ssm._selective_scan_fn(), mamba_ssm._causal_conv1d(), "mamba-ssm and causal-conv1d"


@dataclass(frozen=True, kw_only=True)
class Official:
    """The functions that the official arrangement calls."""

    kernels: Kernels
    """Of one of several directions."""
    fused: Callable[..., Tensor] | None
    """`mamba_inner_fn`, of the only direction; None for a trial without it."""

    @classmethod
    def on(cls, device: str) -> Official:
        scan, conv, words = peer_functions(device)
        if words != "mamba-ssm and causal-conv1d":
            return cls(kernels=plain_kernels(scan, conv), fused=None)
        from mamba_ssm.ops.selective_scan_interface import mamba_inner_fn

        return cls(kernels=mamba_kernels(), fused=mamba_inner_fn)


def official_mixer(
    mixer: layers.Mixer, x: Tensor, grid: tuple[int, int] | None, *, official: Official
) -> Tensor:
    """The mixer's result, (B, T, D), in the arrangement of the official code; see the module's docstring.

    grid: rows and columns of patches around the class token in the middle; for four directions.
    """
    K = mixer.D.shape[0]
    tokens = F.linear(x, mixer.in_proj.weight).transpose(1, 2).contiguous()  # (B, 2 D, T)
    parameters = [
        (
            mixer.conv.weight[k], mixer.conv.bias[k], mixer.x_proj.weight[k], mixer.dt_proj.weight[k],
            -torch.exp(mixer.A_log[k].float()), mixer.D[k].float(), mixer.dt_proj.bias[k].float(),
        )
        for k in range(K)
    ]  # fmt: skip
    if K == 1 and official.fused is not None:
        weight, bias, x_proj, dt_proj, A, D, dt_bias = parameters[0]
        return official.fused(
            tokens, weight[:, None], bias, x_proj, dt_proj, mixer.out_proj.weight, None, A, None, None, D,
            delta_bias=dt_bias, delta_softplus=True,
        )  # fmt: skip
    path, total = tokens, torch.zeros((), device=x.device)
    for k in range(K):
        if k % 2:
            path = path.flip(-1)
        elif k:
            assert grid is not None
            path = by_columns(tokens, grid)
        y = inner(path, *parameters[k], kernels=official.kernels)
        y = y.flip(-1) if k % 2 else y
        if k >= 2:
            y = by_columns(y, (grid[1], grid[0]))  # back
        total = total + y
    return F.linear((total / K).transpose(1, 2), mixer.out_proj.weight)


def by_columns(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B, D, T) with the patches column by column, the class token still in the middle: views and cats."""
    rows, columns = grid
    middle = rows * columns // 2
    first, token, rest = tokens.split([middle, 1, rows * columns - middle], dim=-1)
    patches = torch.cat([first, rest], -1).unflatten(-1, (rows, columns)).mT.flatten(-2)
    return torch.cat([patches[..., :middle], token, patches[..., middle:]], -1)


@contextmanager
def officially_arranged(device: str, spec: ModelSpec) -> Iterator[None]:
    """Models run inside use `official_mixer`."""
    official = Official.on(device)
    ours = layers.Mixer.forward

    def forward(self: layers.Mixer, x: Tensor, order: Tensor) -> Tensor:
        return official_mixer(self, x, spec.grid, official=official)

    layers.Mixer.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        layers.Mixer.forward = ours  # type: ignore[method-assign]


def versions() -> dict[str, Any]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("torch", "triton", "mamba-ssm", "causal-conv1d", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found
