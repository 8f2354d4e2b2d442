"""The outputs and the training steps of every engine, each case on each installed engine."""

import dataclasses
import gc
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest

import arm_cuda
import arm_mlx
from arm_core.engine.optimizer import CLIP_EPS, OptimizerSettings, parameter_groups
from arm_core.engine.protocol import Batch, EngineOptions, Precision, StepStopped, TrainingState
from arm_core.model.parameters import initial_parameters
from arm_core.model.reference.model import forward, prediction_target, unfold_patches
from arm_core.model.spec import (
    DIRECTIONS,
    ClassifierSpec,
    ModelSpec,
    Pooling,
    PredictionOrder,
    PretrainSpec,
    Target,
)

pytestmark = pytest.mark.usefixtures("one_torch_thread")

TOLERANCE = 1e-5
"""Tolerances relative to each tensor's largest value."""


@pytest.fixture(params=[arm_cuda.backend, arm_mlx.backend], ids=lambda backend: backend.name)
def backend(request: pytest.FixtureRequest) -> Any:
    if reason := request.param.missing():
        pytest.skip(reason)
    return request.param


def make(backend: Any, spec: ModelSpec, *, optimizer: OptimizerSettings | None = None, **options: Any) -> Any:
    state = TrainingState(parameters=initial_parameters(spec, 3))
    return backend.create_engine(
        spec, state, optimizer=optimizer or OptimizerSettings(), options=EngineOptions(**options)
    )


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


# outputs


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
    backend: Any, pretrain_spec: PretrainSpec, changes: dict[str, Any]
) -> None:
    spec = dataclasses.replace(pretrain_spec, **changes)
    check_against_reference(backend, spec)


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
    backend: Any, classifier_spec: ClassifierSpec, changes: dict[str, Any]
) -> None:
    check_against_reference(backend, dataclasses.replace(classifier_spec, **changes))


def check_against_reference(backend: Any, spec: ModelSpec) -> None:
    images = batch(spec).images
    found = make(backend, spec).forward(images, intermediates=True)
    expected = forward(spec, initial_parameters(spec, 3), images)
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert found[name].dtype == np.float32
        assert_close(found[name], value, name)
    assert set(make(backend, spec).forward(images)) < set(found)


def test_losses_are_computed_in_float32_from_bfloat16_outputs(
    backend: Any, pretrain_spec: PretrainSpec, classifier_spec: ClassifierSpec
) -> None:
    """A loss that is rounded to bfloat16 would have an error of up to 4e-3."""
    for spec in (pretrain_spec, classifier_spec):
        engine, data = make(backend, spec, precision=Precision.BFLOAT16), batch(spec)
        outputs = {n: value.astype(np.float64) for n, value in engine.forward(data.images).items()}
        if isinstance(spec, ClassifierSpec):
            logits = 8 * outputs["logits"]
            state = engine.export_state()
            state.parameters["head.weight"] *= 8  # logits far from 0, as after training
            state.parameters["head.bias"] *= 8
            engine.load_state(state)
            np.testing.assert_array_equal(engine.forward(data.images)["logits"], logits)
            logarithms = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            expected = -(data.targets * logarithms).sum(-1).mean()
        else:
            patches = unfold_patches(data.images, spec.encoder.patch)
            expected = np.square(outputs["prediction"] - prediction_target(spec, patches)).mean()
        loss, _ = engine.loss_and_gradients(data)
        assert loss == pytest.approx(expected, rel=2e-6)


# training steps


def test_a_step_that_is_stopped_between_micro_batches_changes_nothing(
    backend: Any, classifier_spec: ClassifierSpec
) -> None:
    settings = OptimizerSettings(ema_decay=0.5)
    stopped, other = (make(backend, classifier_spec, optimizer=settings) for _ in range(2))
    micro = [batch(classifier_spec, seed=seed) for seed in (0, 1, 2)]
    calls: list[int] = []

    def stop() -> bool:
        calls.append(1)
        return len(calls) == 2

    with pytest.raises(StepStopped):
        stopped.train_step(micro, step=1, lr=0.1, stop=stop)
    assert len(calls) == 2
    for engine in (stopped, other):
        engine.train_step(micro, step=1, lr=0.1, stop=lambda: False).result()
    found, expected = stopped.export_state(), other.export_state()
    for kind in ("parameters", "exp_avg", "exp_avg_sq", "ema"):
        for name, value in getattr(expected, kind).items():
            assert getattr(found, kind)[name].tobytes() == value.tobytes(), f"{kind}/{name}"


