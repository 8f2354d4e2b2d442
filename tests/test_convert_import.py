"""Importing and exporting: every format in, every format out, nothing lost, nothing dropped unseen."""

from __future__ import annotations

import argparse
import errno
import json
import os
import pickle
import re
from pathlib import Path

import foreign
import golden
import numpy as np
import pytest
from click.testing import CliRunner

from arm_cli.main import main
from arm_convert import torch_writer
from arm_convert.export import SUFFIXES_OF, Format, export_model
from arm_convert.importing import Weights, import_model, resolve
from arm_convert.official import official_mask, official_shapes, official_view
from arm_convert.source import open_source, strip_prefix
from arm_core import tensor_file
from arm_core.backend import TrainingState
from arm_core.checkpoint import Checkpoint, Progress, save_checkpoint
from arm_core.model_files import read_model, write_model
from arm_core.parameters import initial_parameters
from arm_core.spec import DIRECTIONS, Pooling, PredictionOrder, Target
from arm_core.tensor_file import BadFileError, Tensor, read_tensors, write_tensors

SPECS = {"pretrain": foreign.PRETRAIN, "classifier": foreign.CLASSIFIER}
FORMATS = [(to, suffix) for to in Format for suffix in SUFFIXES_OF[to]]


def arm(*words):
    return CliRunner().invoke(main, ["convert", *(str(word) for word in words)])


def names(folder: Path) -> list[str]:
    return sorted(item.name for item in folder.iterdir())


def same_bytes(first: Path, second: Path) -> bool:
    return names(first) == names(second) and all(
        (first / name).read_bytes() == (second / name).read_bytes() for name in names(first)
    )


def model_folder(path: Path, kind: str, *, dtype: str = "F32", seed: int = 0) -> Path:
    tensors = {n: Tensor.of(a).cast(dtype) for n, a in initial_parameters(SPECS[kind], seed).items()}
    return write_model(path, SPECS[kind], tensors, metadata={"history": '["made"]', "classes": '["a"]'})


@pytest.fixture
def official(tmp_path):
    """An official checkpoint of the classifier, with an average of its weights."""
    content = {
        **foreign.checkpoint(foreign.CLASSIFIER, 1, global_pool=False, lr=0.1, data_path="/secret"),
        "model_ema": foreign.official_state(foreign.CLASSIFIER, 2),
        "max_accuracy": 71.5,
        "ema_max_accuracy": 72.5,
    }
    return foreign.save(tmp_path / "official.pth", foreign.torch_zip(content))


@pytest.mark.parametrize("make", [foreign.torch_zip, foreign.torch_legacy])
@pytest.mark.parametrize("kind", SPECS)
def test_an_official_checkpoint_imports_exactly(tmp_path, kind, make):
    spec = SPECS[kind]
    foreign.save(tmp_path / "x.pth", make(foreign.checkpoint(spec, 5, global_pool=False)))
    result = arm("import", tmp_path / "x.pth", tmp_path / "m")
    assert result.exit_code == 0, result.output
    model = read_model(tmp_path / "m")
    assert model.spec == spec
    expected = initial_parameters(spec, 5)
    assert all(np.array_equal(value, expected[name]) for name, value in model.load().items())
    assert "left out: 'epoch': 3" in result.output


def test_the_average_is_imported_on_request_and_what_is_left_out_is_listed(tmp_path, official):
    first = arm("import", official, tmp_path / "m")
    assert "left out: the moving average of the weights" in first.output
    assert "left out: 'max_accuracy': 71.5" in first.output
    assert arm("import", official, tmp_path / "e", "--weights", "ema").exit_code == 0
    for name, seed in (("m", 1), ("e", 2)):
        expected = initial_parameters(foreign.CLASSIFIER, seed)
        loaded = read_model(tmp_path / name).load()
        assert all(np.array_equal(value, expected[key]) for key, value in loaded.items())
    assert "72.5" in (tmp_path / "e" / "README.md").read_text()


