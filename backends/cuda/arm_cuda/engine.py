"""The torch engine: one model behind the `arm_core.engine.protocol.Engine` protocol.

It runs on a CPU or one NVIDIA GPU, or on one of each of several processes (`arm_cuda.distributed`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from arm_core.engine.byte_images import ByteImages
from arm_core.engine.optimizer import OptimizerSettings, parameter_groups, required
from arm_core.engine.protocol import (
    Array,
    Batch,
    Compile,
    EngineOptions,
    Images,
    OutOfMemory,
    Precision,
    StepResult,
    StepStopped,
    TrainingState,
    check_towards,
)
from arm_core.engine.ranks import ALONE, Ranks
from arm_core.engine.scans import choose_scan
from arm_core.model.cost import step_memory
from arm_core.model.spec import ModelSpec
from arm_cuda.devices import (
    device_memory,
    device_name,
    keep_freed_memory,
    local_device,
    resolve_device,
    set_threads,
)
from arm_cuda.distributed import choose_placement, raising_peer_failures
from arm_cuda.execution import choose_compile, execute
from arm_cuda.images import prepare
from arm_cuda.model import build_model, soft_cross_entropy
from arm_cuda.scan import IMPLEMENTATIONS, scans
from arm_cuda.update import Group, sum_of_squares, update


@dataclass(frozen=True)
class PendingStep:
    """Loss and gradient norm; the device may still be computing them."""

    values: Tensor
    """(2,)"""
    ranks: Ranks

    def result(self) -> StepResult:
        with raising_peer_failures(self.ranks):
            loss, grad_norm = self.values.tolist()
        return StepResult(loss=loss, grad_norm=grad_norm)


class TorchEngine:
    """Runs `spec` with float32 master weights and, on request, bfloat16 products.

    With several ranks, every tensor below is this rank's part: the whole tensor or a shard.
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
        several = ranks.world > 1
        self._device = local_device(options.device) if several else resolve_device(options.device)
        self._settings, self._ranks = optimizer, ranks
        self._bfloat16 = options.precision is Precision.BFLOAT16
        scan = choose_scan(scans(str(self._device)), options.scan)
        self.scan = IMPLEMENTATIONS.label(scan, spec.encoder.conv_width)
        self.compile: Compile = choose_compile(options, scan, self._device)
        options = replace(options, compile=self.compile)
        if self._device.type == "cpu":
            set_threads(options.threads)
            keep_freed_memory()
        elif options.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS requires this setting
            torch.use_deterministic_algorithms(True)
        self.device = device_name(self._device)
        self._available = device_memory(self._device)
        self._memory = step_memory(
            spec,
            value_bytes=2 if self._bfloat16 else 4,
            average=optimizer is not None and optimizer.ema_decay is not None,
            recompute=options.recompute,
            shards=ranks.world if options.shard else 1,
        )
        self._model = build_model(spec, scan, self._device)
        self._placement = choose_placement(ranks, shard=options.shard)
        self._forward = self._placement.wrap(self._model, execute(self._model, options), self._device)
        # Sharding replaces the parameters.
        self._all = dict(self._model.named_parameters())
        self._trainable = {name: p for name, p in self._all.items() if p.requires_grad}
        with torch.no_grad():
            self._weights = {name: self._placement.local(p) for name, p in self._all.items()}
        self.load_state(state)

    def forward(self, images: Images, *, intermediates: bool = False) -> dict[str, Array]:
        seen: dict[str, Tensor] | None = {} if intermediates else None
        with self._computing(images, training=False), torch.no_grad(), self._autocast():
            outputs = self._model(self._put_images(images), None, seen)
            return {name: to_numpy(value) for name, value in {**(seen or {}), **outputs}.items()}

    def input_gradient(self, images: Array, output: str, towards: Array) -> Array:
        with self._computing(images, training=False), torch.enable_grad(), self._autocast():
            pixels = self._put(images).requires_grad_()
            seen: dict[str, Tensor] = {}
            outputs = self._model(pixels, None, seen) | seen
            check_towards(output, {name: tuple(value.shape) for name, value in outputs.items()}, towards)
            total = (outputs[output].float() * self._put(towards)).sum()
            return to_numpy(torch.autograd.grad(total, pixels)[0])

    def loss_and_gradients(self, batch: Batch) -> tuple[float, dict[str, Array]]:
        """See the protocol; with several ranks, the gradients are the mean over their batches."""
        loss = self._accumulate([batch], self._ranks.world)
        gradients = {
            name: to_numpy(self._placement.whole(self._placement.local(p.grad), p))
            for name, p in self._trainable.items()
            if p.grad is not None
        }
        self._forget_gradients()
        return loss.item() * self._ranks.world, gradients

    def train_step(
        self,
        batches: Sequence[Batch],
        *,
        step: int,
        lr: float,
        total_micro_batches: int | None = None,
        stop: Callable[[], bool] | None = None,
    ) -> PendingStep:
        settings = required(self._settings)
        with self._computing(batches[0].images, training=True):
            share = self._accumulate(batches, total_micro_batches or len(batches), stop)
            gradients = [
                [self._placement.local(p.grad) for p in group.owners if p.grad is not None]
                for group in self._groups
            ]
            squares = sum_of_squares([gradient for group in gradients for gradient in group])
            loss, squares = self._placement.totals(share, squares)
            norm = squares.sqrt()
            update(
                self._groups, self._weights, self._ema, gradients,
                loss=loss, norm=norm, step=step, lr=lr, settings=settings,
            )  # fmt: skip
            self._forget_gradients()
            return PendingStep(torch.stack([loss, norm]), self._ranks)

    @torch.no_grad()
    def swap_ema(self) -> None:
        for name, average in self._ema.items():
            before = self._weights[name].clone()
            self._weights[name].copy_(average)
            average.copy_(before)

    def export_state(self) -> TrainingState:
        return TrainingState(
            parameters=self._on_rank_0(self._weights),
            exp_avg=self._on_rank_0(self._exp_avg),
            exp_avg_sq=self._on_rank_0(self._exp_avg_sq),
            ema=self._on_rank_0(self._ema),
        )

    def _on_rank_0(self, parts: Mapping[str, Tensor]) -> dict[str, Array]:
        """Full tensors in host memory, one at a time; empty on the other ranks."""
        arrays: dict[str, Array] = {}
        with raising_peer_failures(self._ranks), torch.no_grad():
            for name, part in parts.items():
                whole = self._placement.whole(part, self._all[name])
                if self._ranks.rank == 0:
                    arrays[name] = to_numpy(whole)
        return arrays

    @torch.no_grad()
    def load_state(self, state: TrainingState) -> None:
        state.check(self.spec)
        for name, weight in self._weights.items():
            weight.copy_(self._part(name, state.parameters[name]))
        self._exp_avg: dict[str, Tensor] = {}
        self._exp_avg_sq: dict[str, Tensor] = {}
        self._ema: dict[str, Tensor] = {}
        self._groups: list[Group] = []
        if self._settings is None:
            return
        self._exp_avg = self._trainable_copies(state.exp_avg, torch.zeros_like)
        self._exp_avg_sq = self._trainable_copies(state.exp_avg_sq, torch.zeros_like)
        if self._settings.ema_decay is not None:
            self._ema = self._trainable_copies(state.ema, torch.clone)
        for group in parameter_groups(self.spec, self._settings):
            names = [name for name in group.names if self._weights[name].numel()]
            self._groups.append(
                Group(
                    group.lr_scale,
                    group.weight_decay,
                    [self._trainable[name] for name in names],
                    [self._weights[name] for name in names],
                    [self._exp_avg[name] for name in names],
                    [self._exp_avg_sq[name] for name in names],
                )
            )

    def _trainable_copies(
        self, arrays: Mapping[str, Array], initial: Callable[[Tensor], Tensor]
    ) -> dict[str, Tensor]:
        """Copies on the device, one per trainable parameter; without arrays, `initial` of its weight."""
        if not arrays:
            return {name: initial(self._weights[name]) for name in self._trainable}
        return {name: self._part(name, arrays[name]).clone() for name in self._trainable}

    def _part(self, name: str, array: Array) -> Tensor:
        """This rank's part of a whole parameter or moment, on the device; may share the array's memory."""
        return self._placement.part(self._put(array), self._all[name])

    def _put(self, array: Array) -> Tensor:
        return self._copy(np.asarray(array, np.float32))

    def _put_images(self, images: Images) -> Tensor:
        return prepare(images, self._copy) if isinstance(images, ByteImages) else self._put(images)

    def _copy(self, array: npt.NDArray[np.generic]) -> Tensor:
        """The array on the device; on a CPU it may share the array's memory."""
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        if self._device.type == "cuda":
            tensor = tensor.pin_memory()  # otherwise the copy waits for the device
        return tensor.to(self._device, non_blocking=True)

    def _autocast(self) -> AbstractContextManager[object]:
        return torch.autocast(self._device.type, torch.bfloat16, enabled=self._bfloat16)

    @contextmanager
    def _computing(self, images: Images, *, training: bool) -> Iterator[None]:
        """Context for the work on a batch: raises OutOfMemory and PeerFailed."""
        try:
            with raising_peer_failures(self._ranks):
                yield
        except torch.OutOfMemoryError as error:
            self._forget_gradients()
            fitting = self._memory.fitting(self._available) if training else None
            raise OutOfMemory(self.device, self._available, images.shape, fitting=fitting) from error

    def _accumulate(
        self, batches: Sequence[Batch], total: int, stop: Callable[[], bool] | None = None
    ) -> Tensor:
        """Compute gradients of the mean loss over the `total` micro-batches; returns this rank's share."""
        share = torch.zeros((), device=self._device)
        passes = self._placement.passes(len(batches), total)
        for i in range(passes):
            if i and stop is not None and stop():
                self._forget_gradients()
                raise StepStopped
            last = i == passes - 1
            # A rank with fewer micro-batches than others repeats one with weight 0.
            batch, weight = (batches[i], 1 / total) if i < len(batches) else (batches[-1], 0.0)
            with self._placement.accumulating(last):
                loss = self._loss(batch)
                # Gradients are averaged over the ranks, not added.
                (loss * (weight * self._ranks.world)).backward()
            share += loss.detach() * weight
        return share

    def _loss(self, batch: Batch) -> Tensor:
        scale = None if batch.drop_path_scale is None else self._put(batch.drop_path_scale)
        with self._autocast():
            outputs = self._forward(self._put_images(batch.images), scale)
        if "loss" in outputs:
            return outputs["loss"]
        if batch.targets is None:
            raise ValueError("a classifier trains on batches with targets (B, classes), found None")
        return soft_cross_entropy(outputs["logits"], self._put(batch.targets))

    def _forget_gradients(self) -> None:
        for parameter in self._trainable.values():
            parameter.grad = None


def to_numpy(tensor: Tensor) -> Array:
    """A float32 copy in host memory."""
    return tensor.detach().to("cpu", torch.float32, copy=True).contiguous().numpy()
