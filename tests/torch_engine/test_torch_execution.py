"""Compiled blocks, recomputed blocks, out of memory: the same numbers, or one clear sentence."""

import os
import shutil
from dataclasses import replace

import numpy as np
import pytest

from arm_core.engine.optimizer import OptimizerSettings
from arm_core.engine.protocol import Batch, Compile, EngineOptions, OutOfMemory, TrainingState
from arm_core.model.cost import step_memory
from arm_core.model.parameters import initial_parameters
from arm_core.model.spec import EncoderSpec, PretrainSpec

torch = pytest.importorskip("torch")

from arm_cuda.engine import TorchEngine  # noqa: E402
from arm_cuda.execution import choose_compile  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_torch_thread")

SMALL = PretrainSpec(
    encoder=EncoderSpec(width=16, depth=6, patch=4),
    image_size=(12, 12),
    cluster=(1, 1),
    decoder_width=16,
    decoder_depth=2,
    decoder_heads=1,
)
"""8 tokens: the compiler unrolls the reference scan."""
SETTINGS = OptimizerSettings(clip=1.0, ema_decay=0.9)


def make(spec=SMALL, **options) -> TorchEngine:
    options = EngineOptions(**{"device": "cpu", "threads": 1, **options})
    state = TrainingState(parameters=initial_parameters(spec, 0))
    return TorchEngine(spec, state, optimizer=SETTINGS, options=options)


def batch(spec=SMALL, images=2) -> Batch:
    draws = np.random.default_rng(3)
    scale = draws.integers(0, 2, (spec.encoder.depth, 2, images)).astype(np.float32) * 2
    pixels = draws.standard_normal((images, *spec.image_size, 3)).astype(np.float32)
    return Batch(images=pixels, drop_path_scale=scale)


def assert_same_gradients(found, expected, tolerance):
    assert found[0] == pytest.approx(expected[0], rel=1e-6)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        np.testing.assert_allclose(found[1][name], gradient, rtol=tolerance, atol=tolerance, err_msg=name)


def test_recomputed_blocks_give_the_same_bits_and_keep_less(pretrain_spec):
    """Includes drop path, whose factors are inputs."""
    plain, twice = make(pretrain_spec), make(pretrain_spec, recompute=True)
    data = batch(pretrain_spec, 3)
    assert_same_gradients(twice.loss_and_gradients(data), plain.loss_and_gradients(data), 0.0)

    def kept(engine):
        sizes: dict[int, int] = {}

        def pack(tensor):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss = engine._loss(data)
        assert loss.requires_grad
        return sum(sizes.values())

    assert kept(twice) < 0.7 * kept(plain)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's compiler warns about itself
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++, with which torch compiles for a CPU")
@pytest.mark.parametrize("recompute", [False, True])
def test_compiled_blocks_give_the_same_gradients(recompute):
    plain = make(scan="reference")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = make(scan="reference", compile=Compile.BLOCKS, recompute=recompute)
    assert_same_gradients(compiled.loss_and_gradients(batch()), plain.loss_and_gradients(batch()), 2e-5)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    # One for the encoder, two for the decoder, whose first block gets an expanded tensor.
    assert graphs == 3


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's compiler warns about itself
@pytest.mark.skipif("ARM_LONG_TESTS" not in os.environ, reason="compiles for a minute: set ARM_LONG_TESTS=1")
def test_a_compiled_model_trains_like_an_uncompiled_one():
    plain, compiled = make(scan="reference"), make(scan="reference", compile=Compile.MODEL)
    for step in (1, 2):
        results = [engine.train_step([batch()], step=step, lr=1e-3).result() for engine in (plain, compiled)]
        assert results[1].loss == pytest.approx(results[0].loss, rel=1e-5)
        assert results[1].grad_norm == pytest.approx(results[0].grad_norm, rel=1e-4)
    # Another batch size is not compiled again: passes without gradients are not compiled.
    images = batch(images=5).images
    np.testing.assert_allclose(compiled.forward(images)["loss"], plain.forward(images)["loss"], rtol=1e-4)


