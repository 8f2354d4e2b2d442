"""The classifier and the pretraining model's encoder as ONNX nodes, from images to outputs.

The input is normalised images (B, channels, H, W). Inside, tokens are the first axis: (T, B, D).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from arm_convert.onnx_model.builder import FLOAT, AnyArray, Builder
from arm_convert.onnx_model.influence import influence_on
from arm_convert.onnx_model.mixer import Directions, Float, Recorded, mixer, silu
from arm_core.explain.layout import CLASS, token_weights
from arm_core.model.reference.model import Weights
from arm_core.model.spec import ClassifierSpec, ModelSpec, Pooling, PretrainSpec
from arm_core.model.tokens import direction_orders, encoder_patches


class _Network:
    """One model under construction."""

    def __init__(
        self,
        g: Builder,
        spec: ModelSpec,
        parameters: Mapping[str, AnyArray],
        batch: int | None,
        dtype: Float,
    ) -> None:
        self.g, self.spec, self.dtype, self.batch = g, spec, dtype, batch
        self.w = Weights(parameters)
        self.record: list[Recorded] = []
        """Tensors of each block's mixer, for influence maps."""

    def weight(self, name: str, array: AnyArray) -> str:
        return self.g.constant(name, array.astype(self.dtype))

    def linear(self, x: str, name: str) -> str:
        w = self.w.at(name)
        product = self.g("MatMul", x, self.weight(f"{name}.weight", w["weight"].T), name=f"{name}.matmul")
        return self.g("Add", product, self.weight(f"{name}.bias", w["bias"]), name=f"{name}.add")

    def norm(self, x: str, name: str) -> str:
        w = self.w.at(name)
        scale, bias = (self.weight(f"{name}.{part}", w[part]) for part in ("weight", "bias"))
        eps = self.spec.encoder.norm_eps
        return self.g("LayerNormalization", x, scale, bias, axis=-1, epsilon=eps, name=name)

    def patches(self, images: str) -> str:
        """(B, C, H, W) -> (patches, B, D), raster order, without the embedding's bias."""
        g, encoder = self.g, self.spec.encoder
        side, width = encoder.patch, encoder.width
        kernel = self.w["patch_embed.weight"].reshape(width, side, side, encoder.channels)
        weight = self.weight("patch_embed.weight", kernel.transpose(0, 3, 1, 2))
        maps = g("Conv", images, weight, kernel_shape=[side, side], strides=[side, side], name="patch_embed")
        rows = g("Reshape", maps, g.ints(0, width, self.spec.patches))
        return g("Transpose", rows, perm=[2, 0, 1])

    def initial_state(self, x: str) -> str:
        """(K, B, N, D) zeros, created for the batch of x (T, B, D) if it is not fixed."""
        g, encoder, k = self.g, self.spec.encoder, self.spec.directions
        if self.batch is not None:
            zeros = np.zeros((k, self.batch, encoder.state, encoder.width), np.float32)
            return g.constant("initial_state", zeros)
        batch = g("Shape", x, start=1, end=2)
        shape = g("Concat", g.ints(k), batch, g.ints(encoder.state, encoder.width), axis=0)
        return g("ConstantOfShape", shape, name="initial_state")

    def blocks(self, x: str) -> list[str]:
        """Output (T, B, D) of every block."""
        g, outputs = self.g, []
        self.directions = directions = Directions(
            encoder=self.spec.encoder,
            order=direction_orders(self.spec),
            state=self.initial_state(x),
            batch="batch" if self.batch is None else self.batch,
            dtype=self.dtype,
        )
        for i in range(self.spec.encoder.depth):
            name = f"layers.{i}"
            weights = self.w.at(f"{name}.mixer")
            normed = self.norm(x, f"{name}.norm1")
            branch = mixer(g, weights, normed, directions, f"{name}.mixer", self.record)
            x = g("Add", x, branch)
            normed = self.norm(x, f"{name}.norm2")
            hidden = silu(g, self.linear(normed, f"{name}.mlp.w1"))
            hidden = g("Mul", hidden, self.linear(normed, f"{name}.mlp.w2"))
            x = g("Add", x, self.linear(hidden, f"{name}.mlp.w3"), name=name)
            outputs.append(x)
        return outputs

    def classifier(self, images: str) -> dict[str, str]:
        """`logits` (B, classes), `features` (B, D), and `tokens` (B, T, D): the last norm's output."""
        assert isinstance(self.spec, ClassifierSpec)
        g, w, middle, tokens = self.g, self.w, self.spec.class_position, self.spec.tokens
        position = w["pos_embed"] + w["patch_embed.bias"]
        position[middle] = w["pos_embed"][middle] + w["cls_token"]
        # The class token is a row of zeros plus its share of the table.
        padded = g("Pad", self.patches(images), g.ints(1, 0, 0, 0, 0, 0))
        table = np.insert(np.arange(1, tokens), middle, 0).astype(np.int64)
        x = g("Gather", padded, g.shared(table), axis=0)
        x = g("Add", x, self.weight("position", position[:, None]), name="embedding")
        x = self.norm(self.blocks(x)[-1], "norm_f")
        if self.spec.pooling is Pooling.MEAN:
            share = np.zeros(tokens)
            share[:middle], share[middle + 1 :] = 0.5 / middle, 0.5 / (tokens - 1 - middle)
            weighted = g("Mul", x, self.weight("pooling", share[:, None, None]))
            features = g("ReduceSum", weighted, g.ints(0), keepdims=0, name="pooled")
        else:
            features = g("Gather", x, g.shared(np.array(middle, np.int64)), axis=0, name="pooled")
        return {"features": features, "tokens": x}

    def influence(self) -> str:
        """(B, rows, columns): influence of each patch on the features, through the last block's mixer."""
        assert isinstance(self.spec, ClassifierSpec)
        g, name = self.g, f"layers.{self.spec.encoder.depth - 1}.mixer"
        pooled = token_weights(self.spec, CLASS)
        found = influence_on(g, self.w.at(name), self.record[-1], self.directions, pooled, name)
        kept = np.delete(np.arange(self.spec.tokens), self.spec.class_position).astype(np.int64)
        patches = g("Transpose", g("Gather", found, g.shared(kept), axis=0), perm=[1, 0])
        return g("Reshape", patches, g.ints(0, *self.spec.grid))

    def head(self, features: str) -> str:
        return self.linear(features, "head")

    def decoder_input(self, images: str) -> str:
        """A pretraining model's latents (B, T, E, decoder blocks), the input of its decoder."""
        assert isinstance(self.spec, PretrainSpec)
        g, w, spec, read = self.g, self.w, self.spec, encoder_patches(self.spec)
        x = g("Gather", self.patches(images), g.shared(read.astype(np.int64)), axis=0)
        position = (w["pos_embed"] + w["patch_embed.bias"])[read, None]
        outputs = self.blocks(g("Add", x, self.weight("position", position), name="embedding"))
        taps = [self.norm(outputs[tap - 1], f"tap_norms.{j}") for j, tap in enumerate(spec.taps)]
        joined = self.linear(g("Concat", *taps, axis=-1), "taps_to_decoder")
        joined = g("Transpose", joined, perm=[1, 0, 2])
        return g("Reshape", joined, g.ints(0, spec.tokens, spec.decoder_width, spec.decoder_depth))


