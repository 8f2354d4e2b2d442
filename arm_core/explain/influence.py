"""Influence maps: how much token s contributes to token t in each mixer, direction by direction.

The influence of s on t in direction k is the signed share I_k[t, s] = <c_k(t<-s), o_t> / |o_t|^2 of the
mixer's output o_t, where c_k(t<-s) is the contribution of token s through the convolution, the scan, the
gate and the output projection (`arm_core.model.reference.influence` has the equations). Coefficients that
depend on the image are held at their values, so contributions add up exactly: over all s, the mean of the
directions and the share of the convolution's bias make 1 for every t.

Maps of single layers do not show what earlier layers moved. `Influence.rollout` multiplies the layers like
attention rollout (Abnar and Zuidema, arXiv:2005.00928), which is a heuristic. `gradient_times_input` freezes
nothing and serves as a check.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from arm_core.engine.protocol import Array, Engine, TrainingState
from arm_core.explain.layout import CLASS, Token, token_weights
from arm_core.model.spec import ClassifierSpec, ModelSpec
from arm_core.model.tokens import direction_orders

F32 = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Influence:
    """Influence maps of some layers for some images. B images, M layers, K directions, T tokens."""

    spec: ModelSpec
    layers: tuple[int, ...]
    """Blocks, counted from 0 as in the names of parameters."""
    maps: F32
    """(B, M, K, T, T): [..., t, s] is the influence of token s on token t if this direction were the only
    one."""
    mixing: F32
    """(B, M, T): norm of the mixer's output over that norm plus the norm of the token it is added to."""

    @property
    def mean(self) -> F32:
        """(B, M, T, T): the mean over the directions, which the mixer computes."""
        return np.asarray(self.maps.mean(2))

    def rollout(self) -> F32:
        """(B, T, T): share of each input token in each output token of the last layer; rows add up to 1.

        Every layer mixes token t with weight `mixing` from the absolute values of its mean map, normalised to
        sum 1, and keeps the rest of t. MLPs act on each token separately. Raises ValueError unless the layers
        are all layers from the first up to some layer.
        """
        if self.layers != tuple(range(len(self.layers))):
            raise ValueError(
                f"rollout: expected maps of all layers from 0 on, found {', '.join(map(str, self.layers))}"
            )
        batch, _, tokens = self.mixing.shape
        total = np.broadcast_to(np.eye(tokens, dtype=np.float32), (batch, tokens, tokens))
        for i in range(len(self.layers)):
            size = np.abs(self.maps[:, i].mean(1))
            rows = size.sum(-1, keepdims=True)
            size = np.divide(size, rows, out=np.zeros_like(size), where=rows > 0)
            share = np.where(rows[..., 0] > 0, self.mixing[:, i], 0)[..., None]
            total = (1 - share) * total + share * (size @ total)
        return np.asarray(total)

    def to(self, token: Token) -> Influence:
        """Reduce the targets to the given token: maps of shape (B, M, K, 1, T)."""
        weights = token_weights(self.spec, token)
        maps = np.einsum("t,bmkts->bmks", weights, self.maps)[..., None, :]
        return Influence(spec=self.spec, layers=self.layers, maps=maps, mixing=self.mixing @ weights[:, None])


class Recorder(Protocol):
    """Source of influence maps: an engine, or a library model in its place."""

    spec: ModelSpec

    def forward(self, images: Array, *, intermediates: bool = False) -> dict[str, Array]:
        """Same as `Engine.forward`."""

    def export_state(self) -> TrainingState:
        """Same as `Engine.export_state`; only the parameters are read."""


def influence(
    engine: Recorder,
    images: Array,
    *,
    layers: Iterable[int] | None = None,
    parameters: Mapping[str, Array] | None = None,
    threads: int | None = None,
) -> Influence:
    """Influence maps of normalised images (B, H, W, 3).

    layers: blocks from 0; None for all.  parameters: those of the engine, if the caller already has them.
    threads: of the CPU kernel.
    Time and memory: see `docs/explain.md`; L x L x D values are never stored. Raises ValueError for a layer
    that does not exist.
    """
    spec = engine.spec
    chosen = check_layers(spec, layers)
    values = engine.export_state().parameters if parameters is None else parameters
    recorded = engine.forward(images, intermediates=True)
    order = direction_orders(spec)
    shape = (len(images), len(chosen), len(order), spec.tokens, spec.tokens)
    maps, mixing = np.empty(shape, np.float32), np.empty((*shape[:2], spec.tokens), np.float32)
    for m, i in enumerate(chosen):
        mixer = FrozenMixer(spec, values, i, threads)
        before = recorded["tokens"] if i == 0 else recorded[f"layers.{i - 1}"]
        for b, (x, output) in enumerate(zip(before, recorded[f"layers.{i}.mixer"], strict=True)):
            maps[b, m] = mixer.influence(x, output, order)
            norms = np.linalg.norm(output, axis=-1), np.linalg.norm(x, axis=-1)
            mixing[b, m] = norms[0] / np.maximum(norms[0] + norms[1], np.finfo(np.float32).tiny)
    return Influence(spec=spec, layers=chosen, maps=maps, mixing=mixing)


