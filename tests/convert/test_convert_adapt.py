"""Conversions of models: classifier from pretraining model, new head, new size, new type, average."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import foreign
import golden
import numpy as np
import pytest
from converting import convert

from arm_convert import adapt
from arm_convert.checkpoint_source import open_checkpoint_source
from arm_convert.importing import resolve
from arm_convert.official import official_view
from arm_core.files.model_folder import read_model, write_model
from arm_core.files.safetensors import Tensor, as_tensors
from arm_core.model.bicubic import interpolation_matrix, resize_table
from arm_core.model.parameters import initial_parameters
from arm_core.model.reference.model import forward
from arm_core.model.spec import DIRECTIONS, ClassifierSpec, Direction, EncoderSpec, PretrainSpec
from arm_core.model.tokens import sincos_positions


def read(tensors):
    return {name: tensor.read() for name, tensor in tensors.items()}


def strange(spec, seed=0):
    """Parameters in which no two tensors, directions or rows are alike."""
    rng = np.random.default_rng(seed)
    return {
        n: a + rng.normal(size=a.shape).astype(np.float32) / 9
        for n, a in initial_parameters(spec, seed).items()
    }


@pytest.fixture
def pretrained(tmp_path):
    return write_model(tmp_path / "pre", foreign.PRETRAIN, strange(foreign.PRETRAIN))


@pytest.fixture
def finetuned(tmp_path):
    return write_model(
        tmp_path / "cls",
        foreign.CLASSIFIER,
        strange(foreign.CLASSIFIER),
        metadata={"classes": '["a","b","c"]'},
    )


# -- interpolation -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "new"), [(12, 14), (14, 24), (14, 7), (5, 5), (1, 4), (2, 3), (3, 1)])
def test_interpolation_keeps_constants_and_mirrors(size, new):
    matrix = interpolation_matrix(size, new)
    assert np.allclose(matrix.sum(1), 1)
    assert np.allclose(matrix, matrix[::-1, ::-1])
    if size == new:
        assert np.allclose(matrix, np.eye(size))


@pytest.mark.parametrize(
    ("grid", "new"), [((12, 12), (14, 14)), ((7, 9), (3, 20)), ((1, 1), (3, 3)), ((14, 14), (24, 24))]
)
def test_interpolation_equals_torchs(grid, new):
    torch = pytest.importorskip("torch")
    table = np.random.default_rng(0).normal(size=(grid[0] * grid[1], 5)).astype(np.float32)
    image = torch.tensor(table, dtype=torch.float64).reshape(1, *grid, 5).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(image, size=new, mode="bicubic", align_corners=False)
    expected = expected.permute(0, 2, 3, 1).reshape(-1, 5).numpy()
    assert np.abs(resize_table(table, grid, new) - expected).max() < 1e-6


def test_the_position_table_is_the_official_expansions():
    steps = golden.steps()  # starts from the official expansion of a model with sin-cos positions
    spec = PretrainSpec(encoder=steps.spec.encoder, decoder_width=64, decoder_heads=1)
    table = Tensor.of(sincos_positions(spec.grid, 32))
    made = adapt.to_classifier(
        spec, {**as_tensors(initial_parameters(spec, 0)), "pos_embed": table}, steps.spec, seed=0
    )
    ours, official = made["pos_embed"].read(), steps.parameters["pos_embed"]
    assert np.abs(ours - official).max() < 1.5e-6  # 1e-6, plus the rounding of the stored number
    assert not ours[98].any()


@pytest.mark.skipif(golden.complete() is None, reason="needs the complete official data: set ARM_GOLDEN")
def test_the_whole_expansion_is_the_official_one():
    folder = golden.complete()
    model = resolve(open_checkpoint_source(folder / "pretrain_checkpoint-40.pth", warn=print))
    target = ClassifierSpec(encoder=model.spec.encoder, classes=10)
    made = official_view(target, read(adapt.to_classifier(model.spec, model.tensors, target, seed=0)))
    with np.load(folder / "ft_gp_expanded_state.npz") as expanded:
        assert set(made) == set(expanded.files)
        fresh = ("cls_token", "head.weight", "pos_embed")
        assert all(np.array_equal(made[n], expanded[n]) for n in expanded.files if n not in fresh)
        assert np.abs(made["pos_embed"] - expanded["pos_embed"]).max() < 1e-6
        assert np.isclose(made["head.weight"].std(), expanded["head.weight"].std(), rtol=0.2)


# -- pretraining model to classifier -------------------------------------------------------------------


def test_a_classifier_copies_the_trunk_to_every_direction(pretrained, tmp_path):
    result = convert("to-classifier", pretrained, tmp_path / "m", "--classes", 5, "--image-size", 24)
    assert result.exit_code == 0, result.output
    before, model = read_model(pretrained).load(), read_model(tmp_path / "m")
    after = model.load()
    assert model.spec == ClassifierSpec(encoder=foreign.TINY, classes=5, image_size=(24, 24))
    for name, value in after.items():
        if name in ("cls_token", "norm_f.weight", "norm_f.bias", "head.weight", "head.bias"):
            continue
        if name == "pos_embed":
            assert np.array_equal(np.delete(value, 18, axis=0), before[name])
            assert not value[18].any()
        elif value.shape == before[name].shape:
            assert np.array_equal(value, before[name])
        else:
            assert all(np.array_equal(value[k], before[name][0]) for k in range(4))
    assert 0 < np.abs(after["head.weight"]).max() < 2e-4
    assert not after["head.bias"].any()
    assert np.array_equal(after["norm_f.weight"], np.ones(8))


def test_new_parameters_come_from_the_seed_and_the_head_has_the_requested_size(pretrained, tmp_path):
    words = ("to-classifier", pretrained)
    for name, seed, std in (("a", 1, 0.02), ("b", 1, 0.02), ("c", 2, 0.02), ("d", 1, 0.04)):
        convert(*words, tmp_path / name, "--classes", 500, "--seed", seed, "--head-std", std)
    heads = {name: read_model(tmp_path / name).load()["head.weight"] for name in "abcd"}
    assert np.array_equal(heads["a"], heads["b"])
    assert not np.array_equal(heads["a"], heads["c"])
    assert np.allclose(2 * heads["a"], heads["d"])
    assert np.isclose(heads["a"].std(), 0.02, rtol=0.05)


@pytest.mark.parametrize("directions", [1, 2, 4])
def test_directions_pooling_and_a_rectangular_size_can_be_chosen(pretrained, tmp_path, directions):
    out = tmp_path / "m"
    convert(
        "to-classifier",
        pretrained,
        out,
        "--classes",
        2,
        "--directions",
        directions,
        "--pooling",
        "cls",
        "--image-size",
        "8x20",
    )
    spec = read_model(out).spec
    assert (spec.directions, spec.pooling, spec.image_size) == (directions, "cls", (8, 20))


def test_a_pretraining_model_needs_a_number_of_classes(pretrained, tmp_path):
    result = convert("to-classifier", pretrained, tmp_path / "m")
    assert result.exit_code == 2
    assert "pass --classes N" in result.output


def test_new_classes_only_replace_the_head_of_a_classifier(finetuned, tmp_path):
    convert("to-classifier", finetuned, tmp_path / "m", "--classes", 3)
    before, model = read_model(finetuned).load(), read_model(tmp_path / "m")
    after = model.load()
    changed = {name for name in after if not np.array_equal(after[name], before[name])}
    assert changed == {"head.weight", "head.bias"}
    assert "classes" not in model.metadata  # the old names are not those of the new head


def test_a_classifier_without_new_classes_keeps_its_head_and_its_names(finetuned, tmp_path):
    convert("to-classifier", finetuned, tmp_path / "m", "--pooling", "mean")
    before, model = read_model(finetuned).load(), read_model(tmp_path / "m")
    assert all(np.array_equal(value, before[name]) for name, value in model.load().items())
    assert model.metadata["classes"] == '["a","b","c"]'


def test_directions_of_a_classifier_are_picked_by_name(finetuned, tmp_path):
    convert("to-classifier", finetuned, tmp_path / "m", "--directions", 2)
    before, after = read_model(finetuned).load(), read_model(tmp_path / "m").load()
    assert np.array_equal(after["layers.4.mixer.A_log"], before["layers.4.mixer.A_log"][:2])
    spec = replace(foreign.CLASSIFIER, scan_directions=(Direction.COLUMN, Direction.ROW))
    made = adapt.to_classifier(foreign.CLASSIFIER, as_tensors(before), spec, seed=0, keep_head=True)
    assert np.array_equal(made["layers.4.mixer.D"].read(), before["layers.4.mixer.D"][[2, 0]])
    again = replace(foreign.CLASSIFIER, scan_directions=tuple(reversed(DIRECTIONS[4])))
    made = adapt.to_classifier(foreign.CLASSIFIER, as_tensors(before), again, seed=0, keep_head=True)
    assert np.array_equal(made["layers.4.mixer.D"].read(), before["layers.4.mixer.D"][::-1])


def test_a_direction_that_was_never_trained_is_refused():
    two = replace(foreign.CLASSIFIER, scan_directions=DIRECTIONS[2])
    tensors = as_tensors(initial_parameters(two, 0))
    with pytest.raises(ValueError, match="there are no weights for direction column"):
        adapt.to_classifier(two, tensors, foreign.CLASSIFIER, seed=0)


def test_another_encoder_is_refused():
    other = replace(foreign.CLASSIFIER, encoder=EncoderSpec(width=8, depth=12, patch=4))
    with pytest.raises(ValueError, match=r"the encoders .* differ: depth 6 and 12"):
        adapt.to_classifier(
            foreign.PRETRAIN, as_tensors(initial_parameters(foreign.PRETRAIN, 0)), other, seed=0
        )


# -- size ----------------------------------------------------------------------------------------------


def test_resizing_a_classifier_keeps_the_class_tokens_row_apart(finetuned, tmp_path):
    convert("resize", finetuned, tmp_path / "m", "--image-size", "24x20")
    before, model = read_model(finetuned).load(), read_model(tmp_path / "m")
    table, after = before["pos_embed"], model.load()
    assert model.spec == replace(foreign.CLASSIFIER, image_size=(24, 20))
    assert np.array_equal(after["pos_embed"][15], table[8])  # the middles of 6x5 and of 4x4 patches
    expected = resize_table(np.delete(table, 8, axis=0), (4, 4), (6, 5))
    assert np.array_equal(np.delete(after["pos_embed"], 15, axis=0), expected)
    assert all(np.array_equal(after[name], before[name]) for name in after if name != "pos_embed")
    assert model.metadata["classes"] == '["a","b","c"]'


def test_resizing_there_and_back_returns_a_smooth_table():
    table = sincos_positions((14, 14), 32)[:, 24:]  # low frequencies
    there = resize_table(resize_table(table, (14, 14), (24, 24)), (24, 24), (14, 14))
    assert np.abs(there - table).max() < 0.05


def test_resizing_a_pretraining_model_computes_its_fixed_tables(pretrained, tmp_path):
    convert("resize", pretrained, tmp_path / "m", "--image-size", "40x24")
    model = read_model(tmp_path / "m")
    after, fresh = model.load(), initial_parameters(model.spec, 0)
    for name in ("pos_embed", "decoder_pos_embed"):
        assert np.array_equal(after[name], fresh[name])
    images = np.random.default_rng(0).normal(size=(1, 40, 24, 3)).astype(np.float32)
    assert np.isfinite(forward(model.spec, after, images)["loss"])


def test_a_size_that_does_not_fit_is_refused_in_one_line(pretrained, tmp_path):
    for size, message in (
        ("25", "not divisible into patches of 4x4 pixels"),
        ("20", "is not divisible into clusters"),
        ("x", "like 224"),
    ):
        result = convert("resize", pretrained, tmp_path / "m", "--image-size", size)
        assert result.exit_code == 2
        assert message in result.output
        assert not (tmp_path / "m").exists()


# -- type and average ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "stored"), [("bfloat16", "BF16"), ("float16", "F16")])
def test_casting_keeps_the_scans_decays_in_float32(finetuned, tmp_path, dtype, stored):
    convert("cast", finetuned, tmp_path / "m", "--dtype", dtype)
    before, model = read_model(finetuned).load(), read_model(tmp_path / "m")
    for name, tensor in model.arrays.items():
        exact = name.endswith(("mixer.A_log", "mixer.D", "mixer.dt_proj.bias"))
        assert tensor.dtype == ("F32" if exact else stored), name
        assert np.array_equal(tensor.read(), before[name]) or not exact
        assert np.allclose(tensor.read(), before[name], rtol=2**-8, atol=1e-4)
    convert("cast", tmp_path / "m", tmp_path / "again", "--dtype", dtype)
    convert("cast", tmp_path / "m", tmp_path / "wide", "--dtype", "float32")
    assert (tmp_path / "m/model.safetensors").stat().st_size < 0.7 * (
        finetuned / "model.safetensors"
    ).stat().st_size
    wide, narrow = read_model(tmp_path / "wide").load(), model.load()
    assert all(np.array_equal(wide[name], narrow[name]) for name in wide)


def test_the_average_of_models_is_their_mean(tmp_path):
    spec = foreign.CLASSIFIER
    parameters = [strange(spec, seed) for seed in range(3)]
    folders = [write_model(tmp_path / f"m{i}", spec, p) for i, p in enumerate(parameters)]
    assert convert("average", *folders, tmp_path / "mean").exit_code == 0
    for name, value in read_model(tmp_path / "mean").load().items():
        expected = np.mean([p[name].astype(np.float64) for p in parameters], axis=0)
        assert np.allclose(value, expected, rtol=1e-7, atol=0)
    assert "averaged over m0, m1, m2" in (tmp_path / "mean/README.md").read_text()


OTHER = replace(foreign.CLASSIFIER, classes=7, image_size=(16, 24))


def test_an_average_needs_two_models_of_one_specification(pretrained, finetuned, tmp_path):
    assert "two or more models" in convert("average", pretrained, tmp_path / "m").output
    result = convert("average", pretrained, finetuned, tmp_path / "m")
    assert result.exit_code == 2
    assert "are different models: pretrain and classifier" in result.output
    other = write_model(tmp_path / "other", OTHER, initial_parameters(OTHER, 0))
    result = convert("average", finetuned, other, tmp_path / "m")
    assert result.exit_code == 2
    message = f"{finetuned} and {other} are different models: classes 3 and 7, image_size 16x16 and 16x24"
    assert result.output == f"Error: {message}\n"


@pytest.mark.parametrize("command", ["to-classifier", "resize", "cast", "average"])
def test_an_existing_output_stops_a_conversion_before_it_begins(finetuned, tmp_path: Path, command):
    words = {
        "to-classifier": ("to-classifier", tmp_path / "missing", finetuned),
        "resize": ("resize", tmp_path / "missing", finetuned, "--image-size", "24"),
        "cast": ("cast", tmp_path / "missing", finetuned, "--dtype", "float16"),
        "average": ("average", tmp_path / "missing", tmp_path / "missing", finetuned),
    }
    result = convert(*words[command])
    assert result.exit_code == 2
    assert f"{finetuned}: already exists" in result.output
