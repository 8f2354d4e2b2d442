"""Parity reports: compare the results of two backends, or of two models, on a fixed batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from typing import Any

import numpy as np
import numpy.typing as npt

from arm_convert.describe import differing_fields
from arm_core.engine.protocol import Array, Backend, Batch, EngineOptions, TrainingState
from arm_core.engine.registry import choose_backend, installed_backends
from arm_core.model.cost import PATTERNS
from arm_core.model.reference.model import forward
from arm_core.model.rng import KeyedRng
from arm_core.model.spec import ClassifierSpec, ModelSpec, kind_of

Floats = npt.NDArray[np.floating[Any]]

REFERENCE = "reference"
"""The float64 NumPy model: outputs and loss, no gradients."""

TOLERANCES = {"outputs": 1e-4, "loss": 1e-5, "gradients": 1e-3}
"""Largest difference relative to the tensor's largest value, float32 against float32 or float64."""

FAINT = 1e-3
"""Differences are relative to at least this part of the largest value in the tensor's group: small
gradients consist mostly of rounding errors."""

OUTPUTS = {
    "pretrain": ("decoder_input", "prediction", "loss_per_token"),
    "classifier": ("features", "logits"),
}


@dataclass(frozen=True)
class Computed:
    """The outputs, loss and gradients of one backend."""

    name: str
    how: str
    outputs: Mapping[str, Floats]
    loss: float
    gradients: Mapping[str, Floats] | None
    """None if the backend computes none."""


@dataclass(frozen=True)
class Line:
    """One comparison."""

    quantity: str
    first: str
    second: str
    absolute: float
    """Largest absolute difference."""
    relative: float
    """The same, relative to the largest value of the first; the worst tensor of a group."""
    tolerance: float
    within: bool


@dataclass(frozen=True)
class ParityReport:
    """All comparisons of one call."""

    kind: str
    batch: int
    seed: int
    ran: dict[str, str]
    """Version, device and scan by backend or model."""
    lines: list[Line]

    @property
    def holds(self) -> bool:
        return all(line.within for line in self.lines)

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "holds": self.holds}


def fixed_batch(spec: ModelSpec, size: int, seed: int) -> Batch:
    """Standard normal images, and classes for a classifier; the same on every machine."""
    height, width = spec.image_size
    shape = (size, height, width, spec.encoder.channels)
    rng = KeyedRng(seed, "verify")
    images = rng.normal(int(np.prod(shape))).reshape(shape).astype(np.float32)
    if not isinstance(spec, ClassifierSpec):
        return Batch(images=images)
    labels = (rng.uniform(size) * spec.classes).astype(int)
    return Batch(images=images, targets=np.eye(spec.classes, dtype=np.float32)[labels])


def usable_backends() -> list[str]:
    """The reference and all backends that can run on this machine."""
    return [REFERENCE, *(name for name, found in installed_backends().items() if found.missing() is None)]


def compute(
    name: str,
    backend: str,
    spec: ModelSpec,
    parameters: Mapping[str, Array],
    batch: Batch,
    *,
    device: str = "auto",
    gradients: bool = True,
) -> Computed:
    """Run the batch through one backend, or through the reference."""
    if backend == REFERENCE:
        outputs = dict(forward(spec, parameters, np.asarray(batch.images)))
        return Computed(name, "NumPy, float64", outputs, _loss(outputs, batch), None)
    found: Backend = choose_backend(backend)
    state = TrainingState(parameters=parameters)
    engine = found.create_engine(spec, state, options=EngineOptions(device=device))
    results: dict[str, Floats] = dict(engine.forward(batch.images))
    how = f"{found.version()}, {engine.device}, scan {engine.scan}"
    if not gradients:
        return Computed(name, how, results, _loss(results, batch), None)
    loss, grads = engine.loss_and_gradients(batch)
    return Computed(name, how, results, float(loss), dict(grads))


def _loss(outputs: Mapping[str, Floats], batch: Batch) -> float:
    """The model's own loss, or the cross-entropy of its logits."""
    if batch.targets is None:
        return float(outputs["loss"])
    logits = outputs["logits"].astype(np.float64)
    shifted = logits - logits.max(1, keepdims=True)
    log_probability = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    return float(-(batch.targets * log_probability).sum(1).mean())


def compare(first: Computed, second: Computed, *, scale: float = 1.0) -> list[Line]:
    """Differences of outputs, loss, and gradients by part of the model; `scale` widens the tolerances."""

    def line(quantity: str, kind: str, a: Sequence[Any], b: Sequence[Any]) -> Line:
        pairs = [(np.asarray(x, np.float64), np.asarray(y, np.float64)) for x, y in zip(a, b, strict=True)]
        # np.max, unlike max, propagates NaN, which is never within the tolerance.
        absolute = np.array([np.abs(x - y).max() for x, y in pairs])
        largest = np.array([np.abs(x).max() for x, _ in pairs])
        floor = np.maximum(largest, FAINT * largest.max())
        relative = np.max(np.divide(absolute, floor, out=absolute.copy(), where=floor > 0))
        tolerance = TOLERANCES[kind] * scale
        within = bool(relative <= tolerance)
        return Line(
            quantity, first.name, second.name, float(absolute.max()), float(relative), tolerance, within
        )

    kind = "classifier" if "logits" in first.outputs else "pretrain"
    lines = [line(key, "outputs", [first.outputs[key]], [second.outputs[key]]) for key in OUTPUTS[kind]]
    lines.append(line("loss", "loss", [first.loss], [second.loss]))
    if first.gradients is not None and second.gradients is not None:
        for part, patterns in PATTERNS.items():
            names = [n for n in first.gradients if any(fnmatch(n, pattern) for pattern in patterns)]
            if names:
                a, b = ([grads[n] for n in names] for grads in (first.gradients, second.gradients))
                lines.append(line(f"gradients: {part}", "gradients", a, b))
    return lines


def verify(
    models: Sequence[tuple[str, ModelSpec, Mapping[str, Array]]],
    backends: Sequence[str],
    *,
    batch_size: int = 2,
    seed: int = 0,
    device: str = "auto",
    gradients: bool = True,
    scale: float = 1.0,
) -> ParityReport:
    """One model through several backends, or two models through each backend.

    models: (label, spec, parameters), one or two of them.  scale: factor on `TOLERANCES`.
    Raises ValueError if there is nothing to compare or the two models have different specifications.
    """
    (label, spec, _), others = models[0], models[1:]
    backends = list(dict.fromkeys(backends))
    if not others and len(backends) < 2:
        raise ValueError(
            f"nothing to compare: one model and only the backend {', '.join(backends) or 'none'}; "
            "pass a second model, or two backends with --backends"
        )
    if others and (different := differing_fields(spec, others[0][1])):
        raise ValueError(f"{label} and {others[0][0]} are different models: {different}")
    batch = fixed_batch(spec, batch_size, seed)
    lines: list[Line] = []
    ran: dict[str, str] = {}
    previous: list[Computed] = []
    for backend in backends:
        named = [(backend if not others else f"{backend}: {name}", own) for name, _, own in models]
        done = [
            compute(name, backend, spec, own, batch, device=device, gradients=gradients)
            for name, own in named
        ]
        ran |= {computed.name: computed.how for computed in done}
        if others:
            lines += compare(done[0], done[1], scale=scale)
        else:
            for earlier in previous:
                lines += compare(earlier, done[0], scale=scale)
            previous += done
    return ParityReport(kind_of(spec), batch_size, seed, ran, lines)
