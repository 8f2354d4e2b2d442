"""Mistakes in importing and exporting: one line, exit code 2, nothing left behind; `arm convert inspect`."""

from __future__ import annotations

import errno
import json
import os
import pickle
import re
import signal
import subprocess
import sys
from pathlib import Path

import foreign
import numpy as np
import pytest
from converting import convert, model_folder, names, official_checkpoint

from arm_convert import torch_writer
from arm_convert.checkpoint_source import open_checkpoint_source
from arm_convert.export import Format, export_model
from arm_convert.importing import resolve
from arm_core.engine.protocol import TrainingState
from arm_core.files import safetensors
from arm_core.files.errors import BadFileError
from arm_core.files.model_folder import read_model
from arm_core.files.safetensors import read_tensors, write_tensors
from arm_core.model.parameters import initial_parameters
from arm_core.training.checkpoint import Checkpoint, Progress, save_checkpoint
from arm_core.training.model_source import Weights


@pytest.fixture
def official(tmp_path):
    return official_checkpoint(tmp_path)


def refused(tmp_path: Path, result, *parts: str) -> None:
    assert result.exit_code == 2, result.output
    lines = [line for line in result.output.splitlines() if line.strip()]
    assert len(lines) == 1, result.output
    for part in parts:
        assert re.search(part, lines[0]), lines[0]
    assert not [name for name in names(tmp_path) if name.startswith(("m", ".m"))]


def test_nan_weights_are_refused_by_name_or_reported(tmp_path):
    content = foreign.checkpoint(foreign.CLASSIFIER, global_pool=True)
    content["model"]["layers.2.mlp.w1.bias"][1] = np.nan
    content["model"]["head.bias"][0] = np.inf
    path = foreign.save(tmp_path / "x.pth", foreign.torch_zip(content))
    words = "import", path, tmp_path / "m"
    refused(tmp_path, convert(*words), r"layers.2.mlp.w1.bias: 1 of 21 values are NaN")
    result = convert(*words, "--allow-nonfinite")
    assert result.exit_code == 0
    assert "warning: " in result.output
    assert "head.bias: 1 of 3 values are NaN or infinite" in result.output


def test_large_finite_weights_are_not_reported_as_infinite(tmp_path):
    content = foreign.checkpoint(foreign.CLASSIFIER, global_pool=True)
    content["model"]["head.bias"][:] = 3e38
    path = foreign.save(tmp_path / "x.pth", foreign.torch_zip(content))
    assert convert("import", path, tmp_path / "m").exit_code == 0


def test_another_architecture_is_refused_with_the_key_that_identified_it(tmp_path):
    state = {
        "cls_token": np.zeros((1, 1, 8), np.float32),
        "blocks.0.attn.qkv.weight": np.zeros((3, 3), np.float32),
    }
    path = foreign.save(tmp_path / "x.pth", foreign.torch_zip({"model": state}))
    result = convert("import", path, tmp_path / "m")
    refused(tmp_path, result, r"x\.pth: .*a Vision Transformer: it has blocks\.0\.attn\.qkv\.weight")


def test_a_missing_tensor_or_wrong_shape_is_named_with_the_expected_one(tmp_path):
    content = foreign.checkpoint(foreign.CLASSIFIER, global_pool=True)
    del content["model"]["layers.3.mixer.A_c_log"]
    content["model"]["norm_f.weight"] = np.ones(9, np.float32)
    path = foreign.save(tmp_path / "x.pth", foreign.torch_zip(content))
    result = convert("import", path, tmp_path / "m")
    refused(
        tmp_path,
        result,
        r"missing layers\.3\.mixer\.A_c_log \(8, 16\)",
        r"norm_f\.weight: expected \(8,\), found",
    )


def test_a_model_of_the_other_kind_is_refused_on_request(tmp_path, official):
    result = convert("import", official, tmp_path / "m", "--kind", "pretrain")
    refused(tmp_path, result, "expected a pretrain model, found a classifier model")


@pytest.mark.parametrize("name", ["missing.pth", "folder"])
def test_a_source_that_is_missing_or_not_a_model_is_refused(tmp_path, name):
    (tmp_path / "folder").mkdir()
    refused(tmp_path, convert("import", tmp_path / name, tmp_path / "m"), name)


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"\xff\xd8\xff\xe0\x00\x10JFIF" + bytes(40), "not a checkpoint: a JPEG image; expected a .pth"),
        (b"\x89PNG\r\n\x1a\n" + bytes(40), "not a checkpoint: a PNG image"),
        (b"hello world, this is text", "not a checkpoint; expected a .pth file"),
        (b"", "not a checkpoint: the file is empty"),
        (
            b"storages".ljust(257, b"\0") + b"ustar\x0000" + bytes(300),
            "a tar archive, the checkpoint format of early torch",
        ),
    ],
    ids=["jpeg", "png", "text", "empty", "tar"],
)
def test_a_file_that_is_not_a_checkpoint_is_refused_with_its_kind(tmp_path, content, kind):
    path = foreign.save(tmp_path / "x.jpg", content)
    refused(tmp_path, convert("import", path, tmp_path / "m"), r"x\.jpg: ", re.escape(kind))