def test_the_card_tells_the_training_but_no_paths(tmp_path, official):
    arm("import", official, tmp_path / "m")
    card = (tmp_path / "m" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: arm-vision\n")
    assert "| lr | 0.1 |" in card
    assert "imported from official.pth" in card
    assert "secret" not in card


@pytest.mark.parametrize(
    ("args", "option", "pooling", "why"),
    [
        ({"global_pool": True}, [], Pooling.MEAN, "args"),
        ({"global_pool": False}, [], Pooling.CLS, "args"),
        ({"global_pool": False}, ["--pooling", "mean"], Pooling.MEAN, "--pooling"),
        ({}, ["--pooling", "cls"], Pooling.CLS, "--pooling"),
        ({}, [], Pooling.MEAN, "assumed"),
    ],
)
def test_pooling_is_chosen_and_the_reason_printed(tmp_path, args, option, pooling, why):
    content = foreign.torch_zip(foreign.checkpoint(foreign.CLASSIFIER, **args))
    result = arm("import", foreign.save(tmp_path / "x.pth", content), tmp_path / "m", *option)
    assert read_model(tmp_path / "m").spec.pooling is pooling
    line = next(line for line in result.output.splitlines() if line.strip().startswith("pooling:"))
    assert f"pooling: {pooling}" in line
    assert why in line


@pytest.mark.parametrize("prefix", ["module.", "model.", "module.model.", "_orig_mod.module."])
def test_the_prefix_of_a_wrapper_is_taken_off(tmp_path, prefix):
    state = {prefix + name: value for name, value in foreign.official_state(foreign.PRETRAIN, 3).items()}
    path = foreign.save(tmp_path / "x.pth", foreign.torch_zip({"state_dict": state}))
    result = arm("import", path, tmp_path / "m")
    assert f"without the prefix '{prefix}'" in result.output
    assert read_model(tmp_path / "m").spec == foreign.PRETRAIN


def test_a_prefix_that_only_some_names_carry_is_no_prefix():
    some = {name: Tensor.of(np.zeros(1, np.float32)) for name in ("module.a", "b")}
    assert strip_prefix(some) == (some, "")


def test_a_bare_state_dict_and_safetensors_with_official_names_import_too(tmp_path):
    state = foreign.official_state(foreign.PRETRAIN, 3)
    foreign.save(tmp_path / "bare.pth", foreign.torch_zip(state))
    write_tensors(tmp_path / "x.safetensors", state)
    for number, name in enumerate(("bare.pth", "x.safetensors")):
        assert arm("import", tmp_path / name, tmp_path / f"m{number}").exit_code == 0
    first, second = (read_model(tmp_path / name).load() for name in ("m0", "m1"))
    assert all(np.array_equal(first[name], second[name]) for name in second)


def test_extra_tensors_and_a_missing_mask_are_listed_and_a_fixed_table_is_computed(tmp_path):
    state = foreign.official_state(foreign.PRETRAIN, 3)
    del state["dec_pos_embed"]
    state["surplus.weight"] = np.ones((2, 2), np.float32)
    foreign.save(tmp_path / "x.pth", foreign.torch_zip({"model": state}))
    result = arm("import", tmp_path / "x.pth", tmp_path / "m")
    assert "left out: tensor surplus.weight (2, 2)" in result.output
    assert "dec_pos_embed: missing in the file; computed" in result.output
    expected = initial_parameters(foreign.PRETRAIN, 3)["decoder_pos_embed"]
    assert np.array_equal(read_model(tmp_path / "m").load()["decoder_pos_embed"], expected)


def test_a_mask_of_another_order_is_refused(tmp_path):
    state = foreign.official_state(foreign.PRETRAIN, 3)
    state["mask"] = state["mask"].T.copy()
    foreign.save(tmp_path / "x.pth", foreign.torch_zip({"model": state}))
    result = arm("import", tmp_path / "x.pth", tmp_path / "m")
    assert result.exit_code == 2
    assert "mask: expected blocks of 4 tokens, lower triangular" in result.output


def test_without_a_mask_the_official_clusters_are_assumed_or_the_import_refused(tmp_path):
    state = foreign.official_state(foreign.PRETRAIN, 3)
    del state["mask"]
    foreign.save(tmp_path / "x.pth", foreign.torch_zip({"model": state}))
    result = arm("import", tmp_path / "x.pth", tmp_path / "m")
    assert result.exit_code == 2
    assert "clusters of 4x4 patches do not tile the grid of 6x6 patches" in result.output


def test_a_rectangular_image_needs_its_size(tmp_path):
    from dataclasses import replace

    spec = replace(foreign.CLASSIFIER, image_size=(8, 24))
    foreign.save(tmp_path / "x.pth", foreign.torch_zip(foreign.checkpoint(spec, global_pool=False)))
    refused = arm("import", tmp_path / "x.pth", tmp_path / "m")
    assert refused.exit_code == 2
    assert "12 positions are no square; say the image size with --image-size" in refused.output
    assert arm("import", tmp_path / "x.pth", tmp_path / "m", "--image-size", "8x24").exit_code == 0
    assert read_model(tmp_path / "m").spec == spec


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
@pytest.mark.parametrize("kind", SPECS)
@pytest.mark.parametrize(("to", "suffix"), FORMATS)
def test_import_after_export_gives_the_same_bytes(tmp_path, to, suffix, kind, dtype):
    folder = model_folder(tmp_path / "m", kind, dtype=dtype)
    out = tmp_path / f"out{suffix}"
    assert arm("export", folder, out, "--to", to).exit_code == 0
    source = open_source(out, warn=print)
    import_model(source, resolve(source), tmp_path / "back")
    (tmp_path / "back/README.md").unlink()  # the first folder was written without a card
    assert same_bytes(folder, tmp_path / "back")


def test_converting_a_model_folder_again_changes_nothing(tmp_path):
    folder = model_folder(tmp_path / "m", "pretrain")
    arm("import", folder, tmp_path / "n")
    arm("import", tmp_path / "n", tmp_path / "o")
    assert same_bytes(tmp_path / "n", tmp_path / "o")
    assert (folder / "model.safetensors").read_bytes() == (tmp_path / "o/model.safetensors").read_bytes()


@pytest.mark.parametrize("kind", SPECS)
def test_the_official_export_has_exactly_the_official_names_and_shapes(tmp_path, kind):
    folder = model_folder(tmp_path / "m", kind)
    arm("export", folder, tmp_path / "x.safetensors", "--to", "official")
    found = {n: t.shape for n, t in read_tensors(tmp_path / "x.safetensors").tensors.items()}
    assert found == official_shapes(SPECS[kind])


def test_the_official_export_refuses_what_the_official_code_cannot_build(tmp_path):
    from dataclasses import replace

    two = replace(foreign.CLASSIFIER, scan_directions=DIRECTIONS[2])
    raw = replace(foreign.PRETRAIN, target=Target.RAW)
    backwards = replace(foreign.PRETRAIN, prediction_order=PredictionOrder.ROW_REVERSE)
    for number, (spec, message) in enumerate(
        [
            (two, "has scan directions row, row_reverse, column"),
            (raw, "has target"),
            (backwards, "prediction order"),
        ]
    ):
        folder = write_model(tmp_path / f"m{number}", spec, initial_parameters(spec, 0))
        result = arm("export", folder, tmp_path / "x.pth", "--to", "official")
        assert result.exit_code == 2
        assert message in result.output
        assert arm("export", folder, tmp_path / f"x{number}.safetensors", "--to", "mlx").exit_code == 0


def test_the_official_base_names_are_the_ones_a_base_model_is_exported_with():
    from arm_core.spec import classifier_preset, pretrain_preset

    assert official_shapes(pretrain_preset("base")) == golden.official_names("pretrain")
    assert official_shapes(classifier_preset("base")) == golden.official_names("classifier")


def test_a_large_model_is_cut_into_shards_and_read_back(tmp_path, official):
    assert arm("import", official, tmp_path / "m", "--shard-size", "20KB").exit_code == 0
    assert len(list((tmp_path / "m").glob("model-*.safetensors"))) > 1
    expected = initial_parameters(foreign.CLASSIFIER, 1)
    loaded = read_model(tmp_path / "m").load()
    assert all(np.array_equal(value, expected[name]) for name, value in loaded.items())


# -- mistakes: one line, exit code 2, nothing left -----------------------------------------------------


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
    refused(tmp_path, arm("import", path, tmp_path / "m"), r"layers.2.mlp.w1.bias: 1 of 21 values are NaN")
    result = arm("import", path, tmp_path / "m", "--allow-nonfinite")
    assert result.exit_code == 0
    assert "warning: " in result.output
    assert "head.bias: 1 of 3 values are NaN or infinite" in result.output


def test_large_finite_weights_are_not_taken_for_infinite(tmp_path):
    content = foreign.checkpoint(foreign.CLASSIFIER, global_pool=True)
    content["model"]["head.bias"][:] = 3e38
    path = foreign.save(tmp_path / "x.pth", foreign.torch_zip(content))
    assert arm("import", path, tmp_path / "m").exit_code == 0


def test_another_architecture_is_refused_with_the_key_that_told(tmp_path):
    state = {
        "cls_token": np.zeros((1, 1, 8), np.float32),
        "blocks.0.attn.qkv.weight": np.zeros((3, 3), np.float32),
    }
    path = foreign.save(tmp_path / "x.pth", foreign.torch_zip({"model": state}))
    result = arm("import", path, tmp_path / "m")
    refused(tmp_path, result, r"x\.pth: .*a Vision Transformer: it has blocks\.0\.attn\.qkv\.weight")


def test_a_missing_or_misshaped_tensor_is_named_with_what_was_expected(tmp_path):
    content = foreign.checkpoint(foreign.CLASSIFIER, global_pool=True)
    del content["model"]["layers.3.mixer.A_c_log"]
    content["model"]["norm_f.weight"] = np.ones(9, np.float32)
    path = foreign.save(tmp_path / "x.pth", foreign.torch_zip(content))
    result = arm("import", path, tmp_path / "m")
    refused(
        tmp_path,
        result,
        r"missing layers\.3\.mixer\.A_c_log \(8, 16\)",
        r"norm_f\.weight: expected \(8,\), found",
    )


def test_a_model_of_the_other_kind_is_refused_on_request(tmp_path, official):
    result = arm("import", official, tmp_path / "m", "--kind", "pretrain")
    refused(tmp_path, result, "expected a pretrain model, found a classifier model")


@pytest.mark.parametrize("name", ["missing.pth", "folder"])
def test_a_source_that_is_not_there_or_is_no_model_is_refused(tmp_path, name):
    (tmp_path / "folder").mkdir()
    refused(tmp_path, arm("import", tmp_path / name, tmp_path / "m"), name)


def test_text_and_images_are_refused(tmp_path):
    for content in (b"hello world, this is text", b"\x89PNG\r\n\x1a\n" + bytes(40), b""):
        path = foreign.save(tmp_path / "x.pth", content)
        refused(tmp_path, arm("import", path, tmp_path / "m"), r"x\.pth")


@pytest.mark.parametrize("command", ["import", "export", "cast"])
def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch, official, command):
    folder = model_folder(tmp_path / "a", "classifier")
    real, written = tensor_file.os.write, [0]

    def full(descriptor, data):
        written[0] += len(data)
        if written[0] > 30_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, data)

    monkeypatch.setattr(tensor_file.os, "write", full)
    words = {
        "import": ("import", official, tmp_path / "m"),
        "export": ("export", folder, tmp_path / "m.safetensors", "--to", "torch"),
        "cast": ("cast", folder, tmp_path / "m", "--dtype", "float32"),
    }
    refused(tmp_path, arm(*words[command]), "No space left on device")


