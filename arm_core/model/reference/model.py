"""Both models in float64 NumPy, written to be read: forward only, one image or many.

`forward(spec, parameters, images)` returns the outputs of the protocol's `Engine.forward` and these
intermediate tensors (T tokens, D width, E decoder width):

    tokens               (B, T, D)  patch embedding + position (and class token)
    layers.<i>.mixer     (B, T, D)  output of the mixer's branch
    layers.<i>           (B, T, D)  output of the block
    taps_to_decoder      (B, T, E * decoder depth)
    queries              (B, T, E)  input of the decoder
    decoder.<j>          (B, T, E)  output of the decoder's block
    norm_f               (B, T, D)  the classifier's last norm
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from arm_core.model.reference.scan import F64, directional_conv, selective_scan, silu
from arm_core.model.spec import ClassifierSpec, EncoderSpec, ModelSpec, Pooling, PretrainSpec, Target
from arm_core.model.tokens import decoder_mask, direction_orders, encoder_patches, target_patches

TARGET_EPS = 1e-6
"""Added to the variance of a patch when targets are normalised."""


class Weights:
    """Parameters below a prefix, as float64: `w["norm1"]["weight"]` reads `<prefix>norm1.weight`."""

    def __init__(self, arrays: Mapping[str, npt.NDArray[np.generic]], prefix: str = "") -> None:
        self._arrays, self._prefix = arrays, prefix

    def at(self, name: str) -> Weights:
        return Weights(self._arrays, f"{self._prefix}{name}.")

    def __getitem__(self, name: str) -> F64:
        return self._arrays[self._prefix + name].astype(np.float64)


def linear(x: F64, w: Weights) -> F64:
    return np.asarray(x @ w["weight"].T + w["bias"])


def layer_norm(x: F64, w: Weights, eps: float) -> F64:
    centred = x - x.mean(-1, keepdims=True)
    return np.asarray(centred / np.sqrt(centred.var(-1, keepdims=True) + eps) * w["weight"] + w["bias"])


def gelu(x: F64) -> F64:
    """The exact form, x Phi(x)."""
    erf = np.vectorize(math.erf, otypes=[np.float64])
    return np.asarray(0.5 * x * (1.0 + erf(x / math.sqrt(2.0))))


def unfold_patches(images: npt.NDArray[np.number], patch: int) -> F64:
    """(B, H, W, C) -> (B, patches, patch * patch * C), raster order, values (row, column, channel)."""
    batch, height, width, channels = images.shape
    x = images.astype(np.float64).reshape(batch, height // patch, patch, width // patch, patch, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, -1, patch * patch * channels)


def prediction_target(spec: PretrainSpec, patches: F64) -> F64:
    """The decoder's targets, (B, tokens, patch values); the variance is unbiased, like torch's `var`."""
    target = patches[:, target_patches(spec)]
    if spec.target is Target.NORMALIZED:
        variance = target.var(-1, ddof=1, keepdims=True)
        target = (target - target.mean(-1, keepdims=True)) / np.sqrt(variance + TARGET_EPS)
    return target


def mixer(spec: EncoderSpec, w: Weights, x: F64, order: npt.NDArray[np.int32]) -> F64:
    """Mamba-1 with K directions that share in_proj, gate and out_proj. x: (B, T, D)."""
    x, z = np.split(x @ w["in_proj.weight"].T, 2, axis=-1)
    u = directional_conv(x, w["conv.weight"], w["conv.bias"], order)  # (K, B, T, D)
    projected = np.einsum("kbtd,krd->kbtr", u, w["x_proj.weight"])
    low, B, C = np.split(projected, [spec.dt_rank, spec.dt_rank + spec.state], axis=-1)
    dt = np.einsum("kbtr,kdr->kbtd", low, w["dt_proj.weight"])
    out = selective_scan(u, dt, -np.exp(w["A_log"]), B, C, w["D"], w["dt_proj.bias"], z, order)
    return np.asarray(out @ w["out_proj.weight"].T)


def swiglu(w: Weights, x: F64) -> F64:
    return linear(silu(linear(x, w.at("w1"))) * linear(x, w.at("w2")), w.at("w3"))


def attention(w: Weights, query: F64, latent: F64, mask: npt.NDArray[np.bool_], heads: int) -> F64:
    """Cross-attention of queries (B, T, E) on latents (B, T, E) under a (T, T) mask."""

    def split(x: F64) -> F64:  # (B, T, E) -> (B, heads, T, E / heads)
        return x.reshape(*x.shape[:2], heads, -1).swapaxes(1, 2)

    key, value = np.split(linear(latent, w.at("key_value")), 2, axis=-1)
    q, k, v = split(linear(query, w.at("query"))), split(key), split(value)
    scores = np.where(mask, q @ k.swapaxes(-1, -2) / math.sqrt(q.shape[-1]), -np.inf)
    scores = np.exp(scores - scores.max(-1, keepdims=True))
    out = (scores / scores.sum(-1, keepdims=True)) @ v
    return linear(out.swapaxes(1, 2).reshape(query.shape), w.at("proj"))


def _trunk(spec: ModelSpec, w: Weights, tokens: F64, seen: dict[str, F64]) -> F64:
    encoder, order = spec.encoder, direction_orders(spec)
    x = seen["tokens"] = tokens
    for i in range(encoder.depth):
        block = w.at(f"layers.{i}")
        branch = mixer(encoder, block.at("mixer"), layer_norm(x, block.at("norm1"), encoder.norm_eps), order)
        seen[f"layers.{i}.mixer"] = branch
        x = x + branch
        x = x + swiglu(block.at("mlp"), layer_norm(x, block.at("norm2"), encoder.norm_eps))
        seen[f"layers.{i}"] = x
    return x


def _pretrain(spec: PretrainSpec, w: Weights, images: npt.NDArray[np.floating]) -> dict[str, F64]:
    seen: dict[str, F64] = {}
    eps = spec.encoder.norm_eps
    patches = unfold_patches(images, spec.encoder.patch)
    read = encoder_patches(spec)
    _trunk(spec, w, linear(patches[:, read], w.at("patch_embed")) + w["pos_embed"][read], seen)

    taps = [layer_norm(seen[f"layers.{i - 1}"], w.at(f"tap_norms.{j}"), eps) for j, i in enumerate(spec.taps)]
    joined = seen["taps_to_decoder"] = linear(np.concatenate(taps, -1), w.at("taps_to_decoder"))
    latents = joined.reshape(*joined.shape[:2], spec.decoder_width, spec.decoder_depth)

    start = w["query_token"] + w["decoder_pos_embed"][target_patches(spec)]
    x = seen["queries"] = np.broadcast_to(start, (len(images), *start.shape))
    mask = decoder_mask(spec)
    for j in range(spec.decoder_depth):
        block = w.at(f"decoder.{j}")
        latent = layer_norm(latents[..., j], block.at("norm_latent"), eps)
        query = layer_norm(x, block.at("norm_query"), eps)
        x = x + attention(block.at("attention"), query, latent, mask, spec.decoder_heads)
        hidden = gelu(linear(layer_norm(x, block.at("norm_mlp"), eps), block.at("mlp.fc1")))
        x = seen[f"decoder.{j}"] = x + linear(hidden, block.at("mlp.fc2"))
    prediction = linear(layer_norm(x, w.at("prediction_norm"), eps), w.at("prediction"))

    loss = ((prediction - prediction_target(spec, patches)) ** 2).mean((0, 2))
    outputs = {"decoder_input": latents, "prediction": prediction, "loss_per_token": loss}
    return {**seen, **outputs, "loss": np.asarray(loss.mean())}


def _classifier(spec: ClassifierSpec, w: Weights, images: npt.NDArray[np.floating]) -> dict[str, F64]:
    seen: dict[str, F64] = {}
    middle = spec.class_position
    x = linear(unfold_patches(images, spec.encoder.patch), w.at("patch_embed"))
    token = np.broadcast_to(w["cls_token"], (len(images), 1, spec.encoder.width))
    x = np.concatenate([x[:, :middle], token, x[:, middle:]], axis=1) + w["pos_embed"]
    x = seen["norm_f"] = layer_norm(_trunk(spec, w, x, seen), w.at("norm_f"), spec.encoder.norm_eps)
    if spec.pooling is Pooling.MEAN:
        pooled = (x[:, :middle].mean(1) + x[:, middle + 1 :].mean(1)) / 2.0
    else:
        pooled = x[:, middle]
    return {**seen, "features": np.asarray(pooled), "logits": linear(np.asarray(pooled), w.at("head"))}


def forward(
    spec: ModelSpec, parameters: Mapping[str, npt.NDArray[np.generic]], images: npt.NDArray[np.floating]
) -> dict[str, F64]:
    """Run a model on normalised images (B, H, W, 3): all outputs and intermediate tensors, float64."""
    w = Weights(parameters)
    return _pretrain(spec, w, images) if isinstance(spec, PretrainSpec) else _classifier(spec, w, images)
