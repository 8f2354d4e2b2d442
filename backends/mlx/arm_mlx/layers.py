"""Layers of both models as MLX modules; parameter names are those of the parameter table.

Sizes in comments: B images, T tokens, D width, K directions, R dt rank, N states, E decoder width.
Blocks take `seen`, a dict that collects the intermediate tensors named in
`arm_core.model.reference.model`, or None. Element-wise functions are written out: those of `mlx.nn` are
compiled at their first call, which needs a C++ compiler on Linux.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten

from arm_core.files.quantized import Quantized
from arm_core.model.spec import EncoderSpec, PretrainSpec
from arm_mlx.gate import swiglu
from arm_mlx.scan import directional_conv, selective_scan

Seen = dict[str, mx.array] | None
Inputs = Sequence[mx.array]


def note(seen: Seen, name: str, value: mx.array) -> mx.array:
    """Collect an intermediate tensor if `seen` is a dict; returns it."""
    if seen is not None:
        seen[name] = value
    return value


def empty(*shape: int) -> mx.array:
    """A parameter without a value, never evaluated: the engine loads all of them by name."""
    return mx.zeros(shape)


def named(tree: Any) -> dict[str, mx.array]:
    """The arrays in MLX's nested dicts and lists, by dotted name."""
    return dict(cast(list[tuple[str, mx.array]], tree_flatten(tree)))


def gelu(x: mx.array) -> mx.array:
    """The exact form, x Phi(x), with Phi in float32."""
    phi = 0.5 * (1.0 + mx.erf(x.astype(mx.float32) * math.sqrt(0.5)))
    return x * phi.astype(x.dtype)


@mx.custom_function
def linear(x: mx.array, weight: mx.array) -> mx.array:
    """x W^T. x: (..., rows, in).  weight: (..., out, in).  Returns (..., rows, out)."""
    return x @ weight.swapaxes(-1, -2)


@mx.custom_function
def affine(x: mx.array, weight: mx.array, bias: mx.array) -> mx.array:
    """x W^T + b. x: (rows, in).  weight: (out, in).  bias: (out,).  Returns (rows, out)."""
    return mx.addmm(bias, x, weight.T)


@linear.vjp
def _linear_vjp(inputs: Inputs, grad: mx.array, result: mx.array) -> tuple[mx.array, ...]:
    """MLX's gradient of the weight would be a transposed view, which the update reads far more slowly."""
    x, weight = inputs
    return grad @ weight, grad.swapaxes(-1, -2) @ x


@affine.vjp
def _affine_vjp(inputs: Inputs, grad: mx.array, result: mx.array) -> tuple[mx.array, ...]:
    x, weight, _ = inputs
    return grad @ weight, grad.T @ x, grad.sum(0)


class Product(nn.Module):
    """A module that multiplies matrices, in float32 or bfloat16; `build_model` sets the type."""

    dtype = mx.float32


class Linear(Product):
    """x W^T + b. weight: (out, in), packed if quantized.  bias: (out,)."""

    def __init__(self, fan_in: int, fan_out: int, *, bias: bool = True) -> None:
        super().__init__()
        self.weight = empty(fan_out, fan_in)
        if bias:
            self.bias = empty(fan_out)

    def hold(self, weight: Quantized) -> None:
        """Replace the weight by a quantized one, which has no gradient."""
        self.weight, self.bits, self.group_size = mx.array(weight.packed), weight.bits, weight.group_size
        self.scales, self.biases = mx.array(weight.scales), mx.array(weight.biases)
        self.freeze(keys=["weight", "scales", "biases"])

    def __call__(self, x: mx.array) -> mx.array:
        x = x.astype(self.dtype)
        if "scales" in self:
            product = self._quantized_product(x)
            return product + self.bias.astype(self.dtype) if "bias" in self else product
        rows, weight = x.reshape(-1, x.shape[-1]), self.weight.astype(self.dtype)
        bias = [self.bias.astype(self.dtype)] if "bias" in self else []
        found = cast(mx.array, affine(rows, weight, *bias) if bias else linear(rows, weight))
        return found.reshape(*x.shape[:-1], -1)

    def _quantized_product(self, x: mx.array) -> mx.array:
        scales, biases = self.scales.astype(self.dtype), self.biases.astype(self.dtype)
        return mx.quantized_matmul(
            x, self.weight, scales, biases, transpose=True, group_size=self.group_size, bits=self.bits
        )


