"""The official names, shapes and layouts, read both ways."""

from __future__ import annotations

import golden
import numpy as np
import pytest

from arm_convert.official import (
    MASK,
    canonical_view,
    from_official,
    official_mask,
    official_shapes,
    official_view,
    spec_from_official,
    to_official,
)
from arm_core.files.safetensors import Tensor, as_tensors
from arm_core.model.parameters import initial_parameters, parameter_table
from arm_core.model.presets import classifier_preset, pretrain_preset
from arm_core.model.reference.model import forward
from arm_core.model.spec import ClassifierSpec, Direction, EncoderSpec, Pooling, PretrainSpec

TINY = EncoderSpec(width=8, depth=6, patch=4)
PRETRAIN = PretrainSpec(encoder=TINY, image_size=(24, 24), cluster=(2, 2), decoder_width=8, decoder_heads=1)
CLASSIFIER = ClassifierSpec(encoder=TINY, classes=3, image_size=(16, 16))


@pytest.mark.parametrize(
    ("spec", "kind"), [(pretrain_preset("base"), "pretrain"), (classifier_preset("base"), "classifier")]
)
def test_the_base_models_have_exactly_the_official_names_and_shapes(spec, kind):
    assert official_shapes(spec) == golden.official_names(kind)


@pytest.mark.parametrize("spec", [pretrain_preset("base"), classifier_preset("base"), PRETRAIN, CLASSIFIER])
def test_a_spec_is_found_from_its_own_names_and_shapes(spec):
    assert spec_from_official(official_shapes(spec)) == spec


@pytest.mark.parametrize("name", ["pretrain_strong", "classifier_strong"])
def test_official_weights_through_the_table_reproduce_the_official_outputs(name):
    strong = golden.load(name)
    outputs = forward(strong.spec, strong.parameters, strong.images)
    errors = {key: strong.error(key, outputs[key]) for key in strong.expected if key in outputs}
    assert len(errors) >= 8
    assert max(errors.values()) < 5e-5, errors


@pytest.mark.parametrize("spec", [PRETRAIN, CLASSIFIER])
def test_the_round_trip_is_exact_in_both_directions(spec):
    parameters = initial_parameters(spec, 1)
    official = official_view(spec, parameters)
    back = canonical_view(spec, official)
    assert back.keys() == parameters.keys()
    assert all(np.array_equal(back[name], parameters[name]) for name in parameters)
    lazy = to_official(spec, as_tensors(parameters))
    assert {name: tensor.shape for name, tensor in lazy.items()} == official_shapes(spec)
    assert all(np.array_equal(lazy[name].read(), official[name]) for name in official)
    again = from_official(spec, lazy)
    assert all(np.array_equal(again[name].read(), parameters[name]) for name in parameters)


def test_the_patch_convolution_becomes_one_product_over_patches():
    spec, rng = CLASSIFIER, np.random.default_rng(0)
    kernel = rng.normal(size=(8, 3, 4, 4)).astype(np.float32)
    patch = rng.normal(size=(4, 4, 3)).astype(np.float32)
    row = next(r for r in parameter_table(spec).values() if r.name == "patch_embed.weight")
    ours = canonical_view(spec, {"patch_embed.proj.weight": kernel})[row.name]
    assert np.allclose(ours @ patch.reshape(-1), np.einsum("dcij,ijc->d", kernel, patch), rtol=1e-5)


def test_directions_find_their_suffix_by_name_and_not_by_position():
    order = (Direction.COLUMN, Direction.ROW_REVERSE)
    spec = ClassifierSpec(encoder=TINY, classes=3, image_size=(16, 16), scan_directions=order)
    D = np.arange(16, dtype=np.float32).reshape(2, 8)
    official = official_view(spec, {"layers.3.mixer.D": D})
    assert official.keys() == {"layers.3.mixer.D_c", "layers.3.mixer.D_b"}
    assert np.array_equal(official["layers.3.mixer.D_c"], D[0])


def test_the_mask_buffer_is_recreated_as_the_official_code_builds_it():
    mask = official_mask(pretrain_preset("base"))
    segments = np.arange(128) // 16
    assert mask.dtype == np.float32
    assert np.array_equal(mask == 0, segments[:, None] >= segments[None, :])
    assert np.isneginf(mask[mask != 0]).all()
    assert MASK in to_official(PRETRAIN, as_tensors(initial_parameters(PRETRAIN, 0)))


def test_pooling_comes_from_the_arguments_or_from_the_caller():
    shapes = official_shapes(CLASSIFIER)
    assert spec_from_official(shapes, {"global_pool": False}).pooling is Pooling.CLS
    assert spec_from_official(shapes, {"global_pool": True}).pooling is Pooling.MEAN
    assert spec_from_official(shapes, {"global_pool": True}, pooling=Pooling.CLS).pooling is Pooling.CLS


def test_missing_and_misshaped_tensors_are_named():
    tensors = to_official(CLASSIFIER, as_tensors(initial_parameters(CLASSIFIER, 0)))
    del tensors["norm_f.weight"]
    tensors["head.bias"] = Tensor.of(np.zeros(4, np.float32))
    with pytest.raises(
        ValueError, match=r"missing norm_f.weight \(8,\); head.bias: expected \(3,\), found \(4,\)"
    ):
        from_official(CLASSIFIER, tensors)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["cls_token", "blocks.0.attn.qkv.weight"], "a Vision Transformer: it has blocks.0.attn.qkv.weight"),
        (["conv1.weight", "layer1.0.conv1.weight"], "a ResNet: it has layer1.0.conv1.weight"),
        (["a", "b"], "found 2 tensors like a, b"),
        ([], "found 0 tensors like none"),
    ],
)
def test_another_architecture_is_refused_with_the_key_that_identified_it(names, message):
    with pytest.raises(ValueError, match=message):
        spec_from_official(dict.fromkeys(names, (1,)))
