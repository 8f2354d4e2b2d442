"""The torch engine: one model on one device, behind the `arm_core.backend.Engine` protocol."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.optim.adamw import adamw

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
from arm_core.spec import ModelSpec
from arm_cuda.model import build_model, soft_cross_entropy
from arm_cuda.scan import scans


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


@dataclass(frozen=True)
class PendingStep:
    """Loss and gradient norm that may still be on their way from the device."""

    loss: Tensor
    grad_norm: Tensor

    def result(self) -> StepResult:
        return StepResult(loss=self.loss.item(), grad_norm=self.grad_norm.item())


@dataclass(frozen=True)
class Group:
    """Tensors of one parameter group, side by side, as the fused update takes them."""

    lr_scale: float
    weight_decay: float
    parameters: list[Tensor]
    exp_avg: list[Tensor]
    exp_avg_sq: list[Tensor]


class TorchEngine:
    """Runs `spec` on a CPU or one NVIDIA GPU. float32 master weights, bfloat16 products on request."""

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
        self._bfloat16 = options.precision is Precision.BFLOAT16
        self.scan = choose_scan(scans(self._device.type), options.scan)
        if self._device.type == "cpu":
            threads = options.threads or torch.get_num_threads()
            cpu_scan.start_threads()  # resets torch's count, and the count decides the last bits of a sum
            torch.set_num_threads(threads)
            keep_freed_memory()
        on_gpu = self._device.type == "cuda"
        self.device = torch.cuda.get_device_name(self._device) if on_gpu else "CPU"
        self._model = build_model(spec, self.scan, self._device)
        self._all = dict(self._model.named_parameters())
        self._trainable = {name: p for name, p in self._all.items() if p.requires_grad}
        self.load_state(TrainingState(parameters=dict(parameters)))

    def forward(self, images: Array, *, intermediates: bool = False) -> dict[str, Array]:
        seen: dict[str, Tensor] | None = {} if intermediates else None
        with torch.inference_mode(), self._autocast():
            outputs = self._model(self._put(images), seen=seen)
        return {name: to_numpy(value) for name, value in {**(seen or {}), **outputs}.items()}

    def loss_and_gradients(self, batch: Batch) -> tuple[float, dict[str, Array]]:
        loss = self._accumulate([batch], 1)
        gradients = {name: to_numpy(p.grad) for name, p in self._trainable.items() if p.grad is not None}
        self._model.zero_grad()
        return loss.item(), gradients

    def train_step(
        self, batches: Sequence[Batch], *, step: int, lr: float, of: int | None = None
    ) -> PendingStep:
        loss = self._accumulate(batches, of or len(batches))
        gradients = [p.grad for p in self._trainable.values() if p.grad is not None]
        norm = gradient_norm(gradients)
        self._update(loss, norm, step, lr)
        self._model.zero_grad()
        return PendingStep(loss, norm)

    @torch.no_grad()
    def exchange_average(self) -> None:
        for name, average in self._ema.items():
            weight = self._trainable[name]
            before = weight.clone()
            weight.copy_(average)
            average.copy_(before)

    def export_state(self) -> TrainingState:
        return TrainingState(
            parameters={name: to_numpy(p) for name, p in self._all.items()},
            exp_avg={name: to_numpy(m) for name, m in self._exp_avg.items()},
            exp_avg_sq={name: to_numpy(v) for name, v in self._exp_avg_sq.items()},
            ema={name: to_numpy(e) for name, e in self._ema.items()},
        )

    def load_state(self, state: TrainingState) -> None:
        check_parameters(self.spec, state.parameters)
        with torch.no_grad():
            for name, p in self._all.items():
                p.copy_(torch.from_numpy(np.asarray(state.parameters[name], np.float32)))
        self._exp_avg = self._like_trainable(state.exp_avg, "exp_avg")
        self._exp_avg_sq = self._like_trainable(state.exp_avg_sq, "exp_avg_sq")
        self._ema: dict[str, Tensor] = {}
        if self._settings.ema_decay is not None:
            start = {name: to_numpy(p) for name, p in self._trainable.items()}
            self._ema = self._like_trainable(state.ema or start, "ema")
        self._groups = [
            Group(
                group.lr_scale,
                group.weight_decay,
                [self._trainable[name] for name in group.names],
                [self._exp_avg[name] for name in group.names],
                [self._exp_avg_sq[name] for name in group.names],
            )
            for group in parameter_groups(self.spec, self._settings)
        ]

    def _like_trainable(self, arrays: Mapping[str, Array], what: str) -> dict[str, Tensor]:
        """Device copies of arrays, one per trainable parameter; zeros where there are none at all."""
        if not arrays:
            return {name: torch.zeros_like(p, requires_grad=False) for name, p in self._trainable.items()}
        if difference := sorted(set(arrays) ^ set(self._trainable)):
            raise ValueError(
                f"{what}: expected the trainable parameters, differs in {', '.join(difference[:5])}"
            )
        return {name: self._put(arrays[name], copy=True) for name in self._trainable}

    def _put(self, array: Array, *, copy: bool = False) -> Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(array, np.float32))
        return tensor.to(self._device, non_blocking=True, copy=copy)

    def _autocast(self) -> AbstractContextManager[object]:
        return torch.autocast(self._device.type, torch.bfloat16, enabled=self._bfloat16)

    def _accumulate(self, batches: Sequence[Batch], of: int) -> Tensor:
        """Gradients of their part of the mean loss over `of` micro-batches; returns that part."""
        total = torch.zeros((), device=self._device)
        for batch in batches:
            scale = None if batch.branch_scale is None else self._put(batch.branch_scale)
            with self._autocast():
                outputs = self._model(self._put(batch.images), scale)
            loss = outputs.get("loss")
            if loss is None:
                if batch.targets is None:
                    raise ValueError("a classifier trains on batches with targets (B, classes), found None")
                loss = soft_cross_entropy(outputs["logits"], self._put(batch.targets))
            (loss / of).backward()
            total += loss.detach() / of
        return total

    @torch.no_grad()
    def _update(self, loss: Tensor, norm: Tensor, step: int, lr: float) -> None:
        """AdamW, clipping and EMA in one pass each, without waiting for the device.

        The fused update divides gradients by `grad_scale` and does nothing where `found_inf` is 1.
        """
        settings = self._settings
        found_inf = (~torch.isfinite(loss + norm)).float()
        scale = torch.ones_like(norm)
        if settings.clip is not None:
            scale = torch.clamp((norm + CLIP_EPS) / settings.clip, min=1.0)
        for group in self._groups:
            # The update counts the step itself, hence step - 1.
            steps = [torch.tensor(step - 1.0, device=self._device) for _ in group.parameters]
            adamw(
                group.parameters,
                [p.grad for p in group.parameters],  # type: ignore[misc]
                group.exp_avg,
                group.exp_avg_sq,
                [],
                steps,
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
            values: list[Tensor] = list(self._trainable.values())
            change = torch._foreach_sub(values, ema)
            torch._foreach_mul_(change, (1.0 - settings.ema_decay) * (1.0 - found_inf))
            torch._foreach_add_(ema, change)


def gradient_norm(gradients: Sequence[Tensor]) -> Tensor:
    """L2 norm over all gradients; on a CPU by dot products, which are threaded and lose fewer digits."""
    if gradients[0].device.type != "cpu":
        return torch.nn.utils.get_total_norm(gradients)
    flat = [gradient.reshape(-1) for gradient in gradients]
    return torch.stack([torch.dot(g, g) for g in flat]).sum().sqrt()


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
