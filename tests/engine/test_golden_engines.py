"""Every engine, device and scan against the results of the official code: outputs, gradients, two steps."""

from collections.abc import Iterator
from functools import cache
from typing import Any

import golden
import numpy as np
import pytest
from golden import Golden, Sample, Steps

import arm_cuda
import arm_mlx
from arm_convert.official import official_view
from arm_core.engine.optimizer import OptimizerSettings, parameter_groups
from arm_core.engine.protocol import Batch, EngineOptions, TrainingState
from arm_core.model.reference.model import forward

pytestmark = pytest.mark.usefixtures("one_torch_thread")

SETS = ["pretrain_strong", "classifier_strong"]

TOLERANCE = {"outputs": 1e-5, "gradients": 1e-4, "gradient norms": 1e-4}
"""Tolerances relative to each tensor's largest value and to each norm."""

WIDER = {
    ("pretrain_strong", "layers.7"): 2e-5,
    ("pretrain_strong", "layers.9"): 2e-5,
    ("pretrain_strong", "layers.11"): 3e-5,
    ("pretrain_strong", "taps_to_decoder"): 5e-5,
    ("pretrain_strong", "decoder_input"): 5e-5,
}
"""In this set, rounding errors grow from block to block. The official float32 numbers differ from float64 by
about a third of this tolerance, and so does any other float32 computation."""

STORED = 2.4e-6
"""Rounding of stored weights, relative to each tensor's largest value: 20 bits, 22 for initial weights."""

GRADIENT_NOISE = 1e-5
"""Rounding of a float32 gradient's elements, relative to the tensor's largest; observed: up to 6e-6."""


def engines() -> Iterator[Any]:
    """Parameters (backend, device, scan): all that can run here, with one device of each kind."""
    for backend in (arm_cuda.backend, arm_mlx.backend):
        if reason := backend.missing():
            yield pytest.param(backend, "", "", id=backend.name, marks=pytest.mark.skip(reason=reason))
            continue
        for device in {name.split(":")[0]: name for name in reversed(backend.devices())}.values():
            for scan, unusable in backend.scans(device).items():
                if unusable is None:
                    yield pytest.param(backend, device, scan, id=f"{backend.name}-{device}-{scan}")


every_engine = pytest.mark.parametrize(("backend", "device", "scan"), list(engines()))


