"""Quantized classifiers in MLX's format: MLX runs them directly, every other engine as float32."""

from __future__ import annotations

import json

import foreign
import numpy as np
import pytest
from converting import arm
from PIL import Image

from arm_convert.quantize import quantize_model
from arm_core.engine.protocol import Batch, TrainingState
from arm_core.engine.registry import installed_backends
from arm_core.files.errors import BadFileError
from arm_core.files.model_folder import read_model, write_model
from arm_core.files.quantized import Quantized, QuantizedTensor, quantize
from arm_core.files.safetensors import as_tensors, read_tensors, write_tensors
from arm_core.model.parameters import initial_parameters
from arm_core.model.reference.model import forward
from arm_core.model.spec import ClassifierSpec, EncoderSpec

SPEC = ClassifierSpec(encoder=EncoderSpec(width=32, depth=2, patch=4), classes=10, image_size=(24, 24))
ENGINES = [name for name in ("torch", "mlx") if installed_backends()[name].missing() is None]


def strange(seed=0):
    rng = np.random.default_rng(seed)
    made = initial_parameters(SPEC, seed)
    return {name: a + rng.normal(size=a.shape).astype(np.float32) / 9 for name, a in made.items()}


@pytest.fixture
def model(tmp_path):
    return write_model(tmp_path / "m", SPEC, strange(), metadata={"classes": json.dumps(list("0123456789"))})


@pytest.fixture
def quantized(model, tmp_path):
    result = arm(
        "convert", "quantize", model, tmp_path / "q", "--bits", 8, "--group-size", 32, "--device", "cpu"
    )
    assert result.exit_code == 0, result.output
    return tmp_path / "q"


def matrix(seed=0):
    values = np.random.default_rng(seed).normal(size=(12, 256)).astype(np.float32)
    values[0], values[1], values[2] = 0, 0.3, -0.7
    return values


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("bits", [4, 8])
def test_rounding_errors_are_at_most_one_step_and_zero_for_the_largest_value(bits, group_size):
    values = matrix()
    made = quantize(values, bits, group_size)
    assert (made.shape, made.group_size) == (values.shape, group_size)
    groups, found = (x.reshape(12, -1, group_size) for x in (values, np.asarray(made)))
    step = np.abs(made.scales)[..., None]
    assert (np.abs(groups - found) <= 1.0001 * step).all()
    place = np.abs(groups).argmax(-1)[..., None]
    largest = np.take_along_axis(groups, place, -1)
    assert np.allclose(np.take_along_axis(found, place, -1), largest, rtol=1e-6)


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("bits", [4, 8])
def test_the_parts_are_those_that_mlx_writes_and_reads(bits, group_size):
    mx = pytest.importorskip("mlx.core")
    values = matrix(1)
    ours = quantize(values, bits, group_size)
    theirs = mx.quantize(mx.array(values), group_size=group_size, bits=bits)
    for mine, part in zip((ours.packed, ours.scales, ours.biases), theirs, strict=True):
        assert np.array_equal(mine, np.array(part))
    restored = mx.dequantize(*theirs, group_size=group_size, bits=bits)
    assert np.allclose(np.array(restored), np.asarray(ours), atol=1e-6)


def test_a_quantized_model_reads_back_with_the_stored_values(tmp_path):
    tensors, done = quantize_model(SPEC, as_tensors(strange()), bits=4, group_size=32)
    assert len(done) == 2 * 4  # in_proj, out_proj, w1, w2: w3 has rows of 85
    write_model(tmp_path / "q", SPEC, tensors, metadata={"k": "v"}, shard_size=20_000)
    model = read_model(tmp_path / "q")
    assert model.metadata == {"k": "v"}
    loaded = model.load()
    assert {name for name, value in loaded.items() if isinstance(value, Quantized)} == set(done)
    for name, tensor in tensors.items():
        assert np.array_equal(np.asarray(loaded[name]), tensor.read()), name
        assert isinstance(model.arrays[name], QuantizedTensor) == (name in done)


def test_the_command_reports_size_and_change(model, tmp_path):
    words = ("convert", "quantize", model)
    noise = arm(*words, tmp_path / "a", "--bits", "4", "--group-size", "32", "--device", "cpu")
    assert "8 of 46 tensors quantized" in noise.output
    assert "on 8 images of noise: logits change by" in noise.output
    assert (tmp_path / "a/model.safetensors").stat().st_size < (model / "model.safetensors").stat().st_size
    digits = arm(
        *words, tmp_path / "b", "--bits", "8", "--group-size", "32", "--device", "cpu", "--data", "digits"
    )
    assert "top-1 accuracy on digits: " in digits.output
    assert "quantized to 8 bits in groups of 32" in (tmp_path / "b/README.md").read_text()


