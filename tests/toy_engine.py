"""A very small engine in NumPy, for tests of the training loop: exact AdamW on a linear model.

It holds every parameter of the table, as a real engine does, but reads few of them: patches are
embedded and averaged, and a head predicts the class (or, in pretraining, the features reproduce
the mean of the image). The others only change by weight decay.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from arm_core.engine.optimizer import CLIP_EPS, OptimizerSettings, parameter_groups
from arm_core.engine.protocol import Array, Batch, Compile, Images, StepResult, StepStopped, TrainingState
from arm_core.model.parameters import initial_parameters, parameter_table
from arm_core.model.spec import ClassifierSpec, ModelSpec
from arm_core.training.run_folder import RunFolder


@dataclass
class ToyStep:
    """A finished step whose result is returned on request; `asked` records the requests."""

    step: int
    outcome: StepResult
    asked: list[int]

    def result(self) -> StepResult:
        self.asked.append(self.step)
        return self.outcome


@dataclass
class ToyEngine:
    spec: ModelSpec
    state: TrainingState
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    poisoned_steps: frozenset[int] = frozenset()
    """Steps whose gradient of the embedding is made NaN."""
    device: str = "NumPy"
    scan: str = "none"
    compile: Compile = Compile.NONE

    def __post_init__(self) -> None:
        self.asked: list[int] = []
        self.steps: list[tuple[int, float]] = []
        self.trainable = [name for name, row in parameter_table(self.spec).items() if row.trainable]
        self._poison = False
        self.load_state(self.state)

    def forward(self, images: Images, *, intermediates: bool = False) -> dict[str, Array]:
        images = np.asarray(images)
        features = self._features(images)
        seen = {"tokens": features} if intermediates else {}
        if isinstance(self.spec, ClassifierSpec):
            logits = features @ self.parameters["head.weight"].T + self.parameters["head.bias"]
            return {**seen, "features": features, "logits": logits}
        return {**seen, "loss": np.float32(np.mean((features - _brightness(images)) ** 2))}

    def loss_and_gradients(self, batch: Batch) -> tuple[float, dict[str, Array]]:
        scale = np.ones(len(batch.images), np.float32)
        if batch.drop_path_scale is not None:
            assert batch.drop_path_scale.shape == (self.spec.encoder.depth, 2, len(batch.images))
            scale = batch.drop_path_scale.mean((0, 1))
        images = np.asarray(batch.images)
        patches = _mean_patch(images, self.spec.encoder.patch)  # (B, values)
        features = self._features(images) * scale[:, None]
        grads = {name: np.zeros_like(self.parameters[name]) for name in self.trainable}
        if isinstance(self.spec, ClassifierSpec):
            assert batch.targets is not None
            logits = features @ self.parameters["head.weight"].T + self.parameters["head.bias"]
            shifted = logits - logits.max(-1, keepdims=True)
            log_p = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
            loss = float(-(batch.targets * log_p).sum(-1).mean())
            d_logits = (np.exp(log_p) - batch.targets) / len(features)
            grads["head.weight"] = d_logits.T @ features
            grads["head.bias"] = d_logits.sum(0)
            d_features = d_logits @ self.parameters["head.weight"]
        else:
            error = features - _brightness(images)
            loss = float(np.mean(error**2))
            d_features = 2 * error / error.size
        d_features = d_features * scale[:, None]
        grads["patch_embed.weight"] = d_features.T @ patches
        grads["patch_embed.bias"] = d_features.sum(0)
        if self._poison:
            grads["patch_embed.weight"] = np.full_like(grads["patch_embed.weight"], np.nan)
        return loss, {name: g.astype(np.float32) for name, g in grads.items()}

    def train_step(
        self,
        batches: Sequence[Batch],
        *,
        step: int,
        lr: float,
        total_micro_batches: int | None = None,
        stop: Callable[[], bool] | None = None,
    ) -> ToyStep:
        self._poison = step in self.poisoned_steps
        found = []
        for batch in batches:
            if found and stop is not None and stop():
                raise StepStopped
            found.append(self.loss_and_gradients(batch))
        loss = float(np.mean([loss for loss, _ in found]))
        grads = {n: np.mean([g[n] for _, g in found], 0, dtype=np.float32) for n in self.trainable}
        norm = float(np.sqrt(sum(float(np.sum(g.astype(np.float64) ** 2)) for g in grads.values())))
        result = StepResult(loss=loss, grad_norm=norm)
        if result.finite:
            self._update(grads, norm, step, lr)
        self.steps.append((step, lr))
        return ToyStep(step, result, self.asked)

    def _update(self, grads: Mapping[str, Array], norm: float, step: int, lr: float) -> None:
        settings, (b1, b2) = self.optimizer, self.optimizer.betas
        clip = 1.0 if settings.clip is None else min(1.0, settings.clip / (norm + CLIP_EPS))
        for group in parameter_groups(self.spec, settings):
            rate = lr * group.lr_scale
            for name in group.names:
                g = grads[name] * np.float32(clip)
                m = self.exp_avg[name] = (b1 * self.exp_avg[name] + (1 - b1) * g).astype(np.float32)
                v = self.exp_avg_sq[name] = (b2 * self.exp_avg_sq[name] + (1 - b2) * g * g).astype(np.float32)
                p = self.parameters[name] * (1 - rate * group.weight_decay)
                p = p - rate / (1 - b1**step) * m / (np.sqrt(v / (1 - b2**step)) + settings.eps)
                self.parameters[name] = p.astype(np.float32)
                if settings.ema_decay is not None:
                    e = self.ema[name]
                    self.ema[name] = (e + (1 - settings.ema_decay) * (p - e)).astype(np.float32)

    def swap_ema(self) -> None:
        for name, average in self.ema.items():
            self.ema[name], self.parameters[name] = self.parameters[name], average

    def export_state(self) -> TrainingState:
        kinds = ("parameters", "exp_avg", "exp_avg_sq", "ema")
        return TrainingState(**{k: {n: a.copy() for n, a in getattr(self, k).items()} for k in kinds})

    def load_state(self, state: TrainingState) -> None:
        state.check(self.spec)
        self.parameters: dict[str, Array] = {name: a.copy() for name, a in state.parameters.items()}
        zeros = {name: np.zeros_like(self.parameters[name]) for name in self.trainable}
        self.exp_avg = {n: a.copy() for n, a in (state.exp_avg or zeros).items()}
        self.exp_avg_sq = {n: a.copy() for n, a in (state.exp_avg_sq or zeros).items()}
        self.ema: dict[str, Array] = {}
        if self.optimizer.ema_decay is not None:
            start = {name: self.parameters[name] for name in self.trainable}
            self.ema = {n: a.copy() for n, a in (state.ema or start).items()}

    def _features(self, images: Array) -> Array:
        patches = _mean_patch(images, self.spec.encoder.patch)
        return patches @ self.parameters["patch_embed.weight"].T + self.parameters["patch_embed.bias"]


def fresh_state(spec: ModelSpec, seed: int = 0) -> TrainingState:
    return TrainingState(parameters=initial_parameters(spec, seed))


def state_of(run: RunFolder) -> TrainingState:
    """The state that an open run trains from: its checkpoint's, or initial parameters in a new run."""
    return run.resumed.state if run.resumed else fresh_state(run.spec)


def _mean_patch(images: Array, patch: int) -> Array:
    """(B, H, W, 3) to the average patch, (B, patch * patch * 3)."""
    batch, height, width, channels = images.shape
    tiles = images.reshape(batch, height // patch, patch, width // patch, patch, channels)
    return tiles.mean((1, 3)).reshape(batch, -1)


def _brightness(images: Array) -> Array:
    return images.mean((1, 2, 3))[:, None]
