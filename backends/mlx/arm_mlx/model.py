"""Both models as MLX modules whose parameter names and shapes are those of the parameter table.

Sizes in comments: B images, T tokens, D width, E decoder width. Every forward takes `seen`, a dict that
collects the intermediate tensors named in `arm_core.model.reference.model`, or None.
"""

from __future__ import annotations

from functools import partial

import mlx.core as mx
from mlx import nn

from arm_core.model.parameters import parameter_table
from arm_core.model.reference.model import TARGET_EPS
from arm_core.model.spec import ClassifierSpec, ModelSpec, Pooling, PretrainSpec, Target
from arm_core.model.tokens import decoder_mask, direction_orders, encoder_patches, target_patches
from arm_mlx.layers import Block, DecoderBlock, LayerNorm, Linear, Product, Seen, empty, named, note


def unfold_patches(images: mx.array, patch: int) -> mx.array:
    """(B, H, W, C) -> (B, patches, patch * patch * C), raster order, values (row, column, channel)."""
    batch, height, width, channels = images.shape
    x = images.reshape(batch, height // patch, patch, width // patch, patch, channels)
    return x.swapaxes(2, 3).reshape(batch, -1, patch * patch * channels)


class Trunk(nn.Module):
    """Base of both models: patch embedding, blocks, and the order table of their scans."""

    def __init__(self, spec: ModelSpec, scan: str) -> None:
        super().__init__()
        encoder = spec.encoder
        self.recompute = False
        self.patch_embed = Linear(encoder.patch_values, encoder.width)
        self.layers = [Block(encoder, spec.directions, scan) for _ in range(encoder.depth)]
        self._order = mx.array(direction_orders(spec))  # with an underscore, so not a parameter

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
        return {
            "decoder_input": latents,
            "prediction": prediction,
            "loss_per_token": loss,
            "loss": loss.mean(),
        }

    def target(self, patches: mx.array) -> mx.array:
        """The targets of the decoder, (B, T, patch values) float32."""
        target = patches[:, self._target_patches]
        if self.spec.target is Target.RAW:
            return target
        centred = target - target.mean(-1, keepdims=True)
        variance = centred.square().sum(-1, keepdims=True) / (target.shape[-1] - 1)  # unbiased
        return centred * mx.rsqrt(variance + TARGET_EPS)


class Classifier(Trunk):
    """Classifies an image from K scans of its patches around a class token."""

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
    block for the backward pass, and recompute the rest.
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