def test_folders_made_for_an_output_that_failed_are_removed(tmp_path):
    content = foreign.checkpoint(foreign.CLASSIFIER)
    content["model"]["head.bias"][0] = np.nan
    path = foreign.save(tmp_path / "x.pth", foreign.torch_zip(content))
    assert arm("import", path, tmp_path / "a/b/m").exit_code == 2
    assert names(tmp_path) == ["x.pth"]
    assert arm("import", path, tmp_path / "a/b/m", "--allow-nonfinite").exit_code == 0


def test_a_malicious_pickle_is_one_line_and_runs_nothing(tmp_path):
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
            refused(tmp_path, arm(*words), r"x\.pth")
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("place", ["run", "run/checkpoints/step-00000004"])
def test_a_run_gives_its_weights_or_their_average(tmp_path, place):
    first, second = (initial_parameters(foreign.CLASSIFIER, seed) for seed in (1, 2))
    state = TrainingState(parameters=first, ema=second)
    progress = Progress(step=4, position=4, recipe="", engine={})
    (tmp_path / "run").mkdir()
    folder = save_checkpoint(
        tmp_path / "run", Checkpoint(spec=foreign.CLASSIFIER, progress=progress, state=state)
    )
    for weights, expected in (("model", first), ("ema", second)):
        assert arm("import", tmp_path / place, tmp_path / weights, "--weights", weights).exit_code == 0
        loaded = read_model(tmp_path / weights).load()
        assert all(np.array_equal(loaded[name], value) for name, value in expected.items())
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-5] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    result = arm("import", tmp_path / place, tmp_path / "m")
    assert result.exit_code == 2
    assert (
        "model.safetensors: damaged" in result.output or "none of the 1 checkpoints is sound" in result.output
    )


