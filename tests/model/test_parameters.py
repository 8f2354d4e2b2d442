"""The parameter table: official counts, initial values, and the strict comparison."""

import math

import numpy as np
import pytest

from arm_core.engine.optimizer import OptimizerSettings, parameter_groups
from arm_core.model.parameters import (
    DT_FLOOR,
    DT_RANGE,
    check_parameters,
    count_parameters,
    initial_parameters,
    initial_value,
    parameter_table,
)
from arm_core.model.presets import classifier_preset, pretrain_preset
from arm_core.model.rng import KeyedRng
from arm_core.model.spec import ClassifierSpec, EncoderSpec, PretrainSpec

ENCODER = EncoderSpec(width=64, depth=6, patch=4)
PRETRAIN = PretrainSpec(
    encoder=ENCODER, image_size=(24, 24), cluster=(2, 2), decoder_width=64, decoder_heads=1
)
CLASSIFIER = ClassifierSpec(encoder=ENCODER, image_size=(24, 24), classes=10)


@pytest.mark.parametrize(
    ("preset", "trainable", "total", "classifier"),
    [
        ("base", 99_243_008, 99_427_328, 85_031_656),
        ("large", 303_721_696, 303_942_880, 297_035_720),
        ("huge", 659_128_064, 659_422_976, 662_682_088),
    ],
)
def test_presets_have_the_official_parameter_counts(preset, trainable, total, classifier):
    assert count_parameters(pretrain_preset(preset)) == trainable
    assert count_parameters(pretrain_preset(preset), trainable_only=False) == total
    assert count_parameters(classifier_preset(preset)) == classifier


def test_initial_values_depend_only_on_seed_and_name():
    row = parameter_table(CLASSIFIER)["layers.2.mixer.in_proj.weight"]
    first = initial_value(row, 3)
    assert (first == initial_parameters(CLASSIFIER, 3)[row.name]).all()
    assert (first == initial_value(parameter_table(PRETRAIN)[row.name], 3)).all()
    assert not np.array_equal(first, initial_value(row, 4))
    assert not np.array_equal(
        first, initial_value(parameter_table(CLASSIFIER)["layers.3.mixer.in_proj.weight"], 3)
    )


def test_initial_values_never_change():
    """Literal values: a change here would change the start of every seeded run."""
    np.testing.assert_allclose(KeyedRng(0, "x").uniform(3), UNIFORM, rtol=0, atol=1e-12)
    np.testing.assert_allclose(KeyedRng(0, "x").normal(3), NORMAL, rtol=0, atol=1e-9)


UNIFORM = [0.010546751786023378, 0.847042508656159, 0.46488995500840247]
NORMAL = [-0.14209214494366898, -1.794754007481212, 0.031864529409465506]


@pytest.mark.parametrize("spec", [PRETRAIN, CLASSIFIER])
def test_all_initial_values_are_finite_float32_of_the_stated_shape(spec):
    check_parameters(spec, initial_parameters(spec, 0))
    for name, value in initial_parameters(spec, 0).items():
        assert value.dtype == np.float32, name
        assert np.isfinite(value).all(), name


def test_initial_distributions_are_the_official_ones():
    values = initial_parameters(PRETRAIN, 1) | initial_parameters(CLASSIFIER, 1)
    bound = {
        "layers.0.mixer.in_proj.weight": 1 / math.sqrt(64),
        "layers.0.mixer.conv.weight": 0.5,
        "layers.0.mixer.dt_proj.weight": 1 / math.sqrt(4),
        "layers.0.mixer.out_proj.weight": 1 / math.sqrt(64 * 6),
        "decoder.0.attention.key_value.weight": math.sqrt(6 / (64 + 128)),
    }
    for name, limit in bound.items():
        largest = float(np.abs(values[name]).max())
        assert 0.95 * limit < largest <= limit * (1 + 1e-6), name
    assert (values["layers.0.mixer.A_log"] == np.log(np.arange(1, 17)).astype(np.float32)).all()
    dt = np.log1p(np.exp(values["layers.0.mixer.dt_proj.bias"].astype(np.float64)))
    assert dt.shape == (4, 64)  # all four directions, unlike the official classifier
    assert dt.min() >= 0.99e-3
    assert dt.max() <= 0.101
    assert abs(values["head.weight"].std() / 0.02 - 1) < 0.1
    embed = values["patch_embed.weight"]
    assert abs(embed.std() * math.sqrt(48) - 1) < 0.05
    assert np.abs(embed).max() <= 2 / 0.8796 / math.sqrt(48) + 1e-6


