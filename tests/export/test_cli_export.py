"""`arm export`: files, comparisons, and refusals."""

import json

import numpy as np
import pytest
from converting import arm
from PIL import Image

from arm_core.files.model_folder import write_model
from arm_core.files.safetensors import as_tensors
from arm_core.model.parameters import initial_parameters

onnx = pytest.importorskip("onnx", reason="needs onnx, of the extra 'onnx'")
pytest.importorskip("onnxruntime", reason="needs onnxruntime, of the extra 'onnx'")
pytest.importorskip("torch", reason="needs an engine to compare with")

THREADS = ("--threads", 1, "--backend", "torch")


def folder(path, spec, seed=0, **metadata):
    return write_model(path, spec, as_tensors(initial_parameters(spec, seed)), metadata=metadata)


@pytest.fixture
def model(tmp_path, classifier_spec):
    names = json.dumps([f"kind {i}" for i in range(10)])
    return folder(tmp_path / "model", classifier_spec, classes=names)


def test_a_file_is_written_and_compared_with_the_model(tmp_path, model):
    out = tmp_path / "model.onnx"
    result = arm("export", model, out, *THREADS, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    found = report["comparison"]
    assert found["differences"]["logits"] < 1e-5
    assert (found["same_answers"], found["within"], found["images"]) == (1.0, True, 4)
    assert min(found["latency"]) > 0
    assert report["opset"] == 18
    strings = {prop.key: prop.value for prop in onnx.load(out).metadata_props}
    assert json.loads(strings["classes"])[3] == "kind 3"
    result = arm("export", "--check", out, model, *THREADS)
    assert result.exit_code == 0
    assert "logits: largest difference" in result.stdout
    assert "same answer: 100.0 % of 4 noise images" in result.stdout
    assert "latency of one image: file" in result.stdout


def test_labelled_images_give_the_accuracy_of_both(tmp_path, model):
    for i in range(10):
        (tmp_path / f"data/kind {i}").mkdir(parents=True)
        pixels = np.random.default_rng(i).integers(0, 256, (40, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"data/kind {i}/a.png")
    options = ("--preprocess", "--dynamic-batch", "--data", tmp_path / "data")
    result = arm("export", model, tmp_path / "model.onnx", *options, *THREADS, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)["comparison"]
    assert found["images"] == 10
    assert found["accuracy"][0] == found["accuracy"][1]
    assert found["differences"]["logits"] < 1e-3
    few = arm("export", "--check", tmp_path / "model.onnx", model, *options[2:], "--limit", 3, *THREADS)
    assert "100.0 % of 3 images" in few.stdout


def test_a_file_of_other_weights_is_beyond_the_tolerance(tmp_path, model, classifier_spec):
    arm("export", model, tmp_path / "model.onnx", "--no-check")
    other = folder(tmp_path / "other", classifier_spec, seed=1)
    result = arm("export", "--check", tmp_path / "model.onnx", other, *THREADS)
    assert result.exit_code == 1
    assert "the differences exceed the tolerance for float32" in result.stdout


def test_a_file_of_another_spec_is_refused(tmp_path, model, pretrain_spec):
    arm("export", model, tmp_path / "model.onnx", "--no-check")
    other = folder(tmp_path / "other", pretrain_spec)
    result = arm("export", "--check", tmp_path / "model.onnx", other, *THREADS)
    assert result.exit_code == 2
    assert "exported from another model; they differ in kind, " in result.output


def test_an_existing_file_is_only_replaced_with_force(tmp_path, model):
    out = tmp_path / "model.onnx"
    out.write_text("mine")
    result = arm("export", model, out)
    assert result.exit_code == 2
    assert "already exists" in result.output
    assert out.read_text() == "mine"
    assert arm("export", model, out, "--force", "--no-check").exit_code == 0
    assert out.stat().st_size > 1000


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["MODEL"], "expected OUT, a file to write"),
        (["MODEL", "model.txt"], "model.txt: expected a name that ends in .onnx, .html, .pt2, .mlpackage"),
        (["MODEL", "a.onnx", "--browser", "b.html"], "pass either OUT or --browser"),
        (["MODEL", "a.onnx", "--check", "b.onnx"], "drop OUT"),
        (["MODEL", "a.onnx", "--opset", "5"], "opset: expected 18 to 23, found 5"),
        (["MODEL", "a.onnx", "--quantize", "int8", "--precision", "float16"], "starts from float32"),
        (["MODEL", "--check", "missing.onnx"], "missing.onnx: no such file"),
        (["MODEL", "--check", "page.html"], "expected an .onnx or .pt2 file"),
        (["MODEL", "a.mlpackage"], "Core ML"),
        (["MODEL", "a.pt2", "--quantize", "int8"], "--quantize is for ONNX files"),
        (["MODEL", "a.pt2", "--precision", "float16"], "--precision float16 is for ONNX files"),
        (["MODEL", "a.onnx", "--compile"], "--compile and --scan are for .pt2 files, found a.onnx"),
        (["MODEL", "a.onnx", "--scan", "cpu"], "--compile and --scan are for .pt2 files"),
        (["MODEL", "--check", "missing.pt2"], "missing.pt2: no such file"),
    ],
)
def test_mistakes_get_one_line(tmp_path, monkeypatch, model, words, sentence):
    monkeypatch.chdir(tmp_path)
    result = arm("export", *[str(model) if word == "MODEL" else word for word in words])
    assert result.exit_code == 2
    assert sentence in result.output
    assert len(result.output.strip().splitlines()) == 1
    assert not (tmp_path / "a.onnx").exists()


def test_a_missing_extra_is_named(tmp_path, monkeypatch, model):
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnx" else found(name))
    result = arm("export", model, tmp_path / "model.onnx")
    assert result.exit_code == 2
    assert "ONNX files need onnx, which is not installed" in result.output
    assert "pip install 'arm-vision[onnx]'" in result.output
