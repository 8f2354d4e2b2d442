"""Models that train on the Metal kernels: emulated or traced without Metal, real with Metal."""

import json
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from arm_core.engine.optimizer import OptimizerSettings
from arm_core.engine.protocol import Batch, Compile, EngineOptions, TrainingState
from arm_core.model.parameters import initial_parameters
from arm_core.model.spec import ModelSpec, PretrainSpec
from arm_mlx import backend

mx = pytest.importorskip("mlx.core", reason="needs MLX")

import problems  # noqa: E402
from mlx import nn  # noqa: E402
from problems import SCAN, Case  # noqa: E402

from arm_mlx import scan as scans  # noqa: E402
from arm_mlx.layers import named  # noqa: E402
from arm_mlx.metal import launch  # noqa: E402
from arm_mlx.model import build_model, soft_cross_entropy  # noqa: E402

TOLERANCE = 1e-5
"""Tolerances relative to each tensor's largest value."""
SCANNED = {"conv_forward", "conv_backward", "scan_forward_saving", "scan_backward", "gate_backward"}
STEP = {"pretrain": SCANNED | {"gate_forward"}, "classifier": SCANNED | {"gate_forward_saving"}}
"""The kernels that a layer launches once in a training step; the mean of one direction is not saved."""


@pytest.fixture
def offered(metal: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    """Makes the scan `metal` usable; returns its device."""
    if metal is None:
        return "gpu"
    usable = replace(scans.IMPLEMENTATIONS["metal"], unusable=lambda device: None)
    monkeypatch.setitem(scans.IMPLEMENTATIONS, "metal", usable)
    return "cpu"


@pytest.fixture
def launched(metal: Any, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """The number of times each kernel was added to a graph, on an Apple GPU or emulated."""
    return count_launches(monkeypatch)


def count_launches(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    counts: Counter[str] = Counter()
    run = launch.run

    def counting(name: str, *args: Any, **options: Any) -> Any:
        counts[name] += 1
        return run(name, *args, **options)

    monkeypatch.setattr(launch, "run", counting)
    return counts


def batch(spec: ModelSpec) -> Batch:
    rng = np.random.default_rng(0)
    images = rng.standard_normal((2, *spec.image_size, 3)).astype(np.float32)
    if isinstance(spec, PretrainSpec):
        return Batch(images=images)
    return Batch(images=images, targets=rng.dirichlet(np.ones(spec.classes), 2).astype(np.float32))


def assert_close(
    found: np.ndarray, expected: np.ndarray, name: str = "", tolerance: float = TOLERANCE
) -> None:
    assert np.isfinite(found).all(), name
    error = np.abs(found - expected).max() / max(np.abs(expected).max(), 1e-30)
    assert error < tolerance, f"{name}: {error:.1e} of the largest value"


@pytest.mark.parametrize("stage", ["pretrain", "classifier"])
def test_a_model_trains_on_the_kernels_as_on_the_cpu_scan(
    stage: str, request: pytest.FixtureRequest, offered: str, launched: Counter[str]
) -> None:
    spec = request.getfixturevalue(f"{stage}_spec")
    devices = {"metal": offered, "cpu": "cpu"}
    engines = {
        scan: backend.create_engine(
            spec,
            TrainingState(parameters=initial_parameters(spec, 3)),
            optimizer=OptimizerSettings(clip=3.0),
            options=EngineOptions(device=device, scan=scan),
        )
        for scan, device in devices.items()
    }
    results = {scan: engine.loss_and_gradients(batch(spec)) for scan, engine in engines.items()}
    assert launched == dict.fromkeys(STEP[stage], spec.encoder.depth)
    assert results["metal"][0] == pytest.approx(results["cpu"][0], rel=TOLERANCE)
    for name, expected in results["cpu"][1].items():
        assert_close(results["metal"][1][name], expected, name)

    steps = {s: engine.train_step([batch(spec)], step=1, lr=1e-3).result() for s, engine in engines.items()}
    assert steps["metal"].finite
    assert steps["metal"].grad_norm == pytest.approx(steps["cpu"].grad_norm, rel=TOLERANCE)
    states = {scan: engine.export_state().parameters for scan, engine in engines.items()}
    start = initial_parameters(spec, 3)
    for name, gradient in results["cpu"][1].items():
        # AdamW's first step is the sign of a gradient: tiny gradients can have either sign.
        clear = np.abs(gradient) > 1e-3 * np.abs(gradient).max()
        found, expected = ((states[scan][name] - start[name])[clear] for scan in ("metal", "cpu"))
        assert np.abs(found).max() > 0, name
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6, err_msg=name)


def kernels_in_graph(function: Callable[..., Any], *arrays: Any) -> int:
    """Metal kernels that the results of `function(*arrays)` depend on, without computing them.

    Without Metal, MLX only adds Metal kernels to a graph while it exports a function. The exported function
    is a different one, since the exporter refuses functions with custom gradients.
    """
    count = 0

    def draw(*inputs: Any) -> Any:
        nonlocal count
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "graph.dot")
            mx.export_to_dot(str(file), *function(*inputs))
            count = file.read_text().count('label ="CustomKernel"')
        return mx.zeros((1,))

    mx.export_function(lambda record: None, draw, *arrays)
    return count


@pytest.fixture
def on_gpu_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are added to graphs even if there is no Metal to run them."""
    monkeypatch.setattr(launch, "execute", lambda kernel, **call: tuple(kernel(**call, stream=mx.gpu)))


def training_step(spec: ModelSpec) -> Callable[..., list[Any]]:
    """Images and targets -> the loss, then all gradients; the model runs on the scan `metal`."""
    model = build_model(spec, "metal", mx.float32)
    model.load_weights([(n, mx.array(a)) for n, a in initial_parameters(spec, 0).items()])

    def loss(images: Any, targets: Any) -> Any:
        outputs = model(images)
        return outputs["loss"] if "loss" in outputs else soft_cross_entropy(outputs["logits"], targets)

    def step(images: Any, targets: Any) -> list[Any]:
        value, gradients = nn.value_and_grad(model, loss)(images, targets)
        return [value, *named(gradients).values()]

    return step


def data(spec: ModelSpec) -> tuple[Any, Any]:
    images, targets = batch(spec).images, batch(spec).targets
    return mx.array(images), mx.zeros((1,)) if targets is None else mx.array(targets)


@pytest.mark.usefixtures("on_gpu_stream")
@pytest.mark.parametrize("stage", ["pretrain", "classifier"])
def test_the_graph_of_a_training_step_contains_the_forward_and_backward_kernels(
    stage: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = request.getfixturevalue(f"{stage}_spec")
    counts = count_launches(monkeypatch)
    step, arrays, depth = training_step(spec), data(spec), spec.encoder.depth
    assert kernels_in_graph(lambda *a: step(*a)[:1], *arrays) == 3 * depth  # what the loss depends on
    counts.clear()
    assert kernels_in_graph(step, *arrays) == len(STEP[stage]) * depth
    assert counts == dict.fromkeys(STEP[stage], depth)


@pytest.mark.usefixtures("on_gpu_stream")
def test_the_engines_step_up_to_its_update_is_one_graph_with_the_kernels(
    pretrain_spec: PretrainSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The graph that an Apple GPU compiles: loss, gradients, norm, new weights and moments."""
    usable = replace(scans.IMPLEMENTATIONS["metal"], unusable=lambda device: None)
    monkeypatch.setitem(scans.IMPLEMENTATIONS, "metal", usable)
    engine = backend.create_engine(
        pretrain_spec,
        TrainingState(parameters=initial_parameters(pretrain_spec, 3)),
        optimizer=OptimizerSettings(clip=3.0, ema_decay=0.9),
        options=EngineOptions(device="cpu", scan="metal", compile=Compile.MODEL),
    )
    finish = engine._finish  # the function that the engine passes to mx.compile

    def step(images: Any, now: Any) -> list[Any]:
        results = finish({"images": images}, mx.array(1.0), mx.zeros(()), {}, now)
        _, *moments = engine._state
        return [*results, *engine._trainable.values(), *(a for part in moments for a in part.values())]

    arrays = data(pretrain_spec)[0], mx.array([1e-3, 0.1, 0.05])
    assert kernels_in_graph(step, *arrays) == len(STEP["pretrain"]) * pretrain_spec.encoder.depth


@pytest.mark.usefixtures("on_gpu_stream")
def test_the_check_of_the_graph_can_fail(
    pretrain_spec: PretrainSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(scans.IMPLEMENTATIONS, "metal", scans.IMPLEMENTATIONS["reference"])
    assert kernels_in_graph(training_step(pretrain_spec), *data(pretrain_spec)) == 0


RECIPE = """
stage = "pretrain"
[model]
width = 32
depth = 6
patch = 4
image_size = [24, 24]
cluster = [2, 2]
decoder_width = 16
decoder_depth = 2
decoder_heads = 2
[data]
source = "synthetic"
workers = 0
[schedule]
base_lr = 0.1
[training]
length = "2 steps"
batch_size = 2
log_every = 1
"""


def test_arm_pretrain_runs_on_the_kernels(
    offered: str, launched: Counter[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from click.testing import CliRunner

    from arm_cli.main import main

    monkeypatch.chdir(tmp_path)
    Path("tiny.toml").write_text(RECIPE)
    # On a Mac, auto must select them.
    choice = ["--scan", "metal", "--device", "cpu"] if offered == "cpu" else []
    result = CliRunner().invoke(main, ["pretrain", "tiny.toml", "--backend", "mlx", "--out", "run", *choice])
    assert result.exit_code == 0, result.output
    assert "scan metal" in result.stderr
    assert set(launched) >= STEP["pretrain"]
    (session,) = [json.loads(line) for line in Path("run/sessions.jsonl").read_text().splitlines()]
    assert session["scan"] == "metal"


# transformations of MLX


def scan_inputs() -> tuple[list[Any], Any]:
    values = problems.inputs(Case(directions=2, length=11, channels=8))
    return [mx.array(values[name]) for name in SCAN], mx.array(values["order"])


def total(order: Any, **options: Any) -> Callable[..., Any]:
    return lambda *a: scans.selective_scan(*a, order, impl="metal", **options).square().sum()


def test_checkpointing_changes_nothing(metal: Any, launched: Counter[str]) -> None:
    arrays, order = scan_inputs()
    plain = mx.grad(total(order), argnums=(0, 2))(*arrays)
    launched.clear()
    again = mx.grad(mx.checkpoint(total(order)), argnums=(0, 2))(*arrays)
    assert launched["scan_forward_saving"] == 2  # it is computed again instead of kept
    for a, b in zip(plain, again, strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.metal
def test_compiling_changes_nothing() -> None:
    arrays, order = scan_inputs()
    function = mx.value_and_grad(total(order), argnums=tuple(range(len(arrays))))
    value, grads = function(*arrays)
    compiled_value, compiled = mx.compile(function)(*arrays)
    assert_close(np.asarray(compiled_value), np.asarray(value))
    for a, b in zip(compiled, grads, strict=True):
        assert_close(np.asarray(a), np.asarray(b), tolerance=1e-6)


@pytest.mark.usefixtures("on_gpu_stream")
def test_a_compiled_graph_holds_the_kernels() -> None:
    arrays, order = scan_inputs()
    function = mx.compile(mx.value_and_grad(total(order)))
    assert kernels_in_graph(lambda *a: list(function(*a)), *arrays) == 4


def test_without_gradients_nothing_is_kept(metal: Any, launched: Counter[str]) -> None:
    arrays, order = scan_inputs()
    kept = scans.selective_scan(*arrays, order, impl="metal")
    launched.clear()
    found = scans.selective_scan(*arrays, order, impl="metal", save_for_backward=False)
    assert launched == {"scan_forward": 1, "gate_forward": 1}
    np.testing.assert_array_equal(np.asarray(found), np.asarray(kept))


def test_mixed_types_are_computed_in_the_wider_one(metal: Any) -> None:
    arrays, order = scan_inputs()
    low = [a.astype(mx.bfloat16) if name in ("u", "z") else a for name, a in zip(SCAN, arrays, strict=True)]
    found = scans.selective_scan(*low, order, impl="metal")
    assert found.dtype == mx.bfloat16
    exact = scans.selective_scan(*(a.astype(mx.float32) for a in low), order, impl="metal")
    np.testing.assert_array_equal(
        np.asarray(found.astype(mx.float32)), np.asarray(exact.astype(mx.bfloat16).astype(mx.float32))
    )


def test_strided_views_are_read_correctly(metal: Any) -> None:
    """x and z as halves of one array, B and C of another, as in the model; the gradient a broadcast."""
    arrays, order = scan_inputs()
    wide = mx.concatenate([arrays[7], arrays[7] * 2], axis=-1)
    both = mx.concatenate([arrays[3], arrays[4]], axis=-1)
    views = [*arrays[:3], *mx.split(both, 2, axis=-1), *arrays[5:7], mx.split(wide, 2, axis=-1)[0]]
    for inputs in (arrays, views):
        outputs = scans.selective_scan(*inputs, order, impl="metal")
        grads = mx.grad(lambda *a: scans.selective_scan(*a, order, impl="metal").sum(), argnums=(0, 3))(
            *inputs
        )
        found = [np.asarray(a) for a in (outputs, *grads)]
        if inputs is arrays:
            expected = found
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b)
