"""The MLX engine by itself: what it computes, how it steps, what it refuses, which BLAS it finds."""

import ctypes.util
import dataclasses
import logging
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from arm_core.engine.optimizer import CLIP_EPS, OptimizerSettings, parameter_groups
from arm_core.engine.protocol import Batch, EngineOptions, Precision, TrainingState
from arm_core.model.parameters import initial_parameters
from arm_core.model.reference.model import forward
from arm_core.model.spec import (
    DIRECTIONS,
    ClassifierSpec,
    ModelSpec,
    Pooling,
    PredictionOrder,
    PretrainSpec,
    Target,
)
from arm_mlx import backend, blas

mx = pytest.importorskip("mlx.core", reason="needs MLX")

from arm_mlx import engine as engines  # noqa: E402

TOLERANCE = 1e-5
"""Of each tensor's largest value."""


def make(spec: ModelSpec, *, optimizer: OptimizerSettings | None = None, **options: Any) -> engines.MlxEngine:
    parameters = initial_parameters(spec, 3)
    return backend.create_engine(spec, parameters, optimizer=optimizer, options=EngineOptions(**options))


def batch(spec: ModelSpec, images: int = 4, seed: int = 0) -> Batch:
    rng = np.random.default_rng(seed)
    pixels = rng.standard_normal((images, *spec.image_size, 3)).astype(np.float32)
    if isinstance(spec, PretrainSpec):
        return Batch(images=pixels)
    return Batch(images=pixels, targets=rng.dirichlet(np.ones(spec.classes), images).astype(np.float32))


def assert_close(found: Any, expected: Any, name: str = "", tolerance: float = TOLERANCE) -> None:
    assert found.shape == expected.shape, name
    assert np.isfinite(found).all(), name
    error = np.abs(found - expected).max() / max(np.abs(expected).max(), 1e-30)
    assert error < tolerance, f"{name}: {error:.1e} of the largest value"


def arrays_of(state: TrainingState) -> dict[str, np.ndarray]:
    return {
        f"{field.name} {name}": array
        for field in dataclasses.fields(state)
        for name, array in getattr(state, field.name).items()
    }


def assert_equal(found: TrainingState, expected: TrainingState) -> None:
    a, b = arrays_of(found), arrays_of(expected)
    assert set(a) == set(b)
    assert not [name for name in b if not np.array_equal(a[name], b[name])]


# what it computes


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"target": Target.RAW, "prediction_order": PredictionOrder.RANDOM},
        {
            "image_size": (16, 32),
            "cluster": (1, 4),
            "decoder_depth": 1,
            "prediction_order": PredictionOrder.COLUMN,
        },
    ],
    ids=["paper", "raw pixels in random order", "wide image"],
)
def test_pretraining_outputs_equal_the_reference(
    pretrain_spec: PretrainSpec, changes: dict[str, Any]
) -> None:
    spec = dataclasses.replace(pretrain_spec, **changes)
    check_against_reference(spec)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"pooling": Pooling.CLS, "scan_directions": DIRECTIONS[2]},
        {"image_size": (12, 20), "scan_directions": DIRECTIONS[1]},
    ],
    ids=["paper", "class token and two directions", "odd number of patches and one direction"],
)
def test_classifier_outputs_equal_the_reference(
    classifier_spec: ClassifierSpec, changes: dict[str, Any]
) -> None:
    check_against_reference(dataclasses.replace(classifier_spec, **changes))


def check_against_reference(spec: ModelSpec) -> None:
    images = batch(spec).images
    found = make(spec).forward(images, intermediates=True)
    expected = forward(spec, initial_parameters(spec, 3), images)
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert found[name].dtype == np.float32
        assert_close(found[name], value, name)
    assert set(make(spec).forward(images)) < set(found)


# how it steps


def test_a_step_follows_the_formula_of_the_settings(classifier_spec: ClassifierSpec) -> None:
    settings = OptimizerSettings(
        betas=(0.9, 0.99), layer_decay=0.6, clip=0.05, ema_decay=0.7, weight_decay=0.1
    )
    engine, data, lr = make(classifier_spec, optimizer=settings), batch(classifier_spec), 1e-2
    (b1, b2), ema = settings.betas, initial_parameters(classifier_spec, 3)
    p = {name: value.astype(np.float64) for name, value in ema.items()}
    m, v = ({name: np.zeros_like(value) for name, value in p.items()} for _ in range(2))
    for step in (1, 2):
        loss, gradients = engine.loss_and_gradients(data)
        norm = np.sqrt(sum(np.sum(g.astype(np.float64) ** 2) for g in gradients.values()))
        result = engine.train_step([data], step=step, lr=lr).result()
        assert result.loss == pytest.approx(loss, rel=1e-6)
        assert result.grad_norm == pytest.approx(norm, rel=1e-5)
        assert norm > settings.clip
        for group in parameter_groups(classifier_spec, settings):
            rate = lr * group.lr_scale
            for n in group.names:
                g = gradients[n].astype(np.float64) * settings.clip / (norm + CLIP_EPS)
                m[n] = b1 * m[n] + (1 - b1) * g
                v[n] = b2 * v[n] + (1 - b2) * g**2
                p[n] = p[n] * (1 - rate * group.weight_decay)
                p[n] -= rate / (1 - b1**step) * m[n] / (np.sqrt(v[n] / (1 - b2**step)) + settings.eps)
                ema[n] = ema[n] + (1 - settings.ema_decay) * (p[n] - ema[n])
    state = engine.export_state()
    for what, expected in (("parameters", p), ("exp_avg", m), ("exp_avg_sq", v), ("ema", ema)):
        for name, value in getattr(state, what).items():
            assert_close(value, expected[name], f"{what} {name}")