@pytest.mark.parametrize("command", ["import", "export", "cast"])
def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch, official, command):
    folder = model_folder(tmp_path / "a", "classifier")
    real, written = safetensors.os.write, [0]

    def full(descriptor, data):
        written[0] += len(data)
        if written[0] > 30_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, data)

    monkeypatch.setattr(safetensors.os, "write", full)
    words = {
        "import": ("import", official, tmp_path / "m"),
        "export": ("export", folder, tmp_path / "m.safetensors", "--to", "torch"),
        "cast": ("cast", folder, tmp_path / "m", "--dtype", "float32"),
    }
    refused(tmp_path, convert(*words[command]), "No space left on device")


def test_folders_created_for_a_failed_output_are_removed(tmp_path):
    content = foreign.checkpoint(foreign.CLASSIFIER)
    content["model"]["head.bias"][0] = np.nan
    path = foreign.save(tmp_path / "x.pth", foreign.torch_zip(content))
    assert convert("import", path, tmp_path / "a/b/m").exit_code == 2
    assert names(tmp_path) == ["x.pth"]
    assert convert("import", path, tmp_path / "a/b/m", "--allow-nonfinite").exit_code == 0


def test_a_malicious_pickle_is_refused_in_one_line_and_runs_nothing(tmp_path):
    class Command:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'marker'}",)

    for content in (foreign.zip_of(pickle.dumps({"model": Command()}, 2), []), pickle.dumps(Command(), 2)):
        path = foreign.save(tmp_path / "x.pth", content)
        for words in (
            ("import", path, tmp_path / "m"),
            ("inspect", path),
            ("verify", path),
            ("diff", path, path),
        ):
            refused(tmp_path, convert(*words), r"x\.pth")
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("place", ["run", "run/checkpoints/step-00000004"])
def test_the_weights_of_a_run_or_their_average_are_imported(tmp_path, place):
    first, second = (initial_parameters(foreign.CLASSIFIER, seed) for seed in (1, 2))
    state = TrainingState(parameters=first, ema=second)
    progress = Progress(step=4, position=4, recipe="", engine={})
    (tmp_path / "run").mkdir()
    folder = save_checkpoint(
        tmp_path / "run", Checkpoint(spec=foreign.CLASSIFIER, progress=progress, state=state)
    )
    for weights, expected in (("raw", first), ("ema", second), ("model", first)):
        assert convert("import", tmp_path / place, tmp_path / weights, "--weights", weights).exit_code == 0
        loaded = read_model(tmp_path / weights).load()
        assert all(np.array_equal(loaded[name], value) for name, value in expected.items())
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-5] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    result = convert("import", tmp_path / place, tmp_path / "m")
    assert result.exit_code == 2
    assert "model.safetensors: corrupt" in result.output


def test_a_pth_that_cannot_be_finished_leaves_nothing_behind(tmp_path, monkeypatch):
    folder = model_folder(tmp_path / "a", "classifier")

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch_writer.zipfile._ZipWriteFile, "write", fail)
    refused(tmp_path, convert("export", folder, tmp_path / "m.pth", "--to", "official"), "No space left")


def test_an_existing_output_is_only_replaced_on_request(tmp_path, official):
    folder = model_folder(tmp_path / "a", "pretrain")
    result = convert("import", official, folder)
    assert result.exit_code == 2
    assert "already exists" in result.output
    assert read_model(folder).spec == foreign.PRETRAIN
    assert convert("import", official, folder, "--force").exit_code == 0
    assert read_model(folder).spec == foreign.CLASSIFIER
    (tmp_path / "x.pth").write_bytes(b"precious")
    assert convert("export", folder, tmp_path / "x.pth", "--to", "torch").exit_code == 2
    assert (tmp_path / "x.pth").read_bytes() == b"precious"
    assert convert("export", folder, tmp_path / "x.pth", "--to", "torch", "--force").exit_code == 0


def test_an_unsupported_file_extension_is_refused(tmp_path):
    folder = model_folder(tmp_path / "a", "pretrain")
    result = convert("export", folder, tmp_path / "m.pth", "--to", "mlx")
    refused(tmp_path, result, r"expected a file name that ends in \.safetensors for mlx")


