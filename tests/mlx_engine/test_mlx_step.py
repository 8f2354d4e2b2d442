"""MLX's training step: compiled or not, in place or not, in float32 and bfloat16, and its memory."""

import dataclasses
import gc
import shutil
from typing import Any

import numpy as np
import pytest

import arm_cuda
from arm_core.engine.optimizer import OptimizerSettings
from arm_core.engine.protocol import Batch, Compile, EngineOptions, Precision, TrainingState
from arm_core.model.parameters import initial_parameters
from arm_core.model.spec import DIRECTIONS, ClassifierSpec, EncoderSpec, ModelSpec, PretrainSpec
from arm_mlx import backend

mx = pytest.importorskip("mlx.core", reason="needs MLX")

from arm_mlx import (  # noqa: E402
    cpu_update,
    layers,
    update,
)
from arm_mlx import engine as engines  # noqa: E402

needs_compiler = pytest.mark.skipif(
    not mx.metal.is_available() and shutil.which("g++") is None,
    reason="needs g++, which MLX compiles with on a CPU",
)
needs_torch = pytest.mark.skipif(arm_cuda.backend.missing() is not None, reason="needs torch")

ENCODER = EncoderSpec(width=16, depth=2, patch=4, state=4)
CLASSIFIER = ClassifierSpec(encoder=ENCODER, classes=3, image_size=(12, 8))
PRETRAINING = PretrainSpec(
    encoder=dataclasses.replace(ENCODER, depth=6),
    image_size=(12, 12),
    cluster=(1, 1),
    decoder_width=8,
    decoder_depth=1,
    decoder_heads=2,
)
WIDER = dataclasses.replace(PRETRAINING, encoder=EncoderSpec(width=64, depth=6, patch=4), decoder_width=32)
OPTIMIZER = OptimizerSettings(clip=0.3, ema_decay=0.9, layer_decay=0.8)

STEP = 1e-5
"""Compiled or in place against operation by operation, relative to each tensor's largest value."""
BFLOAT16 = 3e-2
"""MLX against torch, both with bfloat16 products: the difference's L2 norm relative to the gradient's."""


def make(spec: ModelSpec, *, optimizer: OptimizerSettings = OPTIMIZER, **options: Any) -> Any:
    options = {"device": "cpu", "scan": "reference", **options}
    state = TrainingState(parameters=initial_parameters(spec, 3))
    return backend.create_engine(spec, state, optimizer=optimizer, options=EngineOptions(**options))


def operation_by_operation(spec: ModelSpec) -> Any:
    """The uncompiled step, with the update in MLX's operations as well."""
    engine = make(spec)
    engine._update = update.update
    return engine


def batch(spec: ModelSpec, seed: int, images: int = 2) -> Batch:
    rng = np.random.default_rng(seed)
    pixels = rng.standard_normal((images, *spec.image_size, 3)).astype(np.float32)
    scale = rng.choice([0.0, 2.0], (spec.encoder.depth, 2, images)).astype(np.float32)
    targets = None
    if isinstance(spec, ClassifierSpec):
        targets = rng.dirichlet(np.ones(spec.classes), images).astype(np.float32)
    return Batch(images=pixels, targets=targets, drop_path_scale=scale)


def arrays_of(state: TrainingState) -> dict[str, np.ndarray]:
    """Every array of a state except the biases of keys, whose gradients are rounding errors."""
    kinds = ("parameters", "exp_avg", "exp_avg_sq", "ema")
    found = {f"{kind} {name}": a for kind in kinds for name, a in getattr(state, kind).items()}
    return {name: a for name, a in found.items() if not name.endswith("key_value.bias")}


def assert_close(found: dict[str, np.ndarray], expected: dict[str, np.ndarray], tolerance: float) -> None:
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert np.isfinite(found[name]).all(), name
        assert np.abs(found[name] - value).max() <= tolerance * np.abs(value).max(), name


def what_steps_change(engine: Any) -> dict[str, Any]:
    """Trainable weights, both moments and the average."""
    _, *moments = engine._state
    return {**engine._trainable, **{f"{i} {name}": a for i, m in enumerate(moments) for name, a in m.items()}}


def active_memory() -> int:
    """Bytes that arrays hold, without those of engines that earlier tests left to the garbage collector."""
    gc.collect()
    mx.synchronize()
    return mx.get_active_memory()