class LayerNorm(nn.Module):
    """Computed in float32, with a float32 result."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = empty(width)
        self.bias = empty(width)

    def __call__(self, x: mx.array) -> mx.array:
        return mx.fast.layer_norm(x.astype(mx.float32), self.weight, self.bias, self.eps)


class DirectionalWeight(Product):
    """A weight and optionally a bias, with a leading direction axis K."""

    def __init__(self, *shape: int, bias: bool) -> None:
        super().__init__()
        self.weight = empty(*shape)
        if bias:
            self.bias = empty(*shape[:2])

    def project(self, x: mx.array) -> mx.array:
        """One matrix product per direction: (K, B, T, in) -> (K, B, T, out), without the bias."""
        directions, batch, tokens, _ = x.shape
        rows = x.astype(self.dtype).reshape(directions, batch * tokens, -1)
        found = cast(mx.array, linear(rows, self.weight.astype(self.dtype)))
        return found.reshape(directions, batch, tokens, -1)


class Mixer(nn.Module):
    """Mamba-1 over K directions that share in_proj, gate and out_proj."""

    def __init__(self, spec: EncoderSpec, directions: int, scan: str) -> None:
        super().__init__()
        self.split = (spec.dt_rank, spec.dt_rank + spec.state)
        self.scan, self.save_for_backward = scan, False
        width = spec.width
        self.in_proj = Linear(width, 2 * width, bias=False)
        self.conv = DirectionalWeight(directions, width, spec.conv_width, bias=True)
        self.x_proj = DirectionalWeight(directions, spec.dt_rank + 2 * spec.state, width, bias=False)
        self.dt_proj = DirectionalWeight(directions, width, spec.dt_rank, bias=True)
        self.A_log = empty(directions, width, spec.state)
        self.D = empty(directions, width)
        self.out_proj = Linear(width, width, bias=False)

    def __call__(self, x: mx.array, order: mx.array) -> mx.array:
        x, z = mx.split(self.in_proj(x), 2, axis=-1)
        u = directional_conv(x, self.conv.weight, self.conv.bias, order, impl=self.scan)  # (K, B, T, D)
        low, B, C = mx.split(self.x_proj.project(u), self.split, axis=-1)
        dt = self.dt_proj.project(low)  # bias and softplus belong to the scan
        A = -mx.exp(self.A_log)
        out = selective_scan(
            u,
            dt,
            A,
            B,
            C,
            self.D,
            self.dt_proj.bias,
            z,
            order,
            impl=self.scan,
            save_for_backward=self.training or self.save_for_backward,
        )
        return self.out_proj(out)


class SwiGLU(nn.Module):
    def __init__(self, spec: EncoderSpec, scan: str) -> None:
        super().__init__()
        self.scan = scan
        self.w1 = Linear(spec.width, spec.mlp_width)
        self.w2 = Linear(spec.width, spec.mlp_width)
        self.w3 = Linear(spec.mlp_width, spec.width)

    def __call__(self, x: mx.array) -> mx.array:
        return self.w3(swiglu(self.w1(x), self.w2(x), impl=self.scan))


class Block(nn.Module):
    """x + mixer(norm1(x)), then x + mlp(norm2(x)); `scale` (2, B) holds the drop-path factors."""

    def __init__(self, spec: EncoderSpec, directions: int, scan: str) -> None:
        super().__init__()
        self.norm1 = LayerNorm(spec.width, spec.norm_eps)
        self.mixer = Mixer(spec, directions, scan)
        self.norm2 = LayerNorm(spec.width, spec.norm_eps)
        self.mlp = SwiGLU(spec, scan)

    def __call__(
        self, x: mx.array, order: mx.array, scale: mx.array | None, name: str, seen: Seen
    ) -> mx.array:
        branch = note(seen, f"{name}.mixer", self.mixer(self.norm1(x), order))
        x = x + (branch if scale is None else branch * scale[0, :, None, None])
        branch = self.mlp(self.norm2(x))
        return note(seen, name, x + (branch if scale is None else branch * scale[1, :, None, None]))


class CrossAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = Linear(width, width)
        self.key_value = Linear(width, 2 * width)
        self.proj = Linear(width, width)

    def __call__(self, query: mx.array, latent: mx.array, mask: mx.array) -> mx.array:
        def split(x: mx.array) -> mx.array:  # (B, T, E) -> (B, heads, T, E / heads)
            return x.reshape(*x.shape[:2], self.heads, -1).swapaxes(1, 2)

        q, (k, v) = self.query(query), mx.split(self.key_value(latent), 2, axis=-1)
        scale = 1.0 / math.sqrt(q.shape[-1] // self.heads)
        out = mx.fast.scaled_dot_product_attention(split(q), split(k), split(v), scale=scale, mask=mask)
        return self.proj(out.swapaxes(1, 2).reshape(q.shape))


class MLP(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = Linear(width, 4 * width)
        self.fc2 = Linear(4 * width, width)

    def __call__(self, x: mx.array) -> mx.array:
        return self.fc2(gelu(self.fc1(x)))


class DecoderBlock(nn.Module):
    """Queries (B, T, E) attend to the latents of earlier clusters; no self-attention."""

    def __init__(self, spec: PretrainSpec) -> None:
        super().__init__()
        width, eps = spec.decoder_width, spec.encoder.norm_eps
        self.norm_query = LayerNorm(width, eps)
        self.norm_latent = LayerNorm(width, eps)
        self.attention = CrossAttention(width, spec.decoder_heads)
        self.norm_mlp = LayerNorm(width, eps)
        self.mlp = MLP(width)

    def __call__(self, x: mx.array, latent: mx.array, mask: mx.array) -> mx.array:
        x = x + self.attention(self.norm_query(x), self.norm_latent(latent), mask)
        return x + self.mlp(self.norm_mlp(x))
