"""Importing and exporting every format: nothing is lost, and nothing is dropped without a message."""

from __future__ import annotations

import argparse

import foreign
import golden
import numpy as np
import pytest
from converting import SPECS, convert, model_folder, official_checkpoint, same_bytes

from arm_convert.checkpoint_source import open_checkpoint_source, strip_prefix
from arm_convert.export import SUFFIXES_OF, Format
from arm_convert.importing import import_model, resolve
from arm_convert.official import official_mask, official_shapes, official_view
from arm_core.files.model_folder import read_model, write_model
from arm_core.files.safetensors import Tensor, read_tensors, write_tensors
from arm_core.model.parameters import initial_parameters
from arm_core.model.spec import DIRECTIONS, Pooling, PredictionOrder, Target

FORMATS = [(to, suffix) for to in Format for suffix in SUFFIXES_OF[to]]


@pytest.fixture
def official(tmp_path):
    return official_checkpoint(tmp_path)


@pytest.mark.parametrize("make", [foreign.torch_zip, foreign.torch_legacy])
@pytest.mark.parametrize("kind", SPECS)
def test_an_official_checkpoint_imports_exactly(tmp_path, kind, make):
    spec = SPECS[kind]
    foreign.save(tmp_path / "x.pth", make(foreign.checkpoint(spec, 5, global_pool=False)))
    result = convert("import", tmp_path / "x.pth", tmp_path / "m")
    assert result.exit_code == 0, result.output
    model = read_model(tmp_path / "m")
    assert model.spec == spec
    expected = initial_parameters(spec, 5)
    assert all(np.array_equal(value, expected[name]) for name, value in model.load().items())
    assert "left out: 'epoch': 3" in result.output


def test_the_average_is_imported_on_request_and_omitted_contents_are_listed(tmp_path, official):
    first = convert("import", official, tmp_path / "m")
    assert "left out: the moving average of the weights" in first.output
    assert "left out: 'max_accuracy': 71.5" in first.output
    assert convert("import", official, tmp_path / "e", "--weights", "ema").exit_code == 0
    for name, seed in (("m", 1), ("e", 2)):
        expected = initial_parameters(foreign.CLASSIFIER, seed)
        loaded = read_model(tmp_path / name).load()
        assert all(np.array_equal(value, expected[key]) for key, value in loaded.items())
    assert "72.5" in (tmp_path / "e" / "README.md").read_text()


def test_the_card_describes_the_training_without_paths(tmp_path, official):
    convert("import", official, tmp_path / "m")
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
    result = convert("import", foreign.save(tmp_path / "x.pth", content), tmp_path / "m", *option)
    assert read_model(tmp_path / "m").spec.pooling is pooling
    line = next(line for line in result.output.splitlines() if line.strip().startswith("pooling:"))
    assert f"pooling: {pooling}" in line
    assert why in line


@pytest.mark.parametrize("prefix", ["module.", "model.", "module.model.", "_orig_mod.module."])
def test_the_prefix_of_a_wrapper_is_removed(tmp_path, prefix):
    state = {prefix + name: value for name, value in foreign.official_state(foreign.PRETRAIN, 3).items()}
    path = foreign.save(tmp_path / "x.pth", foreign.torch_zip({"state_dict": state}))
    result = convert("import", path, tmp_path / "m")
    assert f"the common prefix '{prefix}' was removed" in result.output
    assert read_model(tmp_path / "m").spec == foreign.PRETRAIN


def test_a_prefix_of_only_some_names_is_not_removed():
    some = {name: Tensor.of(np.zeros(1, np.float32)) for name in ("module.a", "b")}
    assert strip_prefix(some) == (some, "")


def test_a_bare_state_dict_and_safetensors_with_official_names_import_too(tmp_path):
    state = foreign.official_state(foreign.PRETRAIN, 3)
    foreign.save(tmp_path / "bare.pth", foreign.torch_zip(state))
    write_tensors(tmp_path / "x.safetensors", state)
    for number, name in enumerate(("bare.pth", "x.safetensors")):
        assert convert("import", tmp_path / name, tmp_path / f"m{number}").exit_code == 0
    first, second = (read_model(tmp_path / name).load() for name in ("m0", "m1"))
    assert all(np.array_equal(first[name], second[name]) for name in second)


def test_extra_tensors_and_a_missing_mask_are_listed_and_a_fixed_table_is_computed(tmp_path):
    state = foreign.official_state(foreign.PRETRAIN, 3)
    del state["dec_pos_embed"]
    state["surplus.weight"] = np.ones((2, 2), np.float32)
    foreign.save(tmp_path / "x.pth", foreign.torch_zip({"model": state}))
    result = convert("import", tmp_path / "x.pth", tmp_path / "m")
    assert "left out: tensor surplus.weight (2, 2)" in result.output
    assert "dec_pos_embed: missing in the file; computed" in result.output
    expected = initial_parameters(foreign.PRETRAIN, 3)["decoder_pos_embed"]
    assert np.array_equal(read_model(tmp_path / "m").load()["decoder_pos_embed"], expected)


def test_a_mask_of_another_order_is_refused(tmp_path):
    state = foreign.official_state(foreign.PRETRAIN, 3)
    state["mask"] = state["mask"].T.copy()
    foreign.save(tmp_path / "x.pth", foreign.torch_zip({"model": state}))
    result = convert("import", tmp_path / "x.pth", tmp_path / "m")
    assert result.exit_code == 2
    assert "mask: expected blocks of 4 tokens, lower triangular" in result.output


