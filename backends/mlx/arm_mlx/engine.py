"""The MLX engine: one model on one device, behind the `arm_core.backend.Engine` protocol."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx.utils import tree_unflatten

from arm_core import cpu_scan
from arm_core.backend import (
    Array,
    Batch,
    EngineOptions,
    Precision,
    StepResult,
    TrainingState,
    choose_scan,
)
from arm_core.optimizer import CLIP_EPS, OptimizerSettings, parameter_groups
from arm_core.parameters import check_parameters
from arm_core.quantized import Quantized
from arm_core.spec import ModelSpec
from arm_mlx import blas
from arm_mlx.model import build_model, named, soft_cross_entropy
from arm_mlx.scan import scans

log = logging.getLogger("arm_mlx")

Arrays = dict[str, mx.array]


def devices() -> list[str]:
    """`gpu` where MLX has Metal, and `cpu`."""
    return ["gpu", "cpu"] if mx.metal.is_available() else ["cpu"]


def resolve_device(name: str) -> mx.Device:
    """`auto` is the Apple GPU or else the CPU; a ValueError names what is there."""
    if name == "auto":
        name = devices()[0]
    if name not in ("cpu", "gpu"):
        raise ValueError(f"device: expected auto, cpu or gpu, found {name!r}")
    if name not in devices():
        raise ValueError("device 'gpu' is not there: MLX sees no Metal on this machine")
    return mx.Device(mx.gpu if name == "gpu" else mx.cpu)


def set_threads(count: int) -> None:
    """Honour `EngineOptions.threads` where MLX lets us: in the CPU scan and in OpenBLAS's products."""
    cpu_scan.set_threads(count)
    if not blas.set_threads(count):
        log.warning("threads=%d reaches the scan alone: %s has no such setting", count, blas.load().library)


@dataclass(frozen=True)
class PendingStep:
    """Loss and gradient norm that may still be on their way from the device."""

    loss: mx.array
    grad_norm: mx.array

    def result(self) -> StepResult:
        return StepResult(loss=to_float(self.loss), grad_norm=to_float(self.grad_norm))