MICRO_BATCHES = (1, 1, 2, 1, 3)
"""Learning rates of the steps in the comparisons."""


def train(engine: Any) -> list[tuple[float, float]]:
    results = []
    for step, count in enumerate(MICRO_BATCHES, start=1):
        batches = [batch(engine.spec, 10 * step + i) for i in range(count)]
        result = engine.train_step(batches, step=step, lr=1e-3 / step).result()
        results.append((result.loss, result.grad_norm))
    return results


# compiled


@needs_compiler
@pytest.mark.parametrize("spec", [CLASSIFIER, PRETRAINING], ids=["classifier", "pretraining"])
def test_the_compiled_step_equals_the_uncompiled_one(spec: ModelSpec) -> None:
    compiled, plain = make(spec, compile=Compile.MODEL), operation_by_operation(spec)
    np.testing.assert_allclose(train(compiled), train(plain), rtol=STEP)
    assert_close(arrays_of(compiled.export_state()), arrays_of(plain.export_state()), STEP)
    images = batch(spec, 5).images
    assert_close(compiled.forward(images), plain.forward(images), STEP)


@needs_compiler
def test_no_step_is_traced_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    traces, original = 0, engines.soft_cross_entropy

    def counting(*arguments: Any) -> Any:
        nonlocal traces
        traces += 1
        return original(*arguments)

    monkeypatch.setattr(engines, "soft_cross_entropy", counting)
    engine = make(CLASSIFIER, compile=Compile.MODEL)

    def traces_of_a_step(step: int, count: int, images: int = 2) -> int:
        before = traces
        batches = [batch(CLASSIFIER, 10 * step + i, images) for i in range(count)]
        engine.train_step(batches, step=step, lr=1e-3 / step).result()
        return traces - before

    assert traces_of_a_step(1, 1) == 1
    assert [traces_of_a_step(step, 1) for step in (2, 3, 4)] == [0, 0, 0]
    assert traces_of_a_step(5, 3) == 3, "the first micro-batch, one between, the last with the update"
    assert [traces_of_a_step(step, count) for step, count in ((6, 3), (7, 4), (8, 1))] == [0, 0, 0]
    engine.load_state(engine.export_state())
    engine.swap_ema()
    engine.forward(batch(CLASSIFIER, 1).images)
    engine.swap_ema()
    assert traces_of_a_step(9, 1) == 0
    assert traces_of_a_step(10, 1, images=3) == 1, "another size of batch is another graph"