def test_micro_batches_make_the_step_of_one_large_batch(pretrain_spec: PretrainSpec) -> None:
    whole = batch(pretrain_spec)
    halves = [Batch(images=half) for half in np.split(whole.images, 2)]
    one, two = make(pretrain_spec), make(pretrain_spec)
    expected = one.train_step([whole], step=1, lr=1e-3).result()
    found = two.train_step(halves, step=1, lr=1e-3).result()
    assert found.loss == pytest.approx(expected.loss, rel=1e-6)
    assert found.grad_norm == pytest.approx(expected.grad_norm, rel=1e-5)
    for name, value in one.export_state().exp_avg.items():
        if not name.endswith("attention.key_value.bias"):  # its key half has a gradient of 0: rounding alone
            assert_close(two.export_state().exp_avg[name], value, name)


def test_an_image_whose_branches_are_dropped_adds_nothing_to_the_blocks(
    classifier_spec: ClassifierSpec,
) -> None:
    data, depth = batch(classifier_spec, images=2), classifier_spec.encoder.depth
    scale = np.ones((depth, 2, 2), np.float32)
    scale[:, :, 1] = 0
    engine = make(classifier_spec)
    _, both = engine.loss_and_gradients(dataclasses.replace(data, drop_path_scale=scale))
    first = Batch(images=data.images[:1], targets=data.targets[:1])
    _, alone = engine.loss_and_gradients(first)
    for name in both:
        if name.startswith("layers."):
            assert_close(both[name], alone[name] / 2, name, 1e-4)


@pytest.mark.parametrize("cause", ["loss", "gradient norm"])
def test_a_step_that_is_not_finite_changes_nothing(classifier_spec: ClassifierSpec, cause: str) -> None:
    engine = make(classifier_spec, optimizer=OptimizerSettings(clip=1.0, ema_decay=0.9))
    good = batch(classifier_spec)
    engine.train_step([good], step=1, lr=1e-3)
    bad = good
    if cause == "loss":
        bad = dataclasses.replace(good, images=np.where(good.images > 3, np.inf, good.images))
    else:  # the squares of its gradients overflow
        state = engine.export_state()
        state.parameters["head.weight"] *= 1e25
        engine.load_state(state)
    before = engine.export_state()
    result = engine.train_step([bad], step=2, lr=1e-3).result()
    assert not result.finite
    assert np.isfinite(result.loss) == (cause == "gradient norm")
    assert_equal(engine.export_state(), before)


def test_results_can_be_read_after_later_steps(pretrain_spec: PretrainSpec) -> None:
    engine, other = make(pretrain_spec), make(pretrain_spec)
    data = batch(pretrain_spec)
    pending = [engine.train_step([data], step=i, lr=1e-3) for i in (1, 2, 3)]
    at_once = [other.train_step([data], step=i, lr=1e-3).result() for i in (1, 2, 3)]
    assert [p.result() for p in pending] == at_once
    assert at_once[0].loss > at_once[2].loss


def test_exported_arrays_do_not_follow_the_training(pretrain_spec: PretrainSpec) -> None:
    engine = make(pretrain_spec, optimizer=OptimizerSettings(ema_decay=0.9))
    state = engine.export_state()
    kept = {name: array.copy() for name, array in arrays_of(state).items()}
    engine.train_step([batch(pretrain_spec)], step=1, lr=1e-2)
    after = arrays_of(engine.export_state())
    for name, array in arrays_of(state).items():
        np.testing.assert_array_equal(array, kept[name])
    fixed = {name for name in kept if np.array_equal(kept[name], after[name])}
    assert fixed == {"parameters pos_embed", "parameters decoder_pos_embed"}


def test_bfloat16_products_keep_float32_master_weights(pretrain_spec: PretrainSpec) -> None:
    low, exact = (make(pretrain_spec, precision=p) for p in (Precision.BFLOAT16, Precision.FLOAT32))
    data, lr = batch(pretrain_spec), 1e-5  # less than bfloat16 resolves beside a weight of 0.1
    expected = exact.forward(data.images)
    for name, found in low.forward(data.images).items():
        assert found.dtype == np.float32
        assert not np.array_equal(found, expected[name]), name
        assert_close(found, expected[name], name, 0.05)
    low.train_step([data], step=1, lr=lr)
    before, after = initial_parameters(pretrain_spec, 3), low.export_state().parameters
    for name in ("layers.0.mlp.w1.weight", "layers.5.mixer.in_proj.weight"):
        moved = np.abs(after[name] - before[name])
        assert 0.9 * lr < np.median(moved) < 1.1 * lr