def check_layers(spec: ModelSpec, layers: Iterable[int] | None) -> tuple[int, ...]:
    """The selected layers, in ascending order."""
    depth = spec.encoder.depth
    chosen = tuple(range(depth)) if layers is None else tuple(sorted(set(layers)))
    if wrong := [i for i in chosen if not 0 <= i < depth]:
        raise ValueError(f"layer {wrong[0]}: the model has layers 0 to {depth - 1}")
    return chosen


class FrozenMixer:
    """One mixer with its weights, in float32, with the same steps as the reference's `mixer`."""

    def __init__(
        self, spec: ModelSpec, parameters: Mapping[str, Array], layer: int, threads: int | None
    ) -> None:
        self._spec, self._threads = spec.encoder, threads
        prefix = f"layers.{layer}."
        self._w = {
            name.removeprefix(prefix): np.asarray(value, np.float32)  # also of a quantized matrix
            for name, value in parameters.items()
            if name.startswith((f"{prefix}norm1.", f"{prefix}mixer."))
        }

    def influence(self, x: F32, output: F32, order: npt.NDArray[np.int32]) -> F32:
        """(K, T, T) from the block's input x and its mixer's output, both (T, D)."""
        from arm_core import cpu_kernels  # loads Numba

        w, spec = self._w, self._spec
        centred = x - x.mean(-1, keepdims=True)
        normed = centred / np.sqrt(centred.var(-1, keepdims=True) + spec.norm_eps)
        normed = normed * w["norm1.weight"] + w["norm1.bias"]
        inner, z = np.split(normed @ w["mixer.in_proj.weight"].T, 2, axis=-1)
        conv = _convolve(inner, w["mixer.conv.weight"], w["mixer.conv.bias"], order)
        opening = _sigmoid(conv)
        projected = (conv * opening) @ w["mixer.x_proj.weight"].swapaxes(1, 2)
        low, B, C = np.split(projected, [spec.dt_rank, spec.dt_rank + spec.state], axis=-1)
        dt = low @ w["mixer.dt_proj.weight"].swapaxes(1, 2) + w["mixer.dt_proj.bias"][:, None]
        square = (output.astype(np.float64) ** 2).sum(-1, keepdims=True)
        towards = np.divide(output, square, out=np.zeros_like(output), where=square > 0, casting="same_kind")
        q = z * _sigmoid(z) * (towards @ w["mixer.out_proj.weight"])
        return cpu_kernels.influence_map(
            np.ascontiguousarray(inner),
            np.maximum(dt, 0) + np.log1p(np.exp(-np.abs(dt))),  # softplus; logaddexp takes 7 times as long
            opening,
            w["mixer.conv.weight"],
            -np.exp(w["mixer.A_log"]),
            np.ascontiguousarray(B),
            np.ascontiguousarray(C),
            w["mixer.D"],
            q,
            order,
            threads=self._threads,
        )


def _sigmoid(x: F32) -> F32:
    return np.asarray(0.5 * (1 + np.tanh(0.5 * x)))


def _convolve(x: F32, weight: F32, bias: F32, order: npt.NDArray[np.int32]) -> F32:
    """(K, T, D): the causal convolution along each direction, before its SiLU."""
    taps = weight.shape[-1]
    out = np.empty((len(order), *x.shape), np.float32)
    for k, steps in enumerate(order):
        padded = np.concatenate([np.zeros((taps - 1, x.shape[1]), np.float32), x[steps]])
        total = bias[k] + sum(padded[j : j + len(x)] * weight[k, :, j] for j in range(taps))
        out[k][steps] = total
    return out


def gradient_times_input(engine: Engine, images: Array, *, token: Token = CLASS) -> F32:
    """(B, rows, columns): gradient of the answer times the normalised pixels, added up over each patch.

    For `class`, the answer is the logit of the most likely class. For a patch, it is the last layer's output
    at that patch along its own value, divided by its square: a share, like the influence. Nothing is frozen.
    images: (B, H, W, 3), normalised. Raises ValueError for a token that does not exist.
    """
    spec = engine.spec
    weights = token_weights(spec, token)
    if token == CLASS and isinstance(spec, ClassifierSpec):
        name = "logits"
        logits = engine.forward(images)[name]
        towards = np.zeros_like(logits)
        towards[np.arange(len(logits)), logits.argmax(-1)] = 1
    else:
        name = f"layers.{spec.encoder.depth - 1}"
        last = engine.forward(images, intermediates=True)[name]
        towards = last / np.maximum((last**2).sum(-1, keepdims=True), np.finfo(np.float32).tiny)
        towards = towards * weights[:, None]
    products = images * engine.input_gradient(images, name, towards)
    (rows, columns), patch = spec.grid, spec.encoder.patch
    return np.asarray(products.reshape(len(images), rows, patch, columns, -1).sum((2, 4)))