@pytest.mark.parametrize("backend", ENGINES)
def test_every_engine_computes_the_results_of_the_reference_on_the_rounded_values(quantized, backend):
    model = read_model(quantized)
    images = np.random.default_rng(0).normal(size=(2, 24, 24, 3)).astype(np.float32)
    engine = installed_backends()[backend].create_engine(SPEC, TrainingState(parameters=model.load()))
    rounded = {name: np.asarray(value) for name, value in model.load().items()}
    expected = forward(SPEC, rounded, images)["logits"]
    assert np.abs(engine.forward(images)["logits"] - expected).max() < 1e-4 * np.abs(expected).max()
    assert np.abs(forward(SPEC, strange(), images)["logits"] - expected).max() > 1e-3 * np.abs(expected).max()


def test_mlx_multiplies_the_packed_matrices_and_refuses_to_train_them(quantized, monkeypatch):
    mx = pytest.importorskip("mlx.core")
    calls = []
    real = mx.quantized_matmul
    monkeypatch.setattr(mx, "quantized_matmul", lambda *a, **k: calls.append(k["bits"]) or real(*a, **k))
    state = TrainingState(parameters=read_model(quantized).load())
    engine = installed_backends()["mlx"].create_engine(SPEC, state)
    images = np.zeros((1, 24, 24, 3), np.float32)
    engine.forward(images)
    assert calls == [8] * 8
    batch = Batch(images=images, targets=np.eye(10, dtype=np.float32)[:1])
    for attempt in (
        lambda: engine.loss_and_gradients(batch),
        lambda: engine.train_step([batch], step=1, lr=0.1),
        engine.export_state,
    ):
        with pytest.raises(ValueError, match="a quantized model cannot be trained"):
            attempt()


@pytest.mark.parametrize("backend", ENGINES)
def test_predict_and_evaluate_run_a_quantized_classifier(quantized, tmp_path, backend):
    Image.fromarray(np.full((24, 24, 3), 99, np.uint8)).save(tmp_path / "x.png")
    predicted = arm(
        "predict", tmp_path / "x.png", "--model", quantized, "--backend", backend, "--device", "cpu"
    )
    assert predicted.exit_code == 0, predicted.output
    measured = arm(
        "evaluate", quantized, "--data", "digits", "--backend", backend, "--device", "cpu", "--json"
    )
    assert measured.exit_code == 0, measured.output
    assert 0 <= json.loads(measured.stdout)["top1"] <= 1


def test_other_conversions_take_the_rounded_values(quantized, tmp_path):
    result = arm("convert", "import", quantized, tmp_path / "f")
    assert "8 quantized matrices: read as float32 values" in result.output
    assert arm("convert", "diff", quantized, tmp_path / "f").exit_code == 0
    plain = read_model(tmp_path / "f")
    assert not any(isinstance(tensor, QuantizedTensor) for tensor in plain.arrays.values())
    assert arm("convert", "export", quantized, tmp_path / "x.pth", "--to", "official").exit_code == 0


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (foreign.PRETRAIN, "only classifiers can be quantized"),
        (foreign.CLASSIFIER, "choose a smaller --group-size"),
    ],
)
def test_models_that_cannot_be_quantized_are_refused_in_one_line(tmp_path, spec, message):
    folder = write_model(tmp_path / "m", spec, initial_parameters(spec, 0))
    result = arm("convert", "quantize", folder, tmp_path / "q")
    assert result.exit_code == 2
    assert message in result.output
    assert not (tmp_path / "q").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t, m: t.pop("layers.0.mlp.w1.scales"),
            "layers.0.mlp.w1.weight: quantized, but scales or biases are missing",
        ),
        (lambda t, m: m.update(quantization="affine, 3 bits"), "unknown quantization 'affine, 3 bits'"),
        (lambda t, m: m.pop("quantization"), "unexpected layers.0.mixer.in_proj"),
        (lambda t, m: m.update(quantization="affine, 4 bits"), "expected a matrix of 4 bits|expected"),
        (
            lambda t, m: t.update({"layers.0.mlp.w1.biases": np.zeros((85, 3), np.float32)}),
            "expected a matrix of 8 bits",
        ),
    ],
    ids=["no scales", "unknown", "undeclared", "other bits", "misshaped"],
)
def test_a_corrupt_quantized_file_is_refused(quantized, change, message):
    file = read_tensors(quantized / "model.safetensors")
    tensors, metadata = dict(file.tensors), dict(file.metadata)
    tensors = {name: tensor.bits() for name, tensor in tensors.items()}
    change(tensors, metadata)
    write_tensors(quantized / "model.safetensors", tensors, metadata)
    with pytest.raises((BadFileError, ValueError), match=message):
        read_model(quantized)
