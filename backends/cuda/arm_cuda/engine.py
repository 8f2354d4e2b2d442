"""The torch engine: one model behind the `arm_core.engine.protocol.Engine` protocol.

It runs on a CPU or one NVIDIA GPU, or on one of each of several processes (`arm_cuda.distributed`).
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.optim.adamw import adamw

from arm_core import cpu_kernels
from arm_core.engine.optimizer import CLIP_EPS, OptimizerSettings, parameter_groups, required
from arm_core.engine.protocol import (
    Array,
    Batch,
    Compile,
    EngineOptions,
    OutOfMemory,
    Precision,
    StepResult,
    TrainingState,
    check_towards,
)
from arm_core.engine.ranks import ALONE, Ranks
from arm_core.engine.scans import choose_scan
from arm_core.model.cost import step_memory
from arm_core.model.spec import ModelSpec
from arm_cuda.distributed import local_device, peer_failures_named, place
from arm_cuda.execution import check_execution, execute
from arm_cuda.model import build_model, soft_cross_entropy
from arm_cuda.scan import IMPLEMENTATIONS, scans


def resolve_device(name: str) -> torch.device:
    """`auto` is the first GPU or else the CPU; a ValueError names what is there."""
    if name == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device: expected auto, cpu, cuda or cuda:N, found {name!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device: expected auto, cpu, cuda or cuda:N, found {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {name!r} is not there: torch sees {torch.cuda.device_count()} GPU(s)")
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device


def device_memory(device: torch.device) -> int:
    """Bytes of a GPU, or of the machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@dataclass(frozen=True)
class PendingStep:
    """Loss and gradient norm that may still be on their way from the device."""

    values: Tensor
    """(2,)"""
    ranks: Ranks

    def result(self) -> StepResult:
        with peer_failures_named(self.ranks):
            loss, grad_norm = self.values.tolist()
        return StepResult(loss=loss, grad_norm=grad_norm)


@dataclass(frozen=True)
class Group:
    """Tensors of one parameter group, side by side, as the fused update takes them."""

    lr_scale: float
    weight_decay: float
    owners: list[Tensor]
    """The parameters that hold the gradients."""
    parameters: list[Tensor]
    """This rank's parts of them; those without an element are left out."""
    exp_avg: list[Tensor]
    exp_avg_sq: list[Tensor]