def test_a_pth_that_cannot_be_finished_leaves_nothing_behind(tmp_path, monkeypatch):
    folder = model_folder(tmp_path / "a", "classifier")

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch_writer.zipfile._ZipWriteFile, "write", fail)
    refused(tmp_path, arm("export", folder, tmp_path / "m.pth", "--to", "official"), "No space left")


def test_an_existing_output_is_replaced_on_request_only(tmp_path, official):
    folder = model_folder(tmp_path / "a", "pretrain")
    result = arm("import", official, folder)
    assert result.exit_code == 2
    assert "exists already" in result.output
    assert read_model(folder).spec == foreign.PRETRAIN
    assert arm("import", official, folder, "--force").exit_code == 0
    assert read_model(folder).spec == foreign.CLASSIFIER
    (tmp_path / "x.pth").write_bytes(b"precious")
    assert arm("export", folder, tmp_path / "x.pth", "--to", "torch").exit_code == 2
    assert (tmp_path / "x.pth").read_bytes() == b"precious"
    assert arm("export", folder, tmp_path / "x.pth", "--to", "torch", "--force").exit_code == 0


def test_an_ending_that_a_format_has_not_is_refused(tmp_path):
    folder = model_folder(tmp_path / "a", "pretrain")
    result = arm("export", folder, tmp_path / "m.pth", "--to", "mlx")
    refused(tmp_path, result, r"expected a name that ends in \.safetensors for mlx")