def test_truncated_normals_keep_their_limit():
    rng = KeyedRng(0, "t").truncated_normal(5000, 1.5)
    assert rng.size == 5000
    assert np.abs(rng).max() < 1.5
    assert abs(rng.mean()) < 0.05


def test_weights_beyond_the_memory_of_the_machine_are_refused_before_they_are_allocated():
    spec = ClassifierSpec(encoder=EncoderSpec(width=16384, depth=512), classes=2)
    with pytest.raises(
        ValueError, match=r"take [0-9,]+ GiB, more than the memory of this machine, [0-9,]+ GiB"
    ):
        initial_parameters(spec, 0)


def test_missing_unexpected_and_misshaped_tensors_are_all_named():
    arrays = dict(initial_parameters(CLASSIFIER, 0))
    del arrays["head.bias"]
    arrays["extra"] = np.zeros(3, np.float32)
    arrays["norm_f.weight"] = np.zeros(5, np.float32)
    with pytest.raises(ValueError, match=r"model\.safetensors: ") as error:
        check_parameters(CLASSIFIER, arrays, source="model.safetensors")
    for part in (
        "missing head.bias (10,)",
        "unexpected extra (3,)",
        "norm_f.weight: expected (64,), found (5,)",
    ):
        assert part in str(error.value)


def test_a_file_of_another_preset_is_recognised():
    shapes = {name: np.empty(row.shape, np.float32) for name, row in
              parameter_table(classifier_preset("tiny")).items()}  # fmt: skip
    with pytest.raises(ValueError, match="the file has the size of 'tiny'"):
        check_parameters(classifier_preset("small"), shapes)


def test_decay_and_layers_follow_the_official_groups():
    table = parameter_table(CLASSIFIER)
    assert {row.layer for name, row in table.items() if name.startswith("layers.4.")} == {5}
    assert {table[name].layer for name in ("cls_token", "pos_embed", "patch_embed.weight")} == {0}
    assert {table[name].layer for name in ("norm_f.bias", "head.weight")} == {7}
    decayed = {n.split("layers.0.mixer.")[1] for n, row in table.items() if row.decay and ".0.mixer" in n}
    assert decayed == {
        "in_proj.weight", "conv.weight", "x_proj.weight", "dt_proj.weight", "A_log", "out_proj.weight",
    }  # fmt: skip
    assert parameter_table(PRETRAIN)["query_token"].decay
    assert not table["cls_token"].decay
    assert not table["pos_embed"].decay


def test_groups_cover_each_trainable_tensor_once_with_its_scale():
    settings = OptimizerSettings(layer_decay=0.5, weight_decay=0.1)
    groups = parameter_groups(CLASSIFIER, settings)
    names = [name for group in groups for name in group.names]
    assert sorted(names) == sorted(parameter_table(CLASSIFIER))
    scale = {name: (group.lr_scale, group.weight_decay) for group in groups for name in group.names}
    assert scale["head.weight"] == (1.0, 0.1)
    assert scale["layers.5.mixer.D"] == (0.5, 0.0)
    assert scale["cls_token"] == (0.5**7, 0.0)
    fixed = {name for group in parameter_groups(PRETRAIN, settings) for name in group.names}
    assert "pos_embed" not in fixed
    assert "decoder_pos_embed" not in fixed


@pytest.mark.parametrize(
    "change", [{"betas": (0.9, 1.0)}, {"clip": 0.0}, {"layer_decay": 1.5}, {"ema_decay": 1.0}]
)
def test_settings_out_of_range_are_named(change):
    (name,) = change
    with pytest.raises(ValueError, match=name):
        OptimizerSettings(**change)


def test_step_sizes_of_a_new_model_are_those_that_were_drawn(classifier_spec: ClassifierSpec) -> None:
    """softplus(bias) is log-uniform in its range, to float32; log(dt) as the bias would be 5 % off."""
    row = parameter_table(classifier_spec)["layers.0.mixer.dt_proj.bias"]
    bias = initial_value(row, 0).astype(np.float64)
    low, high = np.log(DT_RANGE)
    drawn = np.exp(low + KeyedRng(0, row.name).uniform(bias.size) * (high - low)).reshape(bias.shape)
    np.testing.assert_allclose(np.log1p(np.exp(bias)), np.maximum(drawn, DT_FLOOR), rtol=1e-5)