def test_a_layer_decay_of_0_freezes_all_but_the_last_norm_and_the_head(
    backend: Any, classifier_spec: ClassifierSpec
) -> None:
    settings = OptimizerSettings(layer_decay=0.0, weight_decay=0.1, ema_decay=0.5)
    engine = make(backend, classifier_spec, optimizer=settings)
    before = engine.export_state().parameters
    for step in (1, 2):
        engine.train_step([batch(classifier_spec)], step=step, lr=0.1).result()
    state = engine.export_state()
    changed = {name for name, value in before.items() if (state.parameters[name] != value).any()}
    assert changed == {"norm_f.weight", "norm_f.bias", "head.weight", "head.bias"}
    for name in state.ema.keys() - changed:
        assert (state.ema[name] == before[name]).all(), name


def test_a_step_follows_the_formula_of_the_settings(backend: Any, classifier_spec: ClassifierSpec) -> None:
    settings = OptimizerSettings(
        betas=(0.9, 0.99), layer_decay=0.6, clip=0.05, ema_decay=0.7, weight_decay=0.1
    )
    engine, data, lr = make(backend, classifier_spec, optimizer=settings), batch(classifier_spec), 1e-2
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


def test_micro_batches_give_the_step_of_one_large_batch(backend: Any, pretrain_spec: PretrainSpec) -> None:
    whole = batch(pretrain_spec)
    halves = [Batch(images=half) for half in np.split(whole.images, 2)]
    one, two = make(backend, pretrain_spec), make(backend, pretrain_spec)
    expected = one.train_step([whole], step=1, lr=1e-3).result()
    found = two.train_step(halves, step=1, lr=1e-3).result()
    assert found.loss == pytest.approx(expected.loss, rel=1e-6)
    assert found.grad_norm == pytest.approx(expected.grad_norm, rel=1e-5)
    for name, value in one.export_state().exp_avg.items():
        if not name.endswith("attention.key_value.bias"):  # its key half: only rounding errors
            assert_close(two.export_state().exp_avg[name], value, name)


def test_an_image_whose_branches_are_dropped_adds_nothing_to_the_blocks(
    backend: Any,
    classifier_spec: ClassifierSpec,
) -> None:
    data, depth = batch(classifier_spec, images=2), classifier_spec.encoder.depth
    scale = np.ones((depth, 2, 2), np.float32)
    scale[:, :, 1] = 0
    engine = make(backend, classifier_spec)
    _, both = engine.loss_and_gradients(dataclasses.replace(data, drop_path_scale=scale))
    first = Batch(images=data.images[:1], targets=data.targets[:1])
    _, alone = engine.loss_and_gradients(first)
    for name in both:
        if name.startswith("layers."):
            assert_close(both[name], alone[name] / 2, name, 1e-4)


def test_each_branch_of_a_block_has_its_own_factor(backend: Any, classifier_spec: ClassifierSpec) -> None:
    """A branch with factor 0 gets no gradient; the other branch gets one."""
    data, engine = batch(classifier_spec, images=2), make(backend, classifier_spec)
    for dropped, kept in enumerate(("mlp", "mixer")):
        scale = np.ones((classifier_spec.encoder.depth, 2, 2), np.float32)
        scale[:, dropped] = 0
        _, gradients = engine.loss_and_gradients(dataclasses.replace(data, drop_path_scale=scale))
        norm = f"norm{2 - dropped}"  # before the branch that is kept
        for name, gradient in gradients.items():
            if name.startswith("layers."):
                part = name.split(".")[2]
                assert bool(gradient.any()) is (part in (kept, norm)), name


def test_gradients_within_the_clipping_norm_are_used_as_they_are(
    backend: Any, classifier_spec: ClassifierSpec
) -> None:
    engines = [make(backend, classifier_spec, optimizer=OptimizerSettings(clip=clip)) for clip in (None, 1e3)]
    for engine in engines:
        result = engine.train_step([batch(classifier_spec)], step=1, lr=1e-3).result()
        assert result.grad_norm < 1e2
    assert_equal(*(engine.export_state() for engine in engines))


@pytest.mark.parametrize("cause", ["loss", "gradient norm"])
def test_a_step_that_is_not_finite_changes_nothing(
    backend: Any, classifier_spec: ClassifierSpec, cause: str
) -> None:
    engine = make(backend, classifier_spec, optimizer=OptimizerSettings(clip=1.0, ema_decay=0.9))
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


def test_results_can_be_read_after_later_steps(backend: Any, pretrain_spec: PretrainSpec) -> None:
    engine, other = make(backend, pretrain_spec), make(backend, pretrain_spec)
    data = batch(pretrain_spec)
    pending = [engine.train_step([data], step=i, lr=1e-3) for i in (1, 2, 3)]
    at_once = [other.train_step([data], step=i, lr=1e-3).result() for i in (1, 2, 3)]
    assert [p.result() for p in pending] == at_once
    assert at_once[0].loss > at_once[2].loss