def test_without_a_mask_the_official_clusters_are_assumed_or_the_import_refused(tmp_path):
    state = foreign.official_state(foreign.PRETRAIN, 3)
    del state["mask"]
    foreign.save(tmp_path / "x.pth", foreign.torch_zip({"model": state}))
    result = convert("import", tmp_path / "x.pth", tmp_path / "m")
    assert result.exit_code == 2
    assert "the grid of 6x6 patches is not divisible into clusters of 4x4 patches" in result.output


def test_a_rectangular_image_needs_its_size(tmp_path):
    from dataclasses import replace

    spec = replace(foreign.CLASSIFIER, image_size=(8, 24))
    foreign.save(tmp_path / "x.pth", foreign.torch_zip(foreign.checkpoint(spec, global_pool=False)))
    refused = convert("import", tmp_path / "x.pth", tmp_path / "m")
    assert refused.exit_code == 2
    assert "12, is not a perfect square; pass --image-size" in refused.output
    assert convert("import", tmp_path / "x.pth", tmp_path / "m", "--image-size", "8x24").exit_code == 0
    assert read_model(tmp_path / "m").spec == spec


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
@pytest.mark.parametrize("kind", SPECS)
@pytest.mark.parametrize(("to", "suffix"), FORMATS)
def test_import_after_export_gives_the_same_bytes(tmp_path, to, suffix, kind, dtype):
    folder = model_folder(tmp_path / "m", kind, dtype=dtype)
    out = tmp_path / f"out{suffix}"
    assert convert("export", folder, out, "--to", to).exit_code == 0
    source = open_checkpoint_source(out, warn=print)
    import_model(source, resolve(source), tmp_path / "back")
    (tmp_path / "back/README.md").unlink()  # the first folder was written without a card
    assert same_bytes(folder, tmp_path / "back")


def test_converting_a_model_folder_again_changes_nothing(tmp_path):
    folder = model_folder(tmp_path / "m", "pretrain")
    convert("import", folder, tmp_path / "n")
    convert("import", tmp_path / "n", tmp_path / "o")
    assert same_bytes(tmp_path / "n", tmp_path / "o")
    assert (folder / "model.safetensors").read_bytes() == (tmp_path / "o/model.safetensors").read_bytes()


@pytest.mark.parametrize("kind", SPECS)
def test_the_official_export_has_exactly_the_official_names_and_shapes(tmp_path, kind):
    folder = model_folder(tmp_path / "m", kind)
    convert("export", folder, tmp_path / "x.safetensors", "--to", "official")
    found = {n: t.shape for n, t in read_tensors(tmp_path / "x.safetensors").tensors.items()}
    assert found == official_shapes(SPECS[kind])


def test_the_official_export_refuses_models_that_the_official_code_cannot_build(tmp_path):
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
        result = convert("export", folder, tmp_path / "x.pth", "--to", "official")
        assert result.exit_code == 2
        assert message in result.output
        assert convert("export", folder, tmp_path / f"x{number}.safetensors", "--to", "mlx").exit_code == 0


def test_a_base_model_is_exported_with_the_official_names():
    from arm_core.model.presets import classifier_preset, pretrain_preset

    assert official_shapes(pretrain_preset("base")) == golden.official_names("pretrain")
    assert official_shapes(classifier_preset("base")) == golden.official_names("classifier")


def test_a_large_model_is_split_into_shards_and_read_back(tmp_path, official):
    assert convert("import", official, tmp_path / "m", "--shard-size", "20KB").exit_code == 0
    assert len(list((tmp_path / "m").glob("model-*.safetensors"))) > 1
    expected = initial_parameters(foreign.CLASSIFIER, 1)
    loaded = read_model(tmp_path / "m").load()
    assert all(np.array_equal(value, expected[name]) for name, value in loaded.items())


# -- official files ------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [foreign.torch_zip, foreign.torch_legacy])
@pytest.mark.parametrize("name", ["pretrain_strong", "classifier_strong"])
def test_imported_official_weights_reproduce_the_official_outputs(tmp_path, name, make):
    """`test_golden_engines` compares the results of both engines on these weights with the official ones."""
    strong = golden.load(name)
    state = official_view(strong.spec, strong.parameters)
    if name == "pretrain_strong":
        state["mask"] = official_mask(strong.spec)
    content = make({"model": state, "args": argparse.Namespace(global_pool=False)})
    result = convert("import", foreign.save(tmp_path / "x.pth", content), tmp_path / "m")
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
def test_an_official_pth_is_imported_and_exported_exactly(tmp_path, name, weights):
    torch = pytest.importorskip("torch")
    path = golden.complete() / f"{name}.pth"
    content = torch.load(path, weights_only=False)
    if weights == "ema" and "model_ema" not in content:
        pytest.skip("keeps no average")
    assert convert("import", path, tmp_path / "m", "--weights", weights).exit_code == 0
    assert convert("export", tmp_path / "m", tmp_path / "x.pth", "--to", "official").exit_code == 0
    expected = content["model" if weights == "model" else "model_ema"]
    found = torch.load(tmp_path / "x.pth", weights_only=True)["model"]
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