def test_control_characters_of_a_file_never_reach_the_terminal(tmp_path):
    content = {**foreign.checkpoint(foreign.CLASSIFIER), "\x1b[2Jevil": "\x1b]0;owned\x07"}
    path = foreign.save(tmp_path / "x.pth", foreign.torch_zip(content))
    for result in (arm("import", path, tmp_path / "n"), arm("inspect", path)):
        assert result.exit_code == 0
        assert "\x1b" not in result.output
        assert "evil" in result.output
    content["model"]["\x1b[2J"] = np.zeros(1, np.float32)
    foreign.save(path, foreign.torch_zip(content))
    result = arm("import", path, tmp_path / "m")
    assert result.exit_code == 2
    assert "\x1b" not in result.output


def test_resolving_reads_no_tensor_but_the_mask(tmp_path):
    content = foreign.torch_zip(foreign.checkpoint(foreign.CLASSIFIER))
    path = foreign.save(tmp_path / "x.pth", content)
    source = open_source(path, warn=print)
    path.unlink()
    assert resolve(source, weights=Weights.MODEL).spec.classes == 3


def test_inspect_shows_what_would_be_imported(tmp_path, official):
    text = arm("inspect", official).output
    for part in (
        "torch (zip), official names",
        "classifier, width 8, depth 6, 16x16",
        "pooling: cls",
        "71.5",
    ):
        assert part in text
    data = json.loads(arm("inspect", official, "--json").output)
    assert data["kind"] == "classifier"
    assert data["tensors"]["head.weight"] == {"shape": [3, 8], "dtype": "F32"}
    assert data["config"]["classes"] == 3
    assert "head.weight" in arm("inspect", official, "--names").output


