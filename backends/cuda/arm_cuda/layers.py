"""Layers of both models as torch modules; parameter names are those of the parameter table.

Sizes in comments: B images, T tokens, D width, K directions, R dt rank, N states, E decoder width.
Blocks take `seen`, a dict that collects the intermediate tensors named in
`arm_core.model.reference.model`, or None.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F  # noqa: N812 (the field's name for it)
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from arm_core.model.spec import EncoderSpec, PretrainSpec
from arm_cuda.gate import fuses, swiglu
from arm_cuda.scan import directional_conv, selective_scan

Seen = dict[str, Tensor] | None


def note(seen: Seen, name: str, value: Tensor) -> Tensor:
    """Collect an intermediate tensor if `seen` is a dict; returns it."""
    if seen is not None:
        seen[name] = value
    return value


def empty(*shape: int) -> nn.Parameter:
    """A parameter without a value: the engine loads all of them by name."""
    return nn.Parameter(torch.empty(shape))


class DirectionalWeight(nn.Module):
    """A weight and optionally a bias, with a leading direction axis K."""

    bias: Tensor

    def __init__(self, *shape: int, bias: bool) -> None:
        super().__init__()
        self.weight = empty(*shape)
        self.register_parameter("bias", empty(*shape[:2]) if bias else None)


def project(x: Tensor, weight: Tensor) -> Tensor:
    """One matrix product per direction. x: (K, B, T, in).  weight: (K, out, in).  -> (K, B, T, out)."""
    return torch.bmm(x.flatten(1, 2), weight.mT).view(*x.shape[:3], -1)


def project_and_pass(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Returns `project(x)`, and x for its other use.

    On a CPU the backward pass gets both gradients of x together, and the matrix product adds its own in
    place: a step of the base classifier takes 1 % less time than with a separate sum.
    """
    if fuses(x, weight):
        return cast(tuple[Tensor, Tensor], _ProjectAndPass.apply(x, weight))
    return project(x, weight), x


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
        # In place: the other use of x made this gradient, and nothing else refers to it.
        total = grad_x.flatten(1, 2).baddbmm_(grad, weight)
        return total.view_as(x), torch.bmm(grad.mT, x.flatten(1, 2))


class Mixer(nn.Module):
    """Mamba-1 over K directions that share in_proj, gate and out_proj."""

    def __init__(self, spec: EncoderSpec, directions: int, scan: str) -> None:
        super().__init__()
        self.split = [spec.dt_rank, spec.state, spec.state]
        self.scan = scan
        width = spec.width
        self.in_proj = nn.Linear(width, 2 * width, bias=False)
        self.conv = DirectionalWeight(directions, width, spec.conv_width, bias=True)
        self.x_proj = DirectionalWeight(directions, sum(self.split), width, bias=False)
        self.dt_proj = DirectionalWeight(directions, width, spec.dt_rank, bias=True)
        self.A_log = empty(directions, width, spec.state)
        self.D = empty(directions, width)
        self.out_proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, order: Tensor) -> Tensor:
        x, z = self.in_proj(x).chunk(2, dim=-1)
        u = directional_conv(x, self.conv.weight, self.conv.bias, order, impl=self.scan)  # (K, B, T, D)
        projected, u = project_and_pass(u, self.x_proj.weight)
        low, B, C = projected.split(self.split, dim=-1)
        dt = project(low, self.dt_proj.weight)  # bias and softplus belong to the scan
        A = -torch.exp(self.A_log.float())
        out = selective_scan(u, dt, A, B, C, self.D, self.dt_proj.bias, z, order, impl=self.scan)
        return cast(Tensor, self.out_proj(out))


class SwiGLU(nn.Module):
    def __init__(self, spec: EncoderSpec) -> None:
        super().__init__()
        self.w1 = nn.Linear(spec.width, spec.mlp_width)
        self.w2 = nn.Linear(spec.width, spec.mlp_width)
        self.w3 = nn.Linear(spec.mlp_width, spec.width)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.w3(swiglu(x, self.w1, self.w2)))


class Block(nn.Module):
    """x + mixer(norm1(x)), then x + mlp(norm2(x)); `scale` (2, B) holds the drop-path factors."""

    def __init__(self, spec: EncoderSpec, directions: int, scan: str) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(spec.width, eps=spec.norm_eps)
        self.mixer = Mixer(spec, directions, scan)
        self.norm2 = nn.LayerNorm(spec.width, eps=spec.norm_eps)
        self.mlp = SwiGLU(spec)

    def forward(self, x: Tensor, order: Tensor, scale: Tensor | None, name: str, seen: Seen) -> Tensor:
        branch = note(seen, f"{name}.mixer", self.mixer(self.norm1(x), order))
        x = x + (branch if scale is None else branch * scale[0, :, None, None])
        branch = self.mlp(self.norm2(x))
        return note(seen, name, x + (branch if scale is None else branch * scale[1, :, None, None]))


class CrossAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, query: Tensor, latent: Tensor, mask: Tensor) -> Tensor:
        def split(x: Tensor) -> Tensor:  # (B, T, E) -> (B, heads, T, E / heads)
            return torch.unflatten(x, -1, (self.heads, -1)).transpose(1, 2)

        key, value = self.key_value(latent).chunk(2, dim=-1)
        out = F.scaled_dot_product_attention(
            split(self.query(query)), split(key), split(value), attn_mask=mask
        )
        return cast(Tensor, self.proj(out.transpose(1, 2).flatten(2)))


class MLP(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.fc2(F.gelu(self.fc1(x))))


class DecoderBlock(nn.Module):
    """Queries (B, T, E) attend to the latents of earlier clusters; no self-attention."""

    def __init__(self, spec: PretrainSpec) -> None:
        super().__init__()
        width, eps = spec.decoder_width, spec.encoder.norm_eps
        self.norm_query = nn.LayerNorm(width, eps=eps)
        self.norm_latent = nn.LayerNorm(width, eps=eps)
        self.attention = CrossAttention(width, spec.decoder_heads)
        self.norm_mlp = nn.LayerNorm(width, eps=eps)
        self.mlp = MLP(width)

    def forward(self, x: Tensor, latent: Tensor, mask: Tensor) -> Tensor:
        x = x + self.attention(self.norm_query(x), self.norm_latent(latent), mask)
        return cast(Tensor, x + self.mlp(self.norm_mlp(x)))
