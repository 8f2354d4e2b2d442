"""The same run on both engines: losses, weights, moments and EMA; and a run that changes the engine."""

from typing import Any

import numpy as np
import pytest

import arm_cuda
import arm_mlx
from arm_core.engine.optimizer import OptimizerSettings
from arm_core.engine.protocol import Batch, EngineOptions, Precision, TrainingState
from arm_core.model.drop_path import drop_path_scale
from arm_core.model.parameters import initial_parameters
from arm_core.model.spec import ModelSpec, PretrainSpec

MISSING = [reason for backend in (arm_cuda.backend, arm_mlx.backend) if (reason := backend.missing())]
pytestmark = [
    pytest.mark.skipif(bool(MISSING), reason="; ".join(MISSING)),
    pytest.mark.usefixtures("one_torch_thread"),
]

STEPS, MICRO_BATCHES, IMAGES = 5, 2, 4
LR = (2e-4, 4e-4, 1e-3, 9e-4, 6e-4)
LOSS, WEIGHTS = 1e-4, 1e-3
"""Tolerances relative to the loss and to each tensor's largest value."""

PRETRAINING = OptimizerSettings(clip=0.2, ema_decay=0.9)
FINETUNING = OptimizerSettings(betas=(0.9, 0.999), layer_decay=0.65, clip=0.2, ema_decay=0.9)
"""Gradient norms here are 0.4 and more, so that every step is clipped."""


@pytest.fixture(params=["pretraining", "finetuning"])
def spec(request: pytest.FixtureRequest) -> ModelSpec:
    name = "pretrain_spec" if request.param == "pretraining" else "classifier_spec"
    return request.getfixturevalue(name)


def engine(backend: Any, spec: ModelSpec, *, seed: int = 7, **options: Any) -> Any:
    settings = PRETRAINING if isinstance(spec, PretrainSpec) else FINETUNING
    state = TrainingState(parameters=initial_parameters(spec, seed))
    return backend.create_engine(spec, state, optimizer=settings, options=EngineOptions(**options))


def batches(spec: ModelSpec, step: int) -> list[Batch]:
    """Micro-batches of a step: noisy gradients of brightness, mixed labels, dropped branches."""
    height, width = spec.image_size
    found = []
    for i in range(MICRO_BATCHES):
        position = step * MICRO_BATCHES + i
        rng = np.random.default_rng(position)
        ramp = np.linspace(-1, 1, width) * rng.standard_normal((IMAGES, 1, 1))
        images = ramp[..., None] + 0.5 * rng.standard_normal((IMAGES, height, width, 3))
        targets = None
        if not isinstance(spec, PretrainSpec):
            targets = rng.dirichlet(np.ones(spec.classes), IMAGES).astype(np.float32)
        scale = drop_path_scale(0.3, spec.encoder.depth, IMAGES, seed=1, position=position)
        found.append(Batch(images=images.astype(np.float32), targets=targets, drop_path_scale=scale))
    return found


def train(engine: Any, steps: range) -> list[float]:
    return [
        engine.train_step(batches(engine.spec, step), step=step + 1, lr=LR[step]).result().loss
        for step in steps
    ]


def without_key_biases(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """All tensors except the key half of the attention's biases.

    A bias on the keys adds one number to all scores of a query, which softmax ignores. Its gradient is 0
    except for rounding errors, and Adam turns these into noise of the size of the learning rate.
    """
    found = dict(arrays)
    for name in [name for name in found if name.endswith("attention.key_value.bias")]:
        found[name] = np.split(found[name], 2)[1]
    return found


def assert_same(found: TrainingState, expected: TrainingState, tolerance: float) -> None:
    for what in ("parameters", "exp_avg", "exp_avg_sq", "ema"):
        a, b = (without_key_biases(getattr(state, what)) for state in (found, expected))
        assert set(a) == set(b)
        errors = {name: np.abs(a[name] - b[name]).max() / np.abs(b[name]).max() for name in b}
        assert not {name: e for name, e in errors.items() if not e < tolerance}, what


def test_both_engines_start_from_identical_bits(spec: ModelSpec) -> None:
    expected = initial_parameters(spec, 7)
    for backend in (arm_cuda.backend, arm_mlx.backend):
        found = engine(backend, spec).export_state().parameters
        assert set(found) == set(expected)
        for name, value in expected.items():
            np.testing.assert_array_equal(found[name], value, err_msg=name)


def test_five_steps_are_the_same_run_on_both_engines(spec: ModelSpec) -> None:
    """With drop path, layer decay, clipping, EMA, soft targets, and two micro-batches per step."""
    runs = []
    for backend in (arm_cuda.backend, arm_mlx.backend):
        e = engine(backend, spec)
        runs.append((train(e, range(STEPS)), e.export_state()))
    (losses, state), (other_losses, other_state) = runs
    assert np.ptp(losses) > 10 * LOSS  # the weights have changed
    np.testing.assert_allclose(other_losses, losses, rtol=LOSS)
    assert_same(other_state, state, WEIGHTS)


@pytest.mark.parametrize(
    ("first", "second"),
    [(arm_cuda.backend, arm_mlx.backend), (arm_mlx.backend, arm_cuda.backend)],
    ids=["torch to mlx", "mlx to torch"],
)
def test_a_run_can_be_resumed_on_the_other_engine(first: Any, second: Any, spec: ModelSpec) -> None:
    whole = engine(first, spec)
    losses = train(whole, range(STEPS))

    start = engine(first, spec)
    train(start, range(2))
    rest = engine(second, spec, seed=8)
    rest.load_state(start.export_state())
    np.testing.assert_allclose(train(rest, range(2, STEPS)), losses[2:], rtol=LOSS)
    assert_same(rest.export_state(), whole.export_state(), WEIGHTS)


def test_bfloat16_products_agree_to_their_precision(spec: ModelSpec) -> None:
    exact = engine(arm_cuda.backend, spec)
    batch = batches(spec, 0)[0]
    loss, gradients = exact.loss_and_gradients(batch)
    for backend in (arm_cuda.backend, arm_mlx.backend):
        e = engine(backend, spec, precision=Precision.BFLOAT16)
        low_loss, low = e.loss_and_gradients(batch)
        assert low_loss != loss
        assert low_loss == pytest.approx(loss, rel=1e-2)
        for name, expected in without_key_biases(gradients).items():
            found = without_key_biases(low)[name]
            assert found.dtype == np.float32
            assert np.abs(found - expected).max() < 0.1 * np.abs(expected).max(), (backend.name, name)
