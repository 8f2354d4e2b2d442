"""Both models as MLX modules whose parameter names and shapes are those of the parameter table.

Sizes in comments: B images, T tokens, D width, K directions, R dt rank, N states, E decoder width.
Every forward takes `seen`, a dict that collects the intermediate tensors named in
`arm_core.model.reference.model`, or None to collect nothing. Element-wise functions are written out: those of
`mlx.nn` are compiled at their first call, which on Linux needs a C++ compiler.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten

from arm_core.files.quantized import Quantized
from arm_core.model.parameters import parameter_table
from arm_core.model.reference.model import TARGET_EPS
from arm_core.model.spec import ClassifierSpec, EncoderSpec, ModelSpec, Pooling, PretrainSpec, Target
from arm_core.model.tokens import decoder_mask, direction_orders, encoder_patches, target_patches
from arm_mlx.scan import directional_conv, selective_scan
from arm_mlx.swiglu import swiglu

Seen = dict[str, mx.array] | None
Inputs = Sequence[mx.array]


def note(seen: Seen, name: str, value: mx.array) -> mx.array:
    """Keep an intermediate tensor where somebody asked for it."""
    if seen is not None:
        seen[name] = value
    return value


def empty(*shape: int) -> mx.array:
    """A parameter without a value (it is never evaluated): the engine loads all, strictly, by name."""
    return mx.zeros(shape)


def unfold_patches(images: mx.array, patch: int) -> mx.array:
    """(B, H, W, C) -> (B, patches, patch * patch * C), raster order, values (row, column, channel)."""
    batch, height, width, channels = images.shape
    x = images.reshape(batch, height // patch, patch, width // patch, patch, channels)
    return x.swapaxes(2, 3).reshape(batch, -1, patch * patch * channels)


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
    """Autodiff's own gradient of the weight is a transposed view, which an update reads far slower."""
    x, weight = inputs
    return grad @ weight, grad.swapaxes(-1, -2) @ x


@affine.vjp
def _affine_vjp(inputs: Inputs, grad: mx.array, result: mx.array) -> tuple[mx.array, ...]:
    x, weight, _ = inputs
    return grad @ weight, grad.T @ x, grad.sum(0)


class Product(nn.Module):
    """A module that multiplies matrices, in float32 or, where the engine says so, in bfloat16."""

    dtype = mx.float32