class MlxEngine:
    """Runs `spec` on an Apple GPU or a CPU. float32 master weights, bfloat16 products on request."""

    def __init__(
        self,
        spec: ModelSpec,
        parameters: Mapping[str, Array],
        *,
        optimizer: OptimizerSettings,
        options: EngineOptions,
    ) -> None:
        self.spec = spec
        self._device = resolve_device(options.device)
        self._settings = optimizer
        on_gpu = self._device.type == mx.gpu
        self.scan = choose_scan(scans("gpu" if on_gpu else "cpu"), options.scan)
        if options.threads is not None:
            set_threads(options.threads)
        self.device = str(mx.device_info()["device_name"]) if on_gpu else "CPU"
        products = mx.bfloat16 if options.precision is Precision.BFLOAT16 else mx.float32
        self._model = build_model(spec, self.scan, products)
        self._groups = parameter_groups(spec, optimizer)
        self._share_of_loss = nn.value_and_grad(self._model, lambda batch, count: self._loss(batch) / count)
        self.load_state(TrainingState(parameters=dict(parameters)))

    def forward(self, images: Array, *, intermediates: bool = False) -> dict[str, Array]:
        seen: Arrays | None = {} if intermediates else None
        with mx.stream(self._device):
            outputs = self._model(put(images), seen=seen)
            return {name: to_numpy(value) for name, value in {**(seen or {}), **outputs}.items()}

    def loss_and_gradients(self, batch: Batch) -> tuple[float, dict[str, Array]]:
        self._refuse_quantized()
        with mx.stream(self._device):
            loss, gradients = self._accumulate([batch], 1)
            return to_float(loss), {name: to_numpy(gradients[name]) for name in self._trainable}

    def train_step(
        self, batches: Sequence[Batch], *, step: int, lr: float, of: int | None = None
    ) -> PendingStep:
        self._refuse_quantized()
        with mx.stream(self._device):
            loss, gradients = self._accumulate(batches, of or len(batches))
            norm = mx.sqrt(sum((mx.square(g).sum() for g in gradients.values()), mx.zeros(())))
            self._update(loss, gradients, norm, step, lr)
            mx.async_eval(loss, norm, self._model.parameters(), self._exp_avg, self._exp_avg_sq, self._ema)
        return PendingStep(loss, norm)

    def exchange_average(self) -> None:
        weights, averages = self._trainable, list(self._ema.items())
        self._model.update(tree_unflatten(averages))
        for name, _ in averages:
            self._ema[name] = weights[name]

    def export_state(self) -> TrainingState:
        self._refuse_quantized()
        return TrainingState(
            parameters={name: to_numpy(p) for name, p in named(self._model.parameters()).items()},
            exp_avg={name: to_numpy(m) for name, m in self._exp_avg.items()},
            exp_avg_sq={name: to_numpy(v) for name, v in self._exp_avg_sq.items()},
            ema={name: to_numpy(e) for name, e in self._ema.items()},
        )

    def load_state(self, state: TrainingState) -> None:
        check_parameters(self.spec, state.parameters)
        quantized = {n: a for n, a in state.parameters.items() if isinstance(a, Quantized)}
        plain = [(name, put(array)) for name, array in state.parameters.items() if name not in quantized]
        self._model.load_weights(plain, strict=not quantized)
        modules = dict(self._model.named_modules())
        for name, weight in quantized.items():
            modules[name.removesuffix(".weight")].hold(weight)
        self._quantized = bool(quantized)
        self._exp_avg = self._like_trainable(state.exp_avg, "exp_avg")
        self._exp_avg_sq = self._like_trainable(state.exp_avg_sq, "exp_avg_sq")
        self._ema: Arrays = {}
        if self._settings.ema_decay is not None:
            start = {name: state.parameters[name] for name in self._trainable}
            self._ema = self._like_trainable(state.ema or start, "ema")

    def _refuse_quantized(self) -> None:
        if self._quantized:
            raise ValueError("a quantized model does not train; start from the one it was made of")

    @property
    def _trainable(self) -> Arrays:
        return named(self._model.trainable_parameters())

    def _like_trainable(self, arrays: Mapping[str, Array], what: str) -> Arrays:
        """Device copies of arrays, one per trainable parameter; zeros where there are none at all."""
        if not arrays:
            return {name: mx.zeros_like(p) for name, p in self._trainable.items()}
        if difference := sorted(set(arrays) ^ set(self._trainable)):
            raise ValueError(
                f"{what}: expected the trainable parameters, differs in {', '.join(difference[:5])}"
            )
        return {name: put(arrays[name]) for name in self._trainable}

    def _loss(self, batch: Batch) -> mx.array:
        scale = None if batch.branch_scale is None else put(batch.branch_scale)
        outputs = self._model(put(batch.images), scale)
        if "loss" in outputs:
            return outputs["loss"]
        if batch.targets is None:
            raise ValueError("a classifier trains on batches with targets (B, classes), found None")
        return soft_cross_entropy(outputs["logits"], put(batch.targets))

    def _accumulate(self, batches: Sequence[Batch], of: int) -> tuple[mx.array, Arrays]:
        """Their part of the mean loss over `of` micro-batches, and its gradients by name."""
        total = mx.zeros(())
        gradients: Arrays = {}
        for batch in batches:
            loss, tree = self._share_of_loss(batch, of)
            new = named(tree)
            gradients = {name: gradients[name] + g if gradients else g for name, g in new.items()}
            total = total + loss
            mx.async_eval(total, gradients)  # one micro-batch's graph at a time
        return total, gradients

    def _update(self, loss: mx.array, gradients: Arrays, norm: mx.array, step: int, lr: float) -> None:
        """AdamW, clipping and EMA, without waiting for the device; nothing changes where not finite."""
        settings = self._settings
        finite = mx.isfinite(loss + norm)
        factor = (
            mx.array(1.0) if settings.clip is None else mx.minimum(settings.clip / (norm + CLIP_EPS), 1.0)
        )
        update = partial(adamw, factor=factor, step=step, settings=settings)
        old, new = self._trainable, {}
        for group in self._groups:
            rate = lr * group.lr_scale
            for name in group.names:
                before = old[name], self._exp_avg[name], self._exp_avg_sq[name]
                after = update(*before, gradients[name], lr=rate, weight_decay=group.weight_decay)
                new[name], self._exp_avg[name], self._exp_avg_sq[name] = (
                    mx.where(finite, b, a) for a, b in zip(before, after, strict=True)
                )
                if settings.ema_decay is not None:
                    ema = self._ema[name]
                    change = (1.0 - settings.ema_decay) * (new[name] - ema)
                    self._ema[name] = mx.where(finite, ema + change, ema)
        self._model.update(tree_unflatten(list(new.items())))


def adamw(
    p: mx.array, m: mx.array, v: mx.array, gradient: mx.array,
    *, factor: mx.array, step: int, settings: OptimizerSettings, lr: float, weight_decay: float,
) -> tuple[mx.array, mx.array, mx.array]:  # fmt: skip
    """One tensor's update by the formula of `OptimizerSettings`: new parameter and moments.

    factor: what clipping multiplies the gradient with.  lr: with the layer's scale.
    """
    beta1, beta2 = settings.betas
    g = gradient * factor
    m = beta1 * m + (1.0 - beta1) * g
    v = beta2 * v + (1.0 - beta2) * mx.square(g)
    denominator = mx.sqrt(v / (1.0 - beta2**step)) + settings.eps
    p = p * (1.0 - lr * weight_decay) - (lr / (1.0 - beta1**step)) * m / denominator
    return p, m, v


def put(array: Array) -> mx.array:
    """A float32 copy in MLX."""
    return mx.array(np.asarray(array, np.float32))


def to_numpy(array: mx.array) -> Array:
    """A float32 copy in host memory."""
    return np.array(array.astype(mx.float32), order="C")


def to_float(scalar: mx.array) -> float:
    """The value, as soon as the device has it."""
    return cast(float, scalar.item())