def test_control_characters_of_a_file_never_reach_the_terminal(tmp_path):
    content = {**foreign.checkpoint(foreign.CLASSIFIER), "\x1b[2Jevil": "\x1b]0;owned\x07"}
    path = foreign.save(tmp_path / "x.pth", foreign.torch_zip(content))
    for result in (convert("import", path, tmp_path / "n"), convert("inspect", path)):
        assert result.exit_code == 0
        assert "\x1b" not in result.output
        assert "evil" in result.output
    content["model"]["\x1b[2J"] = np.zeros(1, np.float32)
    foreign.save(path, foreign.torch_zip(content))
    result = convert("import", path, tmp_path / "m")
    assert result.exit_code == 2
    assert "\x1b" not in result.output


def test_resolving_reads_no_tensor_except_the_mask(tmp_path):
    content = foreign.torch_zip(foreign.checkpoint(foreign.CLASSIFIER))
    path = foreign.save(tmp_path / "x.pth", content)
    source = open_checkpoint_source(path, warn=print)
    path.unlink()
    assert resolve(source, weights=Weights.RAW).spec.classes == 3


def test_inspect_shows_the_result_of_an_import(tmp_path, official):
    text = convert("inspect", official).output
    for part in (
        "torch (zip), official names",
        "classifier, width 8, depth 6, 16x16",
        "pooling: cls",
        "71.5",
    ):
        assert part in text
    data = json.loads(convert("inspect", official, "--json").output)
    assert data["kind"] == "classifier"
    assert data["tensors"]["head.weight"] == {"shape": [3, 8], "dtype": "F32"}
    assert data["config"]["classes"] == 3
    assert "head.weight" in convert("inspect", official, "--names").output


def test_inspect_describes_a_file_that_is_not_a_model(tmp_path):
    write_tensors(tmp_path / "x.safetensors", {"a.b": np.zeros((2, 3), np.float32)})
    result = convert("inspect", tmp_path / "x.safetensors")
    assert result.exit_code == 0
    assert "model: none" in result.output
    assert json.loads(convert("inspect", tmp_path / "x.safetensors", "--json").output)["problem"]


def test_a_corrupt_file_is_refused_in_one_line(tmp_path, official):
    for content in (official.read_bytes()[:-100], b"PK\3\4" + bytes(30)):
        path = foreign.save(tmp_path / "x.pth", content)
        for words in (
            ("inspect", path),
            ("import", path, tmp_path / "m"),
            ("export", path, tmp_path / "m.pth", "--to", "torch"),
        ):
            refused(tmp_path, convert(*words), r"x\.pth")


def test_a_wrong_self_description_is_refused(tmp_path):
    folder = model_folder(tmp_path / "a", "classifier")
    model = read_model(folder)
    export_model(model.spec, model.arrays, {}, tmp_path / "x.safetensors", Format.MLX)
    file = read_tensors(tmp_path / "x.safetensors")
    for changes, message in (
        ({"arm.layout": "keras"}, "arm.layout: expected one of canonical, official, torch, mlx"),
        ({"arm.config": "{}"}, "expected format"),
        ({"arm.layout": "torch"}, "expected"),
    ):
        write_tensors(tmp_path / "y.safetensors", file.tensors, {**file.metadata, **changes})
        with pytest.raises(BadFileError, match=message):
            resolve(open_checkpoint_source(tmp_path / "y.safetensors", warn=print))


def test_sigterm_during_a_conversion_leaves_nothing_behind(tmp_path):
    (tmp_path / "m").mkdir()
    folder = model_folder(tmp_path / "m" / "a", "classifier")
    program = (
        "import sys, time\n"
        "from arm_convert import adapt\n"
        "from arm_core.files import model_folder\n"
        "def slow(*_):\n"
        "    print('writing', flush=True)\n"
        "    time.sleep(60)\n"
        "model_folder.write_weights = slow\n"
        "from arm_cli.main import main\n"
        "main(prog_name='arm')\n"
    )
    words = [sys.executable, "-c", program, "convert", "cast", folder, tmp_path / "out", "--dtype", "float16"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(list(map(str, words)), env=environment, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout.readline() == "writing\n"
        assert len(names(tmp_path)) == 2  # the draft
        child.terminate()
        assert child.wait(timeout=60) == 128 + signal.SIGTERM
    assert names(tmp_path) == ["m"]


def test_two_imports_to_one_new_folder_do_not_both_succeed(tmp_path, official):
    folders = [model_folder(tmp_path / str(i), "classifier", seed=i) for i in range(2)]
    program = "from arm_cli.main import main; main(prog_name='arm')"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    start = [sys.executable, "-c", program, "convert", "import"]
    commands = [[*start, str(folder), str(tmp_path / "m")] for folder in folders]
    running = [subprocess.Popen(words, env=environment, stderr=subprocess.PIPE) for words in commands]
    errors = [child.communicate(timeout=100)[1] for child in running]
    assert sorted(child.returncode for child in running) == [0, 2], errors
    assert names(tmp_path) == ["0", "1", "m", "official.pth"]
