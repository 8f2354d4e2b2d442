"""Every engine, device and scan against what the official code computed: outputs, gradients, two steps."""

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
from arm_core.backend import Batch, EngineOptions
from arm_core.optimizer import OptimizerSettings, parameter_groups
from arm_core.reference.model import forward

SETS = ["pretrain_strong", "classifier_strong"]

TOLERANCE = {"outputs": 1e-5, "gradients": 1e-4, "gradient norms": 1e-4}
"""Of each tensor's largest value; of each norm."""

WIDER = {
    ("pretrain_strong", "layers.7"): 2e-5,
    ("pretrain_strong", "layers.9"): 2e-5,
    ("pretrain_strong", "layers.11"): 3e-5,
    ("pretrain_strong", "taps_to_decoder"): 5e-5,
    ("pretrain_strong", "encoder"): 5e-5,
}
"""Outputs of this set multiply rounding errors from block to block, so that the official float32 numbers
are themselves about a third of this away from float64; so is any other float32 computation."""

STORED = 2.4e-6
"""Rounding of stored weights, of each tensor's largest value: 20 bits, and 22 for those at the start."""

GRADIENT_NOISE = 2e-6
"""Rounding of a float32 gradient's elements, of the tensor's largest."""


def engines() -> Iterator[Any]:
    """Parameters (backend, device, scan): all that can run here, one device of each kind."""
    for backend in (arm_cuda.backend, arm_mlx.backend):
        if reason := backend.missing():
            yield pytest.param(backend, "", "", id=backend.name, marks=pytest.mark.skip(reason=reason))
            continue
        for device in {name.split(":")[0]: name for name in reversed(backend.devices())}.values():
            for scan, unusable in backend.scans(device).items():
                if unusable is None:
                    yield pytest.param(backend, device, scan, id=f"{backend.name}-{device}-{scan}")


every_engine = pytest.mark.parametrize(("backend", "device", "scan"), list(engines()))


@pytest.fixture(autouse=True, scope="module")
def _one_torch_thread() -> Iterator[None]:
    """Models this small run faster on one thread, and several times so on a busy machine."""
    if arm_cuda.backend.missing():
        yield
        return
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@cache
def computed(backend: Any, device: str, scan: str, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Outputs (with `loss`) and gradients of a set on an engine."""
    data = golden.load(name)
    options = EngineOptions(device=device, scan=scan)
    engine = backend.create_engine(data.spec, data.parameters, options=options)
    assert engine.scan == scan
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
    assert set(data.expected) - set(outputs) <= {"loss"}  # it has no loss of a classifier
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


def test_swapped_directions_would_be_noticed() -> None:
    data = golden.load("classifier_strong")
    swapped = {
        key: value[[1, 0, 2, 3]] if key.endswith((".A_log", ".mixer.D")) else value
        for key, value in data.parameters.items()
    }
    assert data.error("logits", forward(data.spec, swapped, data.images)["logits"]) > 0.1


def sampled(value: np.ndarray) -> np.ndarray:
    value = np.asarray(value, np.float64)
    return value.reshape(-1)[Sample.where(value.shape)]


def update_error(data: Steps, name: str, weight: np.ndarray, gradients: list[Any], scale: float) -> float:
    """How far a tensor's sampled weights are off, in units of what rounding of the gradients can do.

    An AdamW step has the size of the learning rate, in a direction given by the gradient, so an error e in
    a gradient g moves a weight by about lr * e / |g|, at most by 2 lr. Nothing is exempt: where a gradient
    is all noise (as for key biases, which softmax ignores) this bound itself lets the weight go either way.

    weight and gradients (of both steps) by official name.  scale: of the learning rate.
    """
    official = data.weights[name]
    relative = [np.abs(g[name]).max() / np.maximum(np.abs(sampled(g[name])), 1e-30) for g in gradients]
    noise = np.minimum(GRADIENT_NOISE * np.max(relative, axis=0), 2.0)
    bound = STORED * official.largest + sum(data.lr) * scale * noise
    return float(np.max(np.abs(sampled(weight) - official.values) / bound))


@every_engine
def test_two_optimizer_steps_match(backend: Any, device: str, scan: str) -> None:
    data = golden.steps()
    settings = OptimizerSettings(
        betas=data.betas,
        weight_decay=data.weight_decay,
        layer_decay=data.layer_decay,
        ema_decay=data.ema_decay,
    )
    options = EngineOptions(device=device, scan=scan)
    engine = backend.create_engine(data.spec, data.parameters, optimizer=settings, options=options)
    batch = Batch(images=data.images, targets=data.targets)

    gradients = []
    for i, lr in enumerate(data.lr):
        gradients.append(official_view(data.spec, engine.loss_and_gradients(batch)[1]))
        result = engine.train_step([batch], step=i + 1, lr=lr).result()
        assert result.loss == pytest.approx(data.losses[i], rel=1e-6)
        assert result.grad_norm == pytest.approx(data.grad_norms[i], rel=1e-5)

    state = engine.export_state()
    assert max(data.ema_errors(state.ema).values()) < TOLERANCE["outputs"]
    start, weights = (official_view(data.spec, p) for p in (data.parameters, state.parameters))
    scale = {name: group.lr_scale for group in parameter_groups(data.spec, settings) for name in group.names}
    scales = official_view(data.spec, {n: np.full_like(p, scale[n]) for n, p in data.parameters.items()})
    for name in data.weights:
        how = {"gradients": gradients, "scale": scales[name].flat[0]}
        assert update_error(data, name, weights[name], **how) <= 1.0, name
        # Five percent more learning rate would be noticed in every tensor.
        assert update_error(data, name, start[name] + 1.05 * (weights[name] - start[name]), **how) > 1.0, name