def test_inspect_describes_a_file_that_is_no_model(tmp_path):
    write_tensors(tmp_path / "x.safetensors", {"a.b": np.zeros((2, 3), np.float32)})
    result = arm("inspect", tmp_path / "x.safetensors")
    assert result.exit_code == 0
    assert "model: none" in result.output
    assert json.loads(arm("inspect", tmp_path / "x.safetensors", "--json").output)["problem"]


def test_a_damaged_file_is_one_line(tmp_path, official):
    for content in (official.read_bytes()[:-100], b"PK\3\4" + bytes(30)):
        path = foreign.save(tmp_path / "x.pth", content)
        for words in (
            ("inspect", path),
            ("import", path, tmp_path / "m"),
            ("export", path, tmp_path / "m.pth", "--to", "torch"),
        ):
            refused(tmp_path, arm(*words), r"x\.pth")


def test_a_self_description_that_lies_is_refused(tmp_path):
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
            resolve(open_source(tmp_path / "y.safetensors", warn=print))


# -- official files ------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [foreign.torch_zip, foreign.torch_legacy])
@pytest.mark.parametrize("name", ["pretrain_strong", "classifier_strong"])
def test_official_weights_in_a_pth_arrive_as_those_that_reproduce_the_official_outputs(tmp_path, name, make):
    """`test_golden_engines` holds what both engines compute from these against the official numbers."""
    strong = golden.load(name)
    state = official_view(strong.spec, strong.parameters)
    if name == "pretrain_strong":
        state["mask"] = official_mask(strong.spec)
    content = make({"model": state, "args": argparse.Namespace(global_pool=False)})
    result = arm("import", foreign.save(tmp_path / "x.pth", content), tmp_path / "m")
    assert result.exit_code == 0, result.output
    model = read_model(tmp_path / "m")
    assert model.spec == strong.spec
    loaded = model.load()
    assert all(np.array_equal(loaded[key], value) for key, value in strong.parameters.items())


@pytest.mark.skipif(golden.complete() is None, reason="needs the complete official data: set ARM_GOLDEN")
@pytest.mark.parametrize(
    "name",
    [
        "pretrain_checkpoint-40",
        "pretrain_slim_checkpoint-40",
        "ft_cls_checkpoint-10",
        "ft_gp_checkpoint-10",
        "ft_gp_slim_checkpoint-10",
    ],
)
@pytest.mark.parametrize("weights", ["model", "ema"])
def test_an_official_pth_goes_in_and_out_exactly(tmp_path, name, weights):
    torch = pytest.importorskip("torch")
    path = golden.complete() / f"{name}.pth"
    content = torch.load(path, weights_only=False)
    if weights == "ema" and "model_ema" not in content:
        pytest.skip("keeps no average")
    assert arm("import", path, tmp_path / "m", "--weights", weights).exit_code == 0
    assert arm("export", tmp_path / "m", tmp_path / "x.pth", "--to", "official").exit_code == 0
    expected = content["model" if weights == "model" else "model_ema"]
    found = torch.load(tmp_path / "x.pth", weights_only=True)["model"]
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