def test_exported_arrays_do_not_follow_the_training(backend: Any, pretrain_spec: PretrainSpec) -> None:
    engine = make(backend, pretrain_spec, optimizer=OptimizerSettings(ema_decay=0.9))
    state = engine.export_state()
    kept = {name: array.copy() for name, array in arrays_of(state).items()}
    engine.train_step([batch(pretrain_spec)], step=1, lr=1e-2)
    after = arrays_of(engine.export_state())
    for name, array in arrays_of(state).items():
        np.testing.assert_array_equal(array, kept[name])
    fixed = {name for name in kept if np.array_equal(kept[name], after[name])}
    assert fixed == {"parameters pos_embed", "parameters decoder_pos_embed"}


def test_bfloat16_products_keep_float32_master_weights(backend: Any, pretrain_spec: PretrainSpec) -> None:
    low, exact = (make(backend, pretrain_spec, precision=p) for p in (Precision.BFLOAT16, Precision.FLOAT32))
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


# its state


class ReadOnce(Mapping[str, np.ndarray]):
    """Arrays as in a checkpoint file: shapes are known without reading. Counts the reads of each."""

    def __init__(self, arrays: dict[str, np.ndarray], reads: Counter[str]) -> None:
        self.tensors, self._reads = arrays, reads

    def __getitem__(self, name: str) -> np.ndarray:
        self._reads[name] += 1
        return self.tensors[name].copy()

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


def test_a_state_is_resumed_by_reading_each_array_once(backend: Any, classifier_spec: ClassifierSpec) -> None:
    settings = OptimizerSettings(ema_decay=0.9)
    trained = make(backend, classifier_spec, optimizer=settings)
    trained.train_step([batch(classifier_spec)], step=1, lr=1e-2)
    state = trained.export_state()
    kinds = [field.name for field in dataclasses.fields(state)]
    reads: dict[str, Counter[str]] = {kind: Counter() for kind in kinds}
    stored = TrainingState(**{kind: ReadOnce(getattr(state, kind), reads[kind]) for kind in kinds})
    resumed = backend.create_engine(classifier_spec, stored, optimizer=settings)
    assert reads == {kind: Counter(list(getattr(state, kind))) for kind in kinds}
    assert_equal(resumed.export_state(), state)


def test_an_engine_without_an_optimizer_holds_the_parameters_only(
    backend: Any, classifier_spec: ClassifierSpec
) -> None:
    state = make(backend, classifier_spec, optimizer=OptimizerSettings(ema_decay=0.9)).export_state()
    bytes_of_parameters = sum(array.nbytes for array in state.parameters.values())
    before = allocated_bytes(backend)
    engine = backend.create_engine(classifier_spec, state)
    assert_equal(engine.export_state(), TrainingState(parameters=state.parameters))
    assert allocated_bytes(backend) - before < 1.2 * bytes_of_parameters
    training = make(backend, classifier_spec)
    training.export_state()  # MLX allocates at the first use
    assert allocated_bytes(backend) - before > 3.5 * bytes_of_parameters
    del training
    data = batch(classifier_spec)
    assert np.isfinite(engine.forward(data.images)["logits"]).all()
    assert np.isfinite(engine.loss_and_gradients(data)[0])
    with pytest.raises(ValueError, match="for inference; pass optimizer to create_engine to train"):
        engine.train_step([data], step=1, lr=1e-3)


def allocated_bytes(backend: Any) -> int:
    """Bytes of all arrays that the framework holds."""
    gc.collect()
    if backend.name == "mlx":
        import mlx.core as mx

        mx.synchronize()  # earlier tests may have left work
        return int(mx.get_active_memory())
    import torch

    # Not the fake tensors of an exported program, which have no memory.
    tensors = [found for found in gc.get_objects() if type(found) in (torch.Tensor, torch.nn.Parameter)]
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if not t.is_meta
    }
    return sum(storages.values())


def test_a_state_of_another_model_is_refused_with_the_names_that_differ(
    backend: Any, pretrain_spec: PretrainSpec, classifier_spec: ClassifierSpec
) -> None:
    engine = make(backend, pretrain_spec)
    state = engine.export_state()
    with pytest.raises(ValueError, match=r"^parameters: missing tap_norms\.0\.weight \(32,\); "):
        engine.load_state(make(backend, classifier_spec).export_state())
    with pytest.raises(ValueError, match=r"^exp_avg: expected the trainable .*; differs in query_token$"):
        engine.load_state(
            dataclasses.replace(state, exp_avg={n: a for n, a in state.exp_avg.items() if n != "query_token"})
        )
    wrong = {**state.exp_avg_sq, "query_token": np.zeros(3, np.float32)}
    with pytest.raises(ValueError, match=r"^exp_avg_sq: .*; differs in query_token$"):
        engine.load_state(dataclasses.replace(state, exp_avg_sq=wrong))