@cache
def computed(backend: Any, device: str, scan: str, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Outputs (with `loss`) and gradients of a set on an engine."""
    data = golden.load(name)
    options = EngineOptions(device=device, scan=scan)
    engine = backend.create_engine(data.spec, TrainingState(parameters=data.parameters), options=options)
    assert engine.scan.split(" (")[0] == scan
    outputs = engine.forward(data.images, intermediates=True)
    loss, gradients = engine.loss_and_gradients(Batch(images=data.images, targets=data.targets))
    return {**outputs, "loss": np.float32(loss)}, gradients


@cache
def exact(name: str) -> dict[str, Any]:
    """The float64 reference's outputs."""
    data = golden.load(name)
    return forward(data.spec, data.parameters, data.images)


def beyond_tolerance(name: str, data: Golden, outputs: dict[str, Any]) -> dict[str, float]:
    errors = {key: data.error(key, outputs[key]) for key in data.expected if key in outputs}
    return {k: e for k, e in errors.items() if not e < WIDER.get((name, k), TOLERANCE["outputs"])}


@pytest.mark.parametrize("name", SETS)
def test_the_reference_reproduces_the_official_outputs(name: str) -> None:
    data, outputs = golden.load(name), exact(name)
    assert set(data.expected) - set(outputs) <= {"loss"}  # the reference has no classifier loss
    assert not beyond_tolerance(name, data, outputs)


def test_wider_tolerances_are_the_distance_of_the_official_numbers_from_float64() -> None:
    for (name, key), tolerance in WIDER.items():
        assert golden.load(name).error(key, exact(name)[key]) > tolerance / 4, key


@every_engine
@pytest.mark.parametrize("name", SETS)
def test_outputs_and_intermediate_tensors_match(name: str, backend: Any, device: str, scan: str) -> None:
    data = golden.load(name)
    outputs, _ = computed(backend, device, scan, name)
    assert set(data.expected) <= set(outputs)
    assert not beyond_tolerance(name, data, outputs)


@every_engine
@pytest.mark.parametrize("name", SETS)
def test_gradients_match(name: str, backend: Any, device: str, scan: str) -> None:
    data = golden.load(name)
    _, gradients = computed(backend, device, scan, name)
    for what, errors in (
        ("gradients", data.gradient_errors(gradients)),
        ("gradient norms", data.gradient_norm_errors(gradients)),
    ):
        assert errors
        assert not {key: error for key, error in errors.items() if not error < TOLERANCE[what]}


def test_swapped_directions_are_detected() -> None:
    data = golden.load("classifier_strong")
    swapped = {
        key: value[[1, 0, 2, 3]] if key.endswith((".A_log", ".mixer.D")) else value
        for key, value in data.parameters.items()
    }
    assert data.error("logits", forward(data.spec, swapped, data.images)["logits"]) > 0.1


def take_steps(
    data: Steps, backend: Any, device: str, scan: str, *, clip: float | None = None, stored: float = STORED
) -> None:
    """Repeat the official steps on an engine; loss, gradient norm, weights and EMA must agree.

    stored: rounding of the stored weights, relative to each tensor's largest value.
    """
    settings = OptimizerSettings(
        betas=data.betas,
        weight_decay=data.weight_decay,
        layer_decay=data.layer_decay,
        ema_decay=data.ema_decay,
        clip=clip,
    )
    options = EngineOptions(device=device, scan=scan)
    state = TrainingState(parameters=data.parameters)
    engine = backend.create_engine(data.spec, state, optimizer=settings, options=options)
    batch = Batch(images=data.images, targets=data.targets)

    gradients = []
    for i, lr in enumerate(data.lr):
        gradients.append(official_view(data.spec, engine.loss_and_gradients(batch)[1]))
        result = engine.train_step([batch], step=i + 1, lr=lr).result()
        assert result.loss == pytest.approx(data.losses[i], rel=1e-6)
        assert result.grad_norm == pytest.approx(data.grad_norms[i], rel=1e-5)

    state = engine.export_state()
    assert max(data.ema_errors(state.ema).values(), default=0.0) < TOLERANCE["outputs"]
    start, weights = (official_view(data.spec, p) for p in (data.parameters, state.parameters))
    scale = {name: group.lr_scale for group in parameter_groups(data.spec, settings) for name in group.names}
    scales = official_view(data.spec, {n: np.full_like(data.parameters[n], s) for n, s in scale.items()})
    for name, official in data.weights.items():
        bound = stored * official.largest
        bound = bound + sum(data.lr) * scales[name].flat[0] * update_noise([g[name] for g in gradients])
        ours, before = sampled(weights[name]), sampled(start[name])
        assert np.all(np.abs(ours - official.values) <= bound), name
        # A learning rate that is five percent larger would be detected in every tensor.
        assert np.any(np.abs(before + 1.05 * (ours - before) - official.values) > bound), name


def update_noise(gradients: list[np.ndarray]) -> np.ndarray:
    """Bound on the effect of gradient rounding on a tensor's sampled weights, in units of the learning rate.

    An AdamW step has the size of the learning rate and the direction of the gradient. An error e in a
    gradient g therefore moves a weight by about lr * e / |g|, at most by 2 lr. No tensor is exempt: if a
    gradient is only noise (as for key biases, which softmax ignores), the bound allows either direction.
    """
    relative = [np.abs(g).max() / np.maximum(np.abs(sampled(g)), 1e-30) for g in gradients]
    return np.minimum(GRADIENT_NOISE * np.max(relative, axis=0), 2.0)


def sampled(value: np.ndarray) -> np.ndarray:
    value = np.asarray(value, np.float64)
    return value.reshape(-1)[Sample.where(value.shape)]


@every_engine
def test_two_optimizer_steps_match(backend: Any, device: str, scan: str) -> None:
    take_steps(golden.steps(), backend, device, scan)