@pytest.mark.parametrize(
    ("device", "scan", "expected"),
    [
        ("cuda", "triton", Compile.BLOCKS),
        ("cuda:1", "triton", Compile.BLOCKS),
        ("cuda", "reference", Compile.NONE),
        ("cuda", "mamba-ssm", Compile.NONE),
        ("cpu", "cpu", Compile.NONE),
        ("cpu", "reference", Compile.NONE),
    ],
)
def test_auto_compiles_the_blocks_with_the_triton_scan(device, scan, expected):
    assert choose_compile(EngineOptions(), scan, torch.device(device)) is expected
    none = EngineOptions(compile=Compile.NONE)
    assert choose_compile(none, scan, torch.device(device)) is Compile.NONE


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"compile": Compile.BLOCKS, "scan": "cpu"}, "scan 'cpu' cannot be compiled"),
        ({"compile": Compile.MODEL, "scan": "reference", "recompute": True}, "use --compile blocks"),
        ({"shard": True}, "--shard needs several processes; start them with torchrun"),
    ],
)
def test_incompatible_options_are_refused_in_one_sentence(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        make(**options)


def test_an_average_is_swapped_with_the_weights_and_back():
    engine = make()
    engine.train_step([batch()], step=1, lr=1e-2).result()
    before = engine.export_state()
    engine.swap_ema()
    between = engine.export_state()
    engine.swap_ema()
    after = engine.export_state()
    for name, average in before.ema.items():
        np.testing.assert_array_equal(between.parameters[name], average)
        np.testing.assert_array_equal(between.ema[name], before.parameters[name])
        np.testing.assert_array_equal(after.parameters[name], before.parameters[name])


def test_the_out_of_memory_message_says_what_fits_and_the_state_is_kept(monkeypatch):
    engine = make()
    before = engine.export_state()
    monkeypatch.setattr(engine, "_available", int(engine._memory.total(1) / 0.9) + 1)

    def exhausted(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(engine, "_forward", exhausted)
    with pytest.raises(
        OutOfMemory, match=r"with 2 images of 12x12 at a time; by the cost model about 1 fit$"
    ):
        engine.train_step([batch()], step=1, lr=1e-3)
    monkeypatch.setattr(engine, "_model", exhausted)
    with pytest.raises(ValueError, match="choose a smaller batch"):
        engine.forward(batch().images)
    monkeypatch.undo()
    after = engine.export_state()
    for name, value in before.parameters.items():
        np.testing.assert_array_equal(after.parameters[name], value)
    assert engine.train_step([batch()], step=1, lr=1e-3).result().finite


def test_the_modelled_memory_decreases_with_shards_and_recomputation(pretrain_spec):
    whole = step_memory(pretrain_spec, average=True)
    assert step_memory(pretrain_spec, average=True, shards=8).state == whole.state // 8
    assert step_memory(pretrain_spec, value_bytes=2).per_image == whole.per_image // 2
    lean = step_memory(pretrain_spec, recompute=True)
    assert lean.per_image + lean.passing < whole.per_image
    deeper = replace(pretrain_spec, encoder=replace(pretrain_spec.encoder, depth=24))
    assert step_memory(deeper).per_image > whole.per_image
    assert whole.fitting(int(whole.total(10) / 0.9) + 1) == 10
    assert whole.fitting(whole.state) == 0


@pytest.mark.gpu
def test_a_full_gpu_is_reported_and_the_next_step_runs():
    engine = make(device="cuda")
    torch.cuda.set_per_process_memory_fraction(0.002)
    try:
        with pytest.raises(OutOfMemory, match="out of memory"):
            engine.train_step([batch(images=200_000)], step=1, lr=1e-3)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert engine.train_step([batch()], step=1, lr=1e-3).result().finite


@pytest.mark.gpu
def test_a_step_on_a_gpu_never_waits_for_it():
    engine = make(device="cuda")
    engine.train_step([batch()], step=1, lr=1e-3).result()
    torch.cuda.set_sync_debug_mode("error")
    try:
        pending = engine.train_step([batch(), batch()], step=2, lr=1e-3)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert pending.result().finite