def network(
    g: Builder,
    spec: ModelSpec,
    parameters: Mapping[str, AnyArray],
    images: str,
    *,
    batch: int | None,
    dtype: Float,
    features: bool,
    influence: bool = False,
) -> dict[str, tuple[str, tuple[int | str, ...]]]:
    """Add a model's nodes; returns the tensor and the shape of each output by its name.

    images: a tensor (B, channels, H, W) of `dtype`, normalised.  batch: B, or None if it is not fixed.
    features: output a classifier's `features` and `tokens` instead of its `logits`. A pretraining model
    outputs `decoder_input`, like `Engine.forward`.
    influence: also output `influence` (B, rows, columns) of a float32 classifier.
    """
    net = _Network(g, spec, parameters, batch, dtype)
    size: int | str = "batch" if batch is None else batch
    width = spec.encoder.width
    outputs: dict[str, tuple[str, tuple[int | str, ...]]]
    if isinstance(spec, PretrainSpec):
        latents = (size, spec.tokens, spec.decoder_width, spec.decoder_depth)
        outputs = {"decoder_input": (net.decoder_input(images), latents)}
    else:
        found = net.classifier(images)
        if features:
            tokens = g("Transpose", found["tokens"], perm=[1, 0, 2])
            outputs = {
                "features": (found["features"], (size, width)),
                "tokens": (tokens, (size, spec.tokens, width)),
            }
        else:
            outputs = {"logits": (net.head(found["features"]), (size, spec.classes))}
        if influence:
            outputs["influence"] = (net.influence(), (size, *spec.grid))
    if dtype is np.float32:
        return outputs
    return {name: (g("Cast", tensor, to=FLOAT), shape) for name, (tensor, shape) in outputs.items()}