class Linear(Product):
    """x W^T + b. weight: (out, in), or its parts where it is quantized; bias: (out,)."""

    def __init__(self, fan_in: int, fan_out: int, *, bias: bool = True) -> None:
        super().__init__()
        self.weight = empty(fan_out, fan_in)
        if bias:
            self.bias = empty(fan_out)

    def hold(self, weight: Quantized) -> None:
        """Multiply by a quantized weight from now on, without gradients."""
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
    """In float32, as its result."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = empty(width)
        self.bias = empty(width)

    def __call__(self, x: mx.array) -> mx.array:
        return mx.fast.layer_norm(x.astype(mx.float32), self.weight, self.bias, self.eps)


class DirectionalWeight(Product):
    """A weight, and where asked for a bias, with a leading direction axis K."""

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


class Trunk(nn.Module):
    """What both models share: patch embedding, blocks, and the order table of their scans."""

    def __init__(self, spec: ModelSpec, scan: str) -> None:
        super().__init__()
        encoder = spec.encoder
        self.recompute = False
        self.patch_embed = Linear(encoder.patch_values, encoder.width)
        self.layers = [Block(encoder, spec.directions, scan) for _ in range(encoder.depth)]
        self._order = mx.array(direction_orders(spec))  # the underscore keeps tables out of the parameters

    def blocks(self, x: mx.array, drop_path_scale: mx.array | None, seen: Seen) -> list[mx.array]:
        """Run all blocks on tokens (B, T, D) and return the output of each."""
        outputs = [note(seen, "tokens", x)]
        for i, layer in enumerate(self.layers):
            scale = None if drop_path_scale is None else drop_path_scale[i]
            run = partial(layer, order=self._order, scale=scale, name=f"layers.{i}", seen=seen)
            if self.recompute and self.training:
                run = nn.utils.checkpoint(layer, run)
            outputs.append(run(outputs[-1]))
        return outputs[1:]


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
    """Queries (B, T, E) attend to the latents of earlier clusters; there is no self-attention."""

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


class PretrainModel(Trunk):
    """Predicts the pixels of each cluster from the clusters before it (paper, section 3.2)."""

    def __init__(self, spec: PretrainSpec, scan: str) -> None:
        super().__init__(spec, scan)
        self.spec = spec
        encoder, width = spec.encoder, spec.decoder_width
        self.pos_embed = empty(spec.patches, encoder.width)
        self.tap_norms = [LayerNorm(encoder.width, encoder.norm_eps) for _ in spec.taps]
        self.taps_to_decoder = Linear(len(spec.taps) * encoder.width, width * spec.decoder_depth)
        self.decoder_pos_embed = empty(spec.patches, width)
        self.query_token = empty(width)
        self.decoder = [DecoderBlock(spec) for _ in range(spec.decoder_depth)]
        self.prediction_norm = LayerNorm(width, encoder.norm_eps)
        self.prediction = Linear(width, encoder.patch_values)
        self._encoder_patches = mx.array(encoder_patches(spec))
        self._target_patches = mx.array(target_patches(spec))
        self._mask = mx.array(decoder_mask(spec))

    def __call__(
        self, images: mx.array, drop_path_scale: mx.array | None = None, seen: Seen = None
    ) -> dict[str, mx.array]:
        spec, read = self.spec, self._encoder_patches
        patches = unfold_patches(images, spec.encoder.patch)
        tokens = self.patch_embed(patches[:, read]) + self.pos_embed[read]
        outputs = self.blocks(tokens, drop_path_scale, seen)

        taps = [norm(outputs[i - 1]) for norm, i in zip(self.tap_norms, spec.taps, strict=True)]
        joined = note(seen, "taps_to_decoder", self.taps_to_decoder(mx.concatenate(taps, axis=-1)))
        latents = joined.reshape(*joined.shape[:2], spec.decoder_width, spec.decoder_depth)

        x = self.query_token + self.decoder_pos_embed[self._target_patches]
        x = note(seen, "queries", mx.broadcast_to(x, (len(images), *x.shape)))
        for j, block in enumerate(self.decoder):
            x = note(seen, f"decoder.{j}", block(x, latents[..., j], self._mask))
        prediction = self.prediction(self.prediction_norm(x))
        loss = (prediction.astype(mx.float32) - self.target(patches)).square().mean((0, 2))
        return {"encoder": latents, "prediction": prediction, "loss_per_token": loss, "loss": loss.mean()}

    def target(self, patches: mx.array) -> mx.array:
        """What the decoder regresses, (B, T, patch values) float32."""
        target = patches[:, self._target_patches]
        if self.spec.target is Target.RAW:
            return target
        centred = target - target.mean(-1, keepdims=True)
        variance = centred.square().sum(-1, keepdims=True) / (target.shape[-1] - 1)  # unbiased
        return centred * mx.rsqrt(variance + TARGET_EPS)


class Classifier(Trunk):
    """Names the class of an image from K scans of its patches around a class token."""

    def __init__(self, spec: ClassifierSpec, scan: str) -> None:
        super().__init__(spec, scan)
        self.spec = spec
        width = spec.encoder.width
        self.cls_token = empty(width)
        self.pos_embed = empty(spec.tokens, width)
        self.norm_f = LayerNorm(width, spec.encoder.norm_eps)
        self.head = Linear(width, spec.classes)

    def __call__(
        self, images: mx.array, drop_path_scale: mx.array | None = None, seen: Seen = None
    ) -> dict[str, mx.array]:
        x = self.embed(images, self.pos_embed)
        x = note(seen, "norm_f", self.norm_f(self.blocks(x, drop_path_scale, seen)[-1]))
        features = self.pool(x)
        return {"features": features, "logits": self.head(features)}

    def embed(self, images: mx.array, positions: mx.array) -> mx.array:
        """Tokens (B, T, D) of images (B, H, W, C), the class token in their middle. positions: (T, D)."""
        x = self.patch_embed(unfold_patches(images, self.spec.encoder.patch))
        middle = x.shape[1] // 2
        token = mx.broadcast_to(self.cls_token.astype(x.dtype), (len(x), 1, x.shape[-1]))
        return mx.concatenate([x[:, :middle], token, x[:, middle:]], axis=1) + positions

    def pool(self, x: mx.array) -> mx.array:
        """The vector before the head, (B, D), of normalized tokens (B, T, D)."""
        middle = (x.shape[1] - 1) // 2
        if self.spec.pooling is Pooling.MEAN:
            return (x[:, :middle].mean(1) + x[:, middle + 1 :].mean(1)) / 2
        return x[:, middle]


def soft_cross_entropy(logits: mx.array, targets: mx.array) -> mx.array:
    """Mean over images of -sum(targets * log_softmax(logits)). logits, targets: (B, classes)."""
    logits = logits.astype(mx.float32)
    log_softmax = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    return -(targets * log_softmax).sum(-1).mean()


def build_model(
    spec: ModelSpec, scan: str, products: mx.Dtype, *, recompute: bool = False
) -> PretrainModel | Classifier:
    """The model without values; its names and shapes are checked against the parameter table.

    products: type of the matrix products, float32 or bfloat16.  recompute: keep only the input of each
    block for the backward pass, and compute the rest again.
    """
    model = PretrainModel(spec, scan) if isinstance(spec, PretrainSpec) else Classifier(spec, scan)
    table = parameter_table(spec)
    shapes = {name: value.shape for name, value in named(model.parameters()).items()}
    assert shapes == {name: row.shape for name, row in table.items()}, "model and parameter table differ"
    fixed = [name for name, row in table.items() if not row.trainable]
    model.freeze(recurse=False, keys=fixed, strict=True)
    model.recompute = recompute
    for module in model.modules():
        if isinstance(module, Product):
            module.dtype = products
    return model
