"""The MLX engine: one model on one device, behind the `arm_core.engine.protocol.Engine` protocol."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import cast

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx.utils import tree_unflatten

from arm_core.engine.byte_images import ByteImages
from arm_core.engine.optimizer import OptimizerSettings, parameter_groups, required
from arm_core.engine.protocol import (
    Array,
    Batch,
    Compile,
    EngineOptions,
    Images,
    Precision,
    StepResult,
    StepStopped,
    TrainingState,
    check_towards,
)
from arm_core.engine.ranks import ALONE, Ranks
from arm_core.engine.scans import choose_scan
from arm_core.files.quantized import Quantized
from arm_core.model.spec import ClassifierSpec, ModelSpec
from arm_mlx import cpu_update, update
from arm_mlx.devices import device_name, resolve_device, set_threads
from arm_mlx.distributed import MlxRanks
from arm_mlx.execution import choose_compile
from arm_mlx.images import prepare
from arm_mlx.layers import named
from arm_mlx.model import build_model, soft_cross_entropy
from arm_mlx.scan import scans
from arm_mlx.update import Arrays, Moments, rates

LOSS = "loss"
"""The name of the loss among the gradients when they are summed over all ranks."""


@dataclass(frozen=True)
class PendingStep:
    """Loss and gradient norm; the device may still be computing them."""

    loss: mx.array
    grad_norm: mx.array
    raising_peer_failures: Callable[[], AbstractContextManager[None]]

    def result(self) -> StepResult:
        with self.raising_peer_failures():
            return StepResult(loss=to_float(self.loss), grad_norm=to_float(self.grad_norm))


@dataclass(frozen=True)
class Steps:
    """The two functions of a training step, compiled or not."""

    micro_step: Callable[[Arrays, mx.array, mx.array, Arrays], tuple[mx.array, Arrays]]
    """(batch, share, loss, gradients) -> loss and gradients with the share of this micro-batch."""
    finish: Callable[[Arrays, mx.array, mx.array, Arrays, mx.array], tuple[mx.array, mx.array]]
    """(last batch, share, loss, gradients, rates) -> loss and gradient norm, after the update."""


class MlxEngine:
    """Runs `spec` on an Apple GPU or a CPU, with float32 master weights and, on request, bfloat16 products.

    With `Compile.MODEL` the whole step, update included, is one compiled graph. MLX traces it at the first
    step and whenever the number of images changes. Without it, MLX runs each operation separately, and on a
    CPU the update is written in place.
    """

    def __init__(
        self,
        spec: ModelSpec,
        state: TrainingState,
        *,
        optimizer: OptimizerSettings | None,
        options: EngineOptions,
        ranks: Ranks = ALONE,
    ) -> None:
        self.spec = spec
        self._device = resolve_device(options.device)
        self._settings = optimizer
        on_gpu = self._device.type == mx.gpu
        self.scan = choose_scan(scans("gpu" if on_gpu else "cpu"), options.scan)
        self.compile = choose_compile(options, self.scan, self._device)
        compiled = self.compile is Compile.MODEL
        set_threads(options.threads)
        self.device = device_name(self._device)
        products = mx.bfloat16 if options.precision is Precision.BFLOAT16 else mx.float32
        self._model = build_model(spec, self.scan, products, recompute=options.recompute)
        self._ranks = ranks if isinstance(ranks, MlxRanks) else None
        self._raising_peer_failures = (
            nullcontext if self._ranks is None else self._ranks.raising_peer_failures
        )
        self._groups = [] if optimizer is None else parameter_groups(spec, optimizer)
        self._moments = Moments()
        self._share_of_loss = nn.value_and_grad(self._model, lambda batch, share: self._loss(batch) * share)
        self._update = update.update if on_gpu or compiled else cpu_update.update
        self._steps = self._compile() if compiled else Steps(self._micro_step, self._finish)
        self.load_state(state)

    def forward(self, images: Images, *, intermediates: bool = False) -> dict[str, Array]:
        seen: Arrays | None = {} if intermediates else None
        with mx.stream(self._device):
            self._model.eval()
            try:
                return to_host(self._model(put_images(images), seen=seen) | (seen or {}))
            finally:
                self._model.train()

    def input_gradient(self, images: Array, output: str, towards: Array) -> Array:
        weights = put(towards)

        def total(pixels: mx.array) -> mx.array:
            seen: Arrays = {}
            outputs = self._model(pixels, seen=seen) | seen
            check_towards(output, {name: value.shape for name, value in outputs.items()}, towards)
            return (outputs[output].astype(mx.float32) * weights).sum()

        with mx.stream(self._device):
            return to_numpy(mx.grad(total)(put(images)))

    def loss_and_gradients(self, batch: Batch) -> tuple[float, dict[str, Array]]:
        self._refuse_quantized()
        with mx.stream(self._device):
            loss, gradients = self._micro_step(self._put(batch), mx.array(1.0), mx.zeros(()), {})
            return to_float(loss), {name: to_numpy(gradients[name]) for name in self._trainable}

    def train_step(
        self,
        batches: Sequence[Batch],
        *,
        step: int,
        lr: float,
        total_micro_batches: int | None = None,
        stop: Callable[[], bool] | None = None,
    ) -> PendingStep:
        self._refuse_quantized()
        settings = required(self._settings)
        with mx.stream(self._device), self._raising_peer_failures():
            share = mx.array(1.0 / (total_micro_batches or len(batches)))
            loss, gradients = mx.zeros(()), cast(Arrays, {})
            for batch in batches[:-1]:
                loss, gradients = self._steps.micro_step(self._put(batch), share, loss, gradients)
                mx.async_eval(loss, gradients)  # one micro-batch's graph at a time
                if stop is not None and stop():
                    raise StepStopped
            now = mx.array(rates(step, lr, settings))
            loss, norm = self._steps.finish(self._put(batches[-1]), share, loss, gradients, now)
            del gradients  # so that the update can reuse their memory
            mx.async_eval(loss, norm, self._state)
        return PendingStep(loss, norm, self._raising_peer_failures)

    def swap_ema(self) -> None:
        weights, ema = self._trainable, self._moments.ema
        self._model.update(tree_unflatten(list(ema.items())))
        ema.update({name: weights[name] for name in ema})

    def export_state(self) -> TrainingState:
        self._refuse_quantized()
        return TrainingState(
            parameters=to_host(named(self._model.parameters())),
            exp_avg=to_host(self._moments.exp_avg),
            exp_avg_sq=to_host(self._moments.exp_avg_sq),
            ema=to_host(self._moments.ema),
        )

    def load_state(self, state: TrainingState) -> None:
        state.check(self.spec)
        plain: list[tuple[str, mx.array]] = []
        quantized: dict[str, Quantized] = {}
        for name, array in state.parameters.items():
            if isinstance(array, Quantized):
                quantized[name] = array
            else:
                plain.append((name, put(array)))
        self._model.load_weights(plain, strict=not quantized)
        modules = dict(self._model.named_modules())
        for name, weight in quantized.items():
            modules[name.removesuffix(".weight")].hold(weight)
        self._quantized = bool(quantized)
        if self._settings is None:
            return
        self._moments.exp_avg.update(self._trainable_copies(state.exp_avg, mx.zeros_like))
        self._moments.exp_avg_sq.update(self._trainable_copies(state.exp_avg_sq, mx.zeros_like))
        if self._settings.ema_decay is not None:
            # Separate copies: on a CPU the update writes in place.
            self._moments.ema.update(self._trainable_copies(state.ema, lambda p: put(np.asarray(p))))

    def _refuse_quantized(self) -> None:
        if self._quantized:
            raise ValueError("a quantized model cannot be trained; use the model that it was made from")

    @property
    def _trainable(self) -> Arrays:
        return named(self._model.trainable_parameters())

    def _trainable_copies(
        self, arrays: Mapping[str, Array], initial: Callable[[mx.array], mx.array]
    ) -> Arrays:
        """Copies in MLX, one per trainable parameter; without arrays, `initial` of its weight."""
        if not arrays:
            return {name: initial(p) for name, p in self._trainable.items()}
        return {name: put(arrays[name]) for name in self._trainable}

    def _put(self, batch: Batch) -> Arrays:
        """The arrays of a batch. Raises ValueError if one that this model needs is missing."""
        if batch.targets is None and isinstance(self.spec, ClassifierSpec):
            raise ValueError("a classifier trains on batches with targets (B, classes), found None")
        arrays = {"targets": batch.targets, "drop_path_scale": batch.drop_path_scale}
        found = {name: put(array) for name, array in arrays.items() if array is not None}
        return {"images": put_images(batch.images), **found}

    @property
    def _state(self) -> list[Arrays]:
        """All arrays that a step changes."""
        moments = self._moments
        return [cast(Arrays, self._model.state), moments.exp_avg, moments.exp_avg_sq, moments.ema]

    def _compile(self) -> Steps:
        """Compile both functions. The state is captured by the graphs; the arguments are what changes."""
        model = [self._model.state]  # an output too, since tracing leaves its arrays in the modules
        return Steps(
            mx.compile(self._micro_step, inputs=model, outputs=model),
            mx.compile(self._finish, inputs=self._state, outputs=self._state),
        )

    def _loss(self, batch: Arrays) -> mx.array:
        outputs = self._model(batch["images"], batch.get("drop_path_scale"))
        if "loss" in outputs:
            return outputs["loss"]
        return soft_cross_entropy(outputs["logits"], batch["targets"])

    def _micro_step(
        self, batch: Arrays, share: mx.array, loss: mx.array, gradients: Arrays
    ) -> tuple[mx.array, Arrays]:
        """The sums with this micro-batch's share of the loss and of its gradients by name."""
        part, tree = self._share_of_loss(batch, share)
        new = named(tree)
        return loss + part, {name: gradients[name] + g if gradients else g for name, g in new.items()}

    def _finish(
        self, batch: Arrays, share: mx.array, loss: mx.array, gradients: Arrays, now: mx.array
    ) -> tuple[mx.array, mx.array]:
        """The last micro-batch of a step, and the update. Returns loss and gradient norm."""
        loss, gradients = self._micro_step(batch, share, loss, gradients)
        if self._ranks is not None:
            gradients = self._ranks.sum({LOSS: loss, **gradients})
            loss = gradients.pop(LOSS)
        new, norm = self._update(
            self._trainable,
            self._moments,
            gradients,
            loss=loss,
            rates=now,
            groups=self._groups,
            settings=required(self._settings),
        )
        self._model.update(tree_unflatten(list(new.items())))
        return loss, norm


def put(array: Array) -> mx.array:
    """A float32 copy in MLX."""
    return mx.array(np.asarray(array, np.float32))


def put_images(images: Images) -> mx.array:
    return prepare(images) if isinstance(images, ByteImages) else put(images)


def to_numpy(array: mx.array) -> Array:
    """A float32 copy in host memory."""
    return np.array(array.astype(mx.float32), order="C")


def to_host(arrays: Arrays) -> dict[str, Array]:
    return {name: to_numpy(array) for name, array in arrays.items()}


def to_float(scalar: mx.array) -> float:
    """The value; waits for the device."""
    return cast(float, scalar.item())