# what it refuses


def test_auto_decides_once_and_never_stands_in_the_record(pretrain_spec: PretrainSpec) -> None:
    engine = make(pretrain_spec, device="cpu")
    assert (engine.scan, engine.device) == ("cpu", "CPU")


def test_mistaken_options_are_refused_in_one_line(pretrain_spec: PretrainSpec) -> None:
    with pytest.raises(ValueError, match="expected auto, cpu or gpu, found 'cuda'"):
        make(pretrain_spec, device="cuda")
    with pytest.raises(
        ValueError, match="unknown scan 'fast' for this backend; known are auto, metal, cpu, reference"
    ):
        make(pretrain_spec, device="cpu", scan="fast")
    if not mx.metal.is_available():
        with pytest.raises(ValueError, match="device 'gpu' is not there: MLX sees no Metal"):
            make(pretrain_spec, device="gpu")


def test_a_classifier_refuses_to_train_without_targets(classifier_spec: ClassifierSpec) -> None:
    with pytest.raises(ValueError, match=r"batches with targets \(B, classes\), found None"):
        make(classifier_spec).loss_and_gradients(Batch(images=batch(classifier_spec).images))


def test_a_state_of_another_model_is_refused_by_name(
    pretrain_spec: PretrainSpec, classifier_spec: ClassifierSpec
) -> None:
    engine = make(pretrain_spec)
    state = engine.export_state()
    with pytest.raises(ValueError, match=r"parameters: missing tap_norms\.0\.weight \(32,\); "):
        engine.load_state(make(classifier_spec).export_state())
    with pytest.raises(
        ValueError, match="exp_avg: expected the trainable parameters, differs in query_token"
    ):
        engine.load_state(
            dataclasses.replace(state, exp_avg={n: a for n, a in state.exp_avg.items() if n != "query_token"})
        )


# which BLAS it finds, and what is missing


def test_without_mlx_the_backend_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert backend.missing() is None
    module = sys.modules["arm_mlx.backend"]
    bindings = ModuleSpec("mlx", None, is_package=True)
    bindings.submodule_search_locations = [str(tmp_path)]
    for found, sentence in (
        (None, "MLX is not installed"),
        (bindings, "MLX is installed without its library"),
    ):
        monkeypatch.setattr(module, "find_spec", lambda name, found=found: found)
        monkeypatch.setattr(sys, "platform", "linux")
        reason = backend.missing()
        assert reason is not None
        assert reason.startswith(sentence)
        assert reason.endswith("pip install 'arm-vision[mlx]'")


on_linux = pytest.mark.skipif(
    sys.platform != "linux", reason="needs Linux: a Mac's products run on Accelerate"
)

PRODUCT = """
import numpy as np
from arm_mlx import backend, blas
devices = backend.devices()
import mlx.core as mx
a, b = (np.random.default_rng(i).standard_normal((70, 70)).astype(np.float32) for i in range(2))
error = np.abs(np.array(mx.array(a) @ mx.array(b)) - a @ b).max()
maps = open("/proc/self/maps").read()
print(blas.load().library, blas.load().advice, devices, error < 1e-4, "openblas" in maps, sep="|")
"""


@on_linux
def test_openblas_is_loaded_before_mlx_where_the_system_has_it(fresh_python: Callable[[str], str]) -> None:
    library, advice, _, right, mapped = fresh_python(PRODUCT).strip().split("|")
    assert right == "True"
    if name := ctypes.util.find_library("openblas"):
        assert (library, advice, mapped) == (f"OpenBLAS ({name})", "None", "True")
    else:
        assert (library, advice) == (blas.BUNDLED, blas.INSTALL)


@on_linux
def test_without_openblas_products_run_on_and_the_advice_says_what_to_install(
    fresh_python: Callable[[str], str],
) -> None:
    hidden = "import ctypes.util; ctypes.util.find_library = lambda name: None\n"
    library, advice, _, right, _ = fresh_python(hidden + PRODUCT).strip().split("|")
    assert (library, advice, right) == (blas.BUNDLED, blas.INSTALL, "True")


@on_linux
def test_mlx_imported_first_is_reported(fresh_python: Callable[[str], str]) -> None:
    library, advice, *_ = fresh_python("import mlx.core\n" + PRODUCT).strip().split("|")
    assert library == blas.BUNDLED
    assert "import arm_mlx first" in advice


def test_threads_reach_the_scan_and_the_products(
    pretrain_spec: PretrainSpec, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked: list[tuple[str, int]] = []
    monkeypatch.setattr(engines.cpu_kernels, "set_threads", lambda n: asked.append(("scan", n)))
    monkeypatch.setattr(blas, "set_threads", lambda n: asked.append(("products", n)) or True)
    make(pretrain_spec, threads=2)
    assert asked == [("scan", 2), ("products", 2)]
    assert not caplog.records

    monkeypatch.setattr(blas, "set_threads", lambda n: False)
    with caplog.at_level(logging.WARNING, "arm_mlx"):
        make(pretrain_spec, threads=2)
    assert "threads=2 reaches the scan alone" in caplog.text
