"""The examples in docs/export.md run as written."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from converting import arm
from PIL import Image

from arm_cli.export import export
from arm_core.files.model_folder import write_model
from arm_core.files.safetensors import as_tensors
from arm_core.model.parameters import initial_parameters
from arm_core.model.spec import ClassifierSpec, EncoderSpec

pytest.importorskip("onnx", reason="needs onnx, of the extra 'onnx'")
pytest.importorskip("onnxruntime", reason="needs onnxruntime, of the extra 'onnx'")

TEXT = (Path(__file__).parents[2] / "docs/export.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    spec = ClassifierSpec(encoder=EncoderSpec(width=16, depth=1, patch=56), classes=3)
    tensors = as_tensors(initial_parameters(spec, 0))
    write_model(tmp_path / "MODEL", spec, tensors, metadata={"classes": json.dumps(["a", "b", "c"])})
    pixels = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.jpg")
    monkeypatch.chdir(tmp_path)


def test_the_onnx_example_names_a_class(folder, capsys):
    assert arm("export", "MODEL", "model.onnx", "--preprocess", "--no-check").exit_code == 0
    exec(EXAMPLES[0], {})
    assert capsys.readouterr().out.strip() in ("a", "b", "c")


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # torch's own
def test_the_torch_example_gives_logits(folder):
    pytest.importorskip("torch", reason="needs torch")
    assert arm("export", "MODEL", "model.pt2", "--no-check").exit_code == 0
    given: dict = {}
    exec(EXAMPLES[1], given)
    assert given["logits"].shape == (1, 3)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # torch's own
@pytest.mark.parametrize(
    ("number", "words"),
    [
        pytest.param(2, ("compiled.pt2", "--compile"), marks=[needs_compiler, pytest.mark.slow]),
        (3, ("fast.pt2", "--scan", "cpu")),
    ],
)
def test_the_other_torch_examples_give_logits(folder, number, words):
    pytest.importorskip("torch", reason="needs torch")
    assert arm("export", "MODEL", *words, "--no-check").exit_code == 0
    given: dict = {}
    exec(EXAMPLES[number], given)
    assert given["logits"].shape == (1, 3)


def test_every_option_that_the_page_names_exists():
    known = {word for option in export.params for word in option.opts}
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", TEXT))
    assert named <= known | {"--browser"}
