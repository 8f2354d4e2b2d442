"""Programs of torch.export against the float64 reference, loaded with and without this package."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from converting import arm
from test_onnx import FLOAT32, TINY, difference, noisy_parameters, normal_images

from arm_core.files.model_folder import write_model
from arm_core.files.safetensors import as_tensors
from arm_core.model.reference.model import forward
from arm_core.model.spec import DIRECTIONS, ClassifierSpec, EncoderSpec

torch = pytest.importorskip("torch", reason="needs torch")

from torch._inductor.exc import InvalidCxxCompiler  # noqa: E402

from arm_cuda.program import write_program  # noqa: E402
from arm_cuda.program_file import ProgramFile  # noqa: E402
from arm_cuda.scan import IMPLEMENTATIONS  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("one_torch_thread"),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),  # torch's own
]


def classifier(**fields):
    """Two blocks: tracing takes seconds for each."""
    return ClassifierSpec(encoder=replace(TINY, depth=2), classes=7, **fields)


@pytest.mark.parametrize(("directions", "size"), [(4, (12, 20)), (1, (24, 24))], ids=str)
def test_a_program_computes_the_reference(tmp_path, directions, size):
    spec = classifier(image_size=size, scan_directions=DIRECTIONS[directions])
    parameters, images = noisy_parameters(spec), normal_images(spec, 3)
    nodes = write_program(spec, parameters, tmp_path / "model.pt2", dynamic_batch=True)
    assert nodes < 250 * spec.encoder.depth  # not a node for each token
    file = ProgramFile(tmp_path / "model.pt2")
    expected = forward(spec, parameters, images)["logits"]
    assert difference(file.run(images)["logits"], expected) < FLOAT32
    assert difference(file.run(images[:1])["logits"], expected[:1]) < FLOAT32
    assert "portable" not in IMPLEMENTATIONS


def test_a_pretraining_program_gives_what_the_decoder_reads(tmp_path, pretrain_spec):
    parameters, images = noisy_parameters(pretrain_spec), normal_images(pretrain_spec, 1)
    with pytest.raises(ValueError, match="pass --features"):
        write_program(pretrain_spec, parameters, tmp_path / "model.pt2")
    write_program(pretrain_spec, parameters, tmp_path / "model.pt2", features=True)
    found = ProgramFile(tmp_path / "model.pt2").run(images)["decoder_input"]
    assert difference(found, forward(pretrain_spec, parameters, images)["decoder_input"]) < FLOAT32


def test_the_command_writes_a_program_and_compares_it(tmp_path):
    spec, out = classifier(image_size=(24, 24)), tmp_path / "model.pt2"
    write_model(tmp_path / "model", spec, as_tensors(noisy_parameters(spec)), metadata={})
    result = arm("export", tmp_path / "model", out, "--backend", "torch", "--threads", 1, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["comparison"]["differences"]["logits"] < FLOAT32
    result = arm("export", "--check", out, tmp_path / "model", "--backend", "torch", "--threads", 1)
    assert (result.exit_code, "same answer: 100.0 %" in result.stdout) == (0, True)
    result = arm("export", tmp_path / "model", out)
    assert (result.exit_code, "already exists" in result.output) == (2, True)


def test_a_program_loads_where_only_torch_is_imported(tmp_path, fresh_python):
    spec = classifier(image_size=(24, 24))
    parameters, images = noisy_parameters(spec), normal_images(spec, 1)
    write_program(spec, parameters, tmp_path / "model.pt2", features=True)
    np.save(tmp_path / "images.npy", images.transpose(0, 3, 1, 2))
    out = fresh_python(
        f"import sys, warnings; warnings.simplefilter('ignore'); import numpy as np, torch\n"
        f"module = torch.export.load({str(tmp_path / 'model.pt2')!r}).module()\n"
        f"(features,) = module(torch.from_numpy(np.load({str(tmp_path / 'images.npy')!r}).copy()))\n"
        f"np.save({str(tmp_path / 'features.npy')!r}, features.detach().numpy())\n"
        "print([name for name in sys.modules if name.startswith('arm_')])"
    )
    assert out.strip() == "[]"
    expected = forward(spec, parameters, images)["features"]
    assert difference(np.load(tmp_path / "features.npy"), expected) < FLOAT32


def test_a_program_of_registered_operators_needs_them_and_computes_the_reference(tmp_path, fresh_python):
    spec, out = classifier(image_size=(24, 24)), tmp_path / "model.pt2"
    parameters, images = noisy_parameters(spec), normal_images(spec, 3)
    assert write_program(spec, parameters, out, dynamic_batch=True, scan="cpu") < 250
    found = ProgramFile(out).run(images)["logits"]
    assert difference(found, forward(spec, parameters, images)["logits"]) < FLOAT32
    assert "arm_cuda.cpu_scan" in str(torch.export.load(out).graph)
    code = f"import torch; torch.export.load({str(out)!r})"
    failed = fresh_python(f"try:\n    {code}\nexcept Exception as error:\n    print(error)")
    assert "error when deserializing" in failed
    assert fresh_python(f"import arm_cuda.cpu_operators; {code}; print('loaded')").strip() == "loaded"
    with pytest.raises(ValueError, match="scan of a program: expected portable or cpu, found 'triton'"):
        write_program(spec, parameters, out, scan="triton", force=True)


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_a_compiled_program_computes_the_reference_where_only_torch_is_imported(tmp_path, fresh_python):
    encoder = EncoderSpec(width=16, depth=1, patch=8)
    spec, out = ClassifierSpec(encoder=encoder, classes=3, image_size=(24, 24)), tmp_path / "model.pt2"
    write_model(tmp_path / "model", spec, as_tensors(noisy_parameters(spec)), metadata={})
    options = ("--backend", "torch", "--threads", 1)
    result = arm("export", tmp_path / "model", out, "--compile", *options, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["comparison"]["differences"]["logits"] < FLOAT32
    assert arm("export", "--check", out, tmp_path / "model", *options).exit_code == 0
    done = fresh_python(
        f"import sys, torch\nmodule = torch._inductor.aoti_load_package({str(out)!r})\n"
        "print(module(torch.zeros(1, 3, 24, 24))[0].shape, [n for n in sys.modules if n.startswith('arm_')])"
    )
    assert done.strip() == "torch.Size([1, 3]) []"
    content = out.read_bytes()
    out.write_bytes(content.replace(b"aotinductor/model", b"aotinductor/x1234"))
    with pytest.raises(ValueError, match="AOTInductor cannot load this file"):
        ProgramFile(out)


def test_a_missing_compiler_is_named(tmp_path, monkeypatch):
    from torch._inductor import cpp_builder

    def fail():
        raise InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", fail)
    encoder = EncoderSpec(width=16, depth=1, patch=8)
    spec = ClassifierSpec(encoder=encoder, classes=3, image_size=(24, 24))
    with pytest.raises(ValueError, match=r"needs a C\+\+ compiler and found none"):
        write_program(spec, noisy_parameters(spec), tmp_path / "model.pt2", compiled=True)
    assert not (tmp_path / "model.pt2").exists()


def test_a_file_that_is_no_program_is_refused_by_name(tmp_path):
    (tmp_path / "model.pt2").write_bytes(b"no model")
    with pytest.raises(ValueError, match=r"model\.pt2: torch\.export cannot load this file"):
        ProgramFile(tmp_path / "model.pt2")