@needs_compiler
def test_a_compiled_step_computes_nothing_before_its_result_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the call that starts the device, a step must not take memory until its result is read."""
    spec = dataclasses.replace(CLASSIFIER, encoder=dataclasses.replace(ENCODER, width=96))
    engine = make(spec, compile=Compile.MODEL)
    weights = sum(value.nbytes for value in initial_parameters(spec, 3).values())
    engine.train_step([batch(spec, 0)], step=1, lr=1e-3).result()
    started: list[Any] = []
    monkeypatch.setattr(mx, "async_eval", lambda *arrays: started.append(arrays))
    before = active_memory()
    mx.reset_peak_memory()
    pending = engine.train_step([batch(spec, 1)], step=2, lr=1e-3)
    assert len(started) == 1
    assert mx.get_peak_memory() - before < weights / 10
    assert pending.result().finite
    assert mx.get_peak_memory() - before > weights


@needs_compiler
@pytest.mark.parametrize("kept", [False, True], ids=["as it is", "with the old state held elsewhere"])
def test_a_compiled_step_needs_no_second_copy_of_the_state(kept: bool) -> None:
    """Weights, moments and average take four times the weights; gradients and temporary arrays two more."""
    encoder = EncoderSpec(width=128, depth=12, patch=4, state=4)
    spec = ClassifierSpec(encoder=encoder, classes=4, image_size=(8, 8), scan_directions=DIRECTIONS[1])
    engine = make(spec, compile=Compile.MODEL)
    weights = sum(value.nbytes for value in initial_parameters(spec, 3).values())
    engine.train_step([batch(spec, 0)], step=1, lr=1e-3).result()
    mx.eval(engine._state)
    elsewhere = active_memory() - 4 * weights
    held = [engine._trainable, *map(dict, engine._state[1:])] if kept else []
    mx.reset_peak_memory()
    engine.train_step([batch(spec, 1)], step=2, lr=1e-3).result()
    mx.eval(engine._state)
    peak = (mx.get_peak_memory() - elsewhere) / weights
    assert (peak >= 8 - 0.1) if held else (peak < 7), peak


@needs_compiler
def test_recomputing_blocks_takes_less_memory_and_changes_nothing() -> None:
    spec = dataclasses.replace(CLASSIFIER, encoder=dataclasses.replace(ENCODER, depth=8), image_size=(24, 24))
    peaks, states = [], []
    for recompute in (False, True):
        engine = make(spec, compile=Compile.MODEL, recompute=recompute)
        engine.train_step([batch(spec, 0, images=8)], step=1, lr=1e-3).result()
        before = active_memory()
        mx.reset_peak_memory()
        engine.train_step([batch(spec, 1, images=8)], step=2, lr=1e-3).result()
        peaks.append(mx.get_peak_memory() - before)
        states.append(arrays_of(engine.export_state()))
        del engine
    assert peaks[1] < 0.6 * peaks[0]
    assert_close(states[1], states[0], STEP)
    with pytest.raises(ValueError, match="--recompute saves memory in MLX only if the step is compiled"):
        make(spec, recompute=True)


def test_auto_compiles_nothing_on_a_cpu() -> None:
    assert {make(CLASSIFIER, scan=scan).compile for scan in ("cpu", "reference")} == {Compile.NONE}


@pytest.mark.metal
def test_auto_compiles_the_whole_step_on_an_apple_gpu() -> None:
    engine = make(CLASSIFIER, device="gpu", scan="auto")
    assert (engine.scan, engine.compile) == ("metal", Compile.MODEL)
    compared = make(CLASSIFIER, device="cpu", scan="cpu")
    np.testing.assert_allclose(train(engine), train(compared), rtol=10 * STEP)


def test_options_that_mlx_cannot_compile_are_refused() -> None:
    with pytest.raises(ValueError, match=r"scan 'cpu' runs outside of MLX's graph; use --scan reference"):
        make(CLASSIFIER, compile=Compile.MODEL, scan="cpu")
    with pytest.raises(ValueError, match="expected model or none, found blocks"):
        make(CLASSIFIER, compile=Compile.BLOCKS)


# in place on a CPU


@pytest.mark.parametrize("spec", [CLASSIFIER, PRETRAINING], ids=["classifier", "pretraining"])
def test_the_update_in_place_equals_the_one_in_mlx_operations(spec: ModelSpec) -> None:
    in_place, plain = make(spec), operation_by_operation(spec)
    assert in_place._update is cpu_update.update
    np.testing.assert_allclose(train(in_place), train(plain), rtol=STEP)
    assert_close(arrays_of(in_place.export_state()), arrays_of(plain.export_state()), STEP)


def test_the_update_on_a_cpu_stays_in_the_memory_of_the_state() -> None:
    engine = make(CLASSIFIER, scan="cpu")
    mx.eval(engine._state)
    before = addresses(engine)
    for step in (1, 2):
        engine.train_step([batch(CLASSIFIER, step)], step=step, lr=1e-3).result()
    assert addresses(engine) == before


def addresses(engine: Any) -> dict[str, int]:
    return {name: np.asarray(array).ctypes.data for name, array in what_steps_change(engine).items()}


@pytest.mark.parametrize("size", [1, 7, cpu_update.CHUNK, 3 * cpu_update.CHUNK + 5])
def test_the_norm_counts_every_gradient(size: int) -> None:
    rng = np.random.default_rng(size)
    gradients = [rng.standard_normal(n).astype(np.float32) for n in (size, 3)]
    expected = np.sqrt(sum(np.sum(g.astype(np.float64) ** 2) for g in gradients))
    assert cpu_update.gradient_norm(gradients) == pytest.approx(expected, rel=1e-6)
    for bad in (np.nan, np.inf, 1e30):
        spoiled = [gradients[0].copy(), gradients[1]]
        spoiled[0][-1] = bad
        assert not np.isfinite(cpu_update.gradient_norm(spoiled))


def test_the_gate_beside_the_cpu_scan_equals_the_plain_one() -> None:
    a, b = (mx.array(np.random.default_rng(i).standard_normal((3, 37, 5)).astype(np.float32)) for i in (0, 1))
    found, expected = (
        mx.value_and_grad(lambda a, b, impl=impl: mx.square(layers.swiglu(a, b, impl=impl)).sum(), (0, 1))(
            a, b
        )
        for impl in ("cpu", "reference")
    )
    assert found[0].item() == pytest.approx(expected[0].item(), rel=1e-5)
    for x, y in zip(found[1], expected[1], strict=True):
        assert_close({"": np.array(x)}, {"": np.array(y)}, STEP)


def test_gradients_of_weights_have_the_memory_layout_of_the_weights() -> None:
    """A transposed one would be copied before the update."""
    engine = make(PRETRAINING, scan="cpu")
    _, gradients = engine._micro_step(engine._put(batch(PRETRAINING, 0)), mx.array(1.0), mx.zeros(()), {})
    mx.eval(gradients)
    strided = [name for name, g in gradients.items() if not np.asarray(g).flags.c_contiguous]
    assert strided == []


# bfloat16


@needs_torch
@pytest.mark.parametrize("spec", [CLASSIFIER, WIDER], ids=["classifier", "pretraining"])
def test_bfloat16_gradients_agree_with_those_of_torch(spec: ModelSpec) -> None:
    state, data = TrainingState(parameters=initial_parameters(spec, 3)), batch(spec, 0, images=4)
    found = []
    for module in (arm_cuda.backend, backend):
        options = EngineOptions(device="cpu", precision=Precision.BFLOAT16)
        engine = module.create_engine(spec, state, optimizer=OPTIMIZER, options=options)
        found.append(engine.loss_and_gradients(data))
    (torch_loss, torch_gradients), (loss, gradients) = found
    assert loss == pytest.approx(torch_loss, rel=BFLOAT16 / 10)
    for name, value in torch_gradients.items():
        if not name.endswith("key_value.bias"):
            assert gradients[name].dtype == np.float32
            error = np.linalg.norm(gradients[name] - value) / np.linalg.norm(value)
            assert error < BFLOAT16, f"{name}: {error:.1e}"


def test_bfloat16_keeps_the_float32_parameters_of_the_scan(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    whole = layers.selective_scan

    def spy(
        u: Any, dt: Any, A: Any, B: Any, C: Any, D: Any, dt_bias: Any, z: Any, order: Any, **how: Any
    ) -> Any:
        seen.update(u=u.dtype, dt=dt.dtype, A=A.dtype, B=B.dtype, D=D.dtype, dt_bias=dt_bias.dtype)
        return whole(u, dt, A, B, C, D, dt_bias, z, order, **how)

    monkeypatch.setattr(layers, "selective_scan", spy)
    engine = make(CLASSIFIER, scan="cpu", precision=Precision.BFLOAT16)
    engine.train_step([batch(CLASSIFIER, 0)], step=1, lr=1e-3).result()
    assert {name for name, dtype in seen.items() if dtype == mx.float32} == {"A", "D", "dt_bias"}
    assert {array.dtype for array in what_steps_change(engine).values()} == {mx.float32}


# values that are not finite


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"compile": Compile.MODEL}, marks=needs_compiler, id="compiled"),
        pytest.param(
            {"compile": Compile.MODEL, "precision": Precision.BFLOAT16},
            marks=needs_compiler,
            id="compiled bfloat16",
        ),
        pytest.param({"scan": "cpu", "precision": Precision.BFLOAT16}, id="in place bfloat16"),
    ],
)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_step_that_is_not_finite_changes_nothing(options: dict[str, Any], bad: float) -> None:
    engine = make(CLASSIFIER, **options)
    engine.train_step([batch(CLASSIFIER, 0)], step=1, lr=1e-3).result()
    before = arrays_of(engine.export_state())
    spoiled = batch(CLASSIFIER, 1)
    spoiled.images[0, 0, 0, 0] = bad
    assert not engine.train_step([spoiled], step=2, lr=1e-3).result().finite
    after = arrays_of(engine.export_state())
    for name, value in before.items():
        np.testing.assert_array_equal(after[name], value, err_msg=name)
    assert engine.train_step([batch(CLASSIFIER, 2)], step=3, lr=1e-3).result().finite