class TorchEngine:
    """Runs `spec` with float32 master weights, and bfloat16 products on request.

    With several ranks every tensor below is this rank's part: all of it, or its shard.
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
        scan = choose_scan(scans(self._device.type), options.scan)
        self.scan = IMPLEMENTATIONS.label(scan, spec.encoder.conv_width)
        self.compile: Compile = Compile.NONE if options.compile is Compile.AUTO else options.compile
        options = replace(options, compile=self.compile)
        check_execution(options, scan, self._device)
        if self._device.type == "cpu":
            threads = options.threads or torch.get_num_threads()
            cpu_kernels.start_threads()  # resets torch's count, and the count decides the last bits of a sum
            torch.set_num_threads(threads)
            keep_freed_memory()
        on_gpu = self._device.type == "cuda"
        self.device = torch.cuda.get_device_name(self._device) if on_gpu else "CPU"
        self._available = device_memory(self._device)
        self._memory = step_memory(
            spec,
            value_bytes=2 if self._bfloat16 else 4,
            average=optimizer is not None and optimizer.ema_decay is not None,
            recompute=options.recompute,
            shards=ranks.world if options.shard else 1,
        )
        self._model = build_model(spec, scan, self._device)
        self._placement = place(ranks, shard=options.shard)
        self._forward = self._placement.wrap(self._model, execute(self._model, options), self._device)
        # Sharding puts other tensors in the place of the parameters.
        self._all = dict(self._model.named_parameters())
        self._trainable = {name: p for name, p in self._all.items() if p.requires_grad}
        with torch.no_grad():
            self._weights = {name: self._placement.local(p) for name, p in self._all.items()}
        self.load_state(state)

    def forward(self, images: Array, *, intermediates: bool = False) -> dict[str, Array]:
        seen: dict[str, Tensor] | None = {} if intermediates else None
        with self._computing(images, training=False), torch.no_grad(), self._autocast():
            outputs = self._model(self._put(images), None, seen)
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
        """As the protocol says; the gradients of several ranks are the mean over their batches."""
        loss = self._accumulate([batch], self._ranks.world)
        gradients = {
            name: to_numpy(self._placement.whole(self._placement.local(p.grad), p))
            for name, p in self._trainable.items()
            if p.grad is not None
        }
        self._forget_gradients()
        return loss.item() * self._ranks.world, gradients

    def train_step(
        self, batches: Sequence[Batch], *, step: int, lr: float, total_micro_batches: int | None = None
    ) -> PendingStep:
        settings = required(self._settings)
        with self._computing(batches[0].images, training=True):
            share = self._accumulate(batches, total_micro_batches or len(batches))
            squares = sum_of_squares([self._placement.local(g) for g in self._gradients()])
            loss, squares = self._placement.totals(share, squares)
            self._update(settings, loss, norm := squares.sqrt(), step, lr)
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
        """Whole tensors in host memory, one after the other; the other ranks only lend their parts."""
        arrays: dict[str, Array] = {}
        with peer_failures_named(self._ranks), torch.no_grad():
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
        tensor = torch.from_numpy(np.ascontiguousarray(array, np.float32))
        if self._device.type == "cuda":
            tensor = tensor.pin_memory()  # else the copy waits for the device
        return tensor.to(self._device, non_blocking=True)

    def _autocast(self) -> AbstractContextManager[object]:
        return torch.autocast(self._device.type, torch.bfloat16, enabled=self._bfloat16)

    @contextmanager
    def _computing(self, images: Array, *, training: bool) -> Iterator[None]:
        """Around work on a batch: an exhausted device and lost peers are reported as such."""
        try:
            with peer_failures_named(self._ranks):
                yield
        except torch.OutOfMemoryError as error:
            self._forget_gradients()
            fitting = self._memory.fitting(self._available) if training else None
            raise OutOfMemory(self.device, self._available, images.shape, fitting=fitting) from error

    def _accumulate(self, batches: Sequence[Batch], of: int) -> Tensor:
        """Gradients of the mean loss over all ranks' `of` micro-batches; returns this rank's share of it."""
        share = torch.zeros((), device=self._device)
        passes = self._placement.passes(len(batches), of)
        for i in range(passes):
            last = i == passes - 1
            # A rank with fewer micro-batches than others repeats one for nothing.
            batch, weight = (batches[i], 1 / of) if i < len(batches) else (batches[-1], 0.0)
            with self._placement.accumulating(last):
                loss = self._loss(batch)
                # Gradients are averaged over the ranks, not added.
                (loss * (weight * self._ranks.world)).backward()
            share += loss.detach() * weight
        return share

    def _loss(self, batch: Batch) -> Tensor:
        scale = None if batch.drop_path_scale is None else self._put(batch.drop_path_scale)
        with self._autocast():
            outputs = self._forward(self._put(batch.images), scale)
        if "loss" in outputs:
            return outputs["loss"]
        if batch.targets is None:
            raise ValueError("a classifier trains on batches with targets (B, classes), found None")
        return soft_cross_entropy(outputs["logits"], self._put(batch.targets))

    def _gradients(self) -> list[Tensor]:
        return [p.grad for group in self._groups for p in group.owners if p.grad is not None]

    def _forget_gradients(self) -> None:
        for parameter in self._trainable.values():
            parameter.grad = None

    @torch.no_grad()
    def _update(self, settings: OptimizerSettings, loss: Tensor, norm: Tensor, step: int, lr: float) -> None:
        """AdamW, clipping and EMA in one pass each, without waiting for the device.

        The fused update divides gradients by `grad_scale` and does nothing where `found_inf` is 1.
        """
        found_inf = (~torch.isfinite(loss + norm)).float()
        scale = torch.ones_like(norm)
        if settings.clip is not None:
            scale = torch.clamp((norm + CLIP_EPS) / settings.clip, min=1.0)
        for group in self._groups:
            if not group.parameters:
                continue
            gradients = [self._placement.local(p.grad) for p in group.owners if p.grad is not None]
            # The update counts the step itself, hence step - 1.
            steps = torch.full((len(gradients),), step - 1.0, device=self._device).unbind()
            adamw(
                group.parameters,
                gradients,
                group.exp_avg,
                group.exp_avg_sq,
                [],
                list(steps),
                fused=True,
                grad_scale=scale,
                found_inf=found_inf,
                amsgrad=False,
                beta1=settings.betas[0],
                beta2=settings.betas[1],
                lr=lr * group.lr_scale,
                weight_decay=group.weight_decay,
                eps=settings.eps,
                maximize=False,
            )
        if settings.ema_decay is not None:
            ema = list(self._ema.values())
            change = torch._foreach_sub([self._weights[name] for name in self._ema], ema)
            torch._foreach_mul_(change, (1.0 - settings.ema_decay) * (1.0 - found_inf))
            torch._foreach_add_(ema, change)


def sum_of_squares(gradients: Sequence[Tensor]) -> Tensor:
    """Over all elements; on a CPU by dot products, which are threaded and lose fewer digits."""
    if gradients[0].device.type != "cpu":
        return torch.stack(torch._foreach_norm(list(gradients))).square().sum()
    flat = [gradient.reshape(-1) for gradient in gradients]
    return torch.stack([torch.dot(g, g) for g in flat]).sum()


def keep_freed_memory() -> None:
    """Let the process keep what it frees for the next step, where the C library is glibc.

    Every step frees and allocates gradients and activations. By default glibc hands them back to the
    system, and getting them again costs a fault per page: a tenth of a base model's step.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        m_trim_threshold, m_mmap_threshold = -1, -3  # malloc.h
        libc.mallopt(m_trim_threshold, -1)  # never
        libc.mallopt(m_mmap_threshold, 1 << 30)  # bytes; larger blocks are returned


def to_numpy(tensor: Tensor) -> Array:
    """A float32 copy in host memory."""
    return tensor.detach().to("cpu", torch.float32, copy=True).contiguous().numpy()
