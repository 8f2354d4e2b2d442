"""The specification: presets, refusals, and the JSON round trip."""

import json

import pytest

from arm_core.model.spec import (
    DIRECTIONS,
    PRESETS,
    ClassifierSpec,
    Direction,
    EncoderSpec,
    Pooling,
    PredictionOrder,
    PretrainSpec,
    Target,
    classifier_preset,
    from_json,
    pretrain_preset,
    to_json,
)

ENCODER = EncoderSpec(width=32, depth=6, patch=4)


def pretrain(**changes):
    fields = {"image_size": (24, 24), "cluster": (2, 2), "decoder_width": 32, "decoder_heads": 2}
    return PretrainSpec(**{"encoder": ENCODER, **fields, **changes})


def classifier(**changes):
    return ClassifierSpec(**{"encoder": ENCODER, "image_size": (24, 24), "classes": 10, **changes})


@pytest.mark.parametrize(("preset", "taps"), [("base", (6, 8, 10, 12)), ("huge", (12, 16, 20, 24))])
def test_taps_stand_where_the_official_models_read(preset, taps):
    assert pretrain_preset(preset).taps == taps


def test_sizes_follow_from_the_official_base_model():
    spec = pretrain_preset("base")
    assert (spec.grid, spec.patches, spec.clusters, spec.tokens) == ((12, 12), 144, 9, 128)
    assert (spec.encoder.dt_rank, spec.encoder.mlp_width, spec.encoder.patch_values) == (48, 2048, 768)
    classes = classifier_preset("base")
    assert (classes.tokens, classes.class_position, classes.directions) == (197, 98, 4)


@pytest.mark.parametrize("preset", PRESETS)
def test_json_round_trip_gives_an_equal_spec(preset):
    for spec in (pretrain_preset(preset), classifier_preset(preset, classes=7)):
        assert from_json(json.loads(json.dumps(to_json(spec)))) == spec


def test_json_round_trip_keeps_every_choice():
    spec = pretrain(
        image_size=(24, 48),
        cluster=(3, 4),
        prediction_order=PredictionOrder.RANDOM,
        order_seed=9,
        target=Target.RAW,
        decoder_depth=2,
    )
    assert from_json(json.loads(json.dumps(to_json(spec)))) == spec
    spec = classifier(image_size=(16, 24), scan_directions=DIRECTIONS[2], pooling=Pooling.CLS)
    assert from_json(json.loads(json.dumps(to_json(spec)))) == spec


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (lambda: EncoderSpec(width=0, depth=6), "width must be a whole number of 1 or more, found 0"),
        (lambda: EncoderSpec(width=8, depth=6, norm_eps=0.0), "norm_eps must be above 0"),
        (
            lambda: pretrain(image_size=(25, 24)),
            "whole number of 4-pixel patches; the nearest is 24x24",
        ),
        (lambda: pretrain(cluster=(4, 4)), "do not tile the grid of 6x6 patches"),
        (lambda: pretrain(cluster=(6, 6)), "nothing to predict"),
        (lambda: pretrain(encoder=EncoderSpec(width=32, depth=8, patch=4)), "multiple of 6, found 8"),
        (lambda: pretrain(decoder_heads=3), "not a multiple of decoder_heads 3"),
        (lambda: pretrain(decoder_width=30), "multiple of 4 channels, found decoder_width 30"),
        (lambda: pretrain(order_seed=-1), "order_seed must be a whole number"),
        (lambda: pretrain(prediction_order="spiral"), "spiral"),
        (lambda: classifier(classes=0), "classes must be a whole number"),
        (
            lambda: classifier(scan_directions=tuple(Direction)[:3]),
            "1, 2 or 4 directions, found 3",
        ),
        (lambda: classifier(scan_directions=("row", "row")), "may stand once"),
        (lambda: classifier(image_size=(4, 4)), "two patches or more"),
        (lambda: pretrain_preset("giant"), "unknown model 'giant'; known are digits, tiny, small, base"),
    ],
)
def test_invalid_combinations_are_refused_with_a_sentence(build, sentence):
    with pytest.raises(ValueError, match=sentence):
        build()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"format": "arm-vision/9"}, "expected format 'arm-vision/1', found 'arm-vision/9'"),
        ({"kind": "detector"}, "expected kind pretrain or classifier, found 'detector'"),
        ({"colour": 1}, "config: unknown colour"),
        ({"encoder": {"width": 8}}, "config.encoder: missing depth"),
        ({"encoder": None}, "expected 'encoder' to be an object"),
    ],
)
def test_a_config_that_is_not_understood_is_refused_by_name(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        from_json({**to_json(classifier()), **change})


def test_a_missing_field_is_named():
    data = to_json(classifier())
    del data["classes"]
    with pytest.raises(ValueError, match="missing classes"):
        from_json(data)
