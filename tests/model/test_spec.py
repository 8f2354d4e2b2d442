"""The specification: presets, refusals, and the JSON round trip."""

import json

import pytest

from arm_core.model.presets import PRESETS, classifier_preset, pretrain_preset
from arm_core.model.spec import (
    DIRECTIONS,
    ClassifierSpec,
    Direction,
    EncoderSpec,
    Pooling,
    PredictionOrder,
    PretrainSpec,
    Target,
    from_json,
    to_json,
)

ENCODER = EncoderSpec(width=32, depth=6, patch=4)


def pretrain(**changes):
    fields = {"image_size": (24, 24), "cluster": (2, 2), "decoder_width": 32, "decoder_heads": 2}
    return PretrainSpec(**{"encoder": ENCODER, **fields, **changes})


def classifier(**changes):
    return ClassifierSpec(**{"encoder": ENCODER, "image_size": (24, 24), "classes": 10, **changes})


@pytest.mark.parametrize(("preset", "taps"), [("base", (6, 8, 10, 12)), ("huge", (12, 16, 20, 24))])
def test_taps_are_at_the_depths_of_the_official_models(preset, taps):
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
        (
            lambda: EncoderSpec(width=0, depth=6),
            r"encoder\.width: expected a whole number, 1 to 16384, found 0",
        ),
        (
            lambda: EncoderSpec(width=8, depth=6, norm_eps=0.0),
            "norm_eps: expected above 0 and below 1, found 0.0",
        ),
        (
            lambda: pretrain(image_size=(25, 24)),
            "not divisible into patches of 4x4 pixels; the nearest divisible size is 24x24",
        ),
        (
            lambda: pretrain(cluster=(4, 4)),
            "the grid of 6x6 patches is not divisible into clusters of 4x4 patches",
        ),
        (lambda: pretrain(cluster=(6, 6)), "nothing to predict"),
        (lambda: pretrain(encoder=EncoderSpec(width=32, depth=8, patch=4)), "divisible by 6, found 8"),
        (lambda: pretrain(decoder_heads=3), "not divisible by decoder_heads 3"),
        (lambda: pretrain(decoder_width=30), "decoder_width must be divisible by 4 .* found 30"),
        (
            lambda: pretrain(order_seed=-1),
            "order_seed: expected a whole number, 0 or more and below 2\\*\\*63, found -1",
        ),
        (
            lambda: pretrain(prediction_order="spiral"),
            "prediction_order: unknown 'spiral'; expected one of: row,",
        ),
        (lambda: pretrain(target="normalised"), "target: unknown 'normalised'; did you mean 'normalized'"),
        (lambda: classifier(classes=0), "classes: expected a whole number, 1 to 10000000, found 0"),
        (
            lambda: classifier(scan_directions=tuple(Direction)[:3]),
            "1, 2 or 4 directions, found 3",
        ),
        (lambda: classifier(scan_directions=("row", "row")), "scan direction row appears twice"),
        (lambda: classifier(image_size=(4, 4)), "at least two patches"),
        (
            lambda: pretrain_preset("giant"),
            "unknown preset 'giant'; expected one of: digits, tiny, small, base",
        ),
        (lambda: pretrain_preset("bsae"), "unknown preset 'bsae'; did you mean 'base'"),
        (
            lambda: EncoderSpec(width=65536, depth=6),
            "width: expected a whole number, 1 to 16384, found 65536",
        ),
        (lambda: EncoderSpec(width=8, depth=600_000), "depth: expected a whole number, 1 to 512"),
        (lambda: EncoderSpec(width=10**400, depth=6), "found a whole number of more than 60 digits"),
        (lambda: EncoderSpec(width=True, depth=6), "found True"),
        (
            lambda: pretrain(image_size=(65536, 65536)),
            "image_size.height: expected a whole number, 1 to 16384",
        ),
        (lambda: pretrain(image_size=(16384, 16384)), "has more than 65536 patches of 4x4 pixels"),
        (lambda: pretrain(cluster=(1,)), r"cluster: expected two whole numbers, .* found \(1,\)"),
        (lambda: pretrain(image_size=24), "image_size: expected two whole numbers"),
        (lambda: classifier(classes=10**11), "classes: expected a whole number"),
        (lambda: classifier(scan_directions=("row", 5)), "scan_directions: unknown 5; expected a name"),
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
        ({"colour": 1}, r"unknown key config\.colour; expected one of: encoder, classes"),
        ({"encoder": {"width": 8}}, "config.encoder: missing depth"),
        ({"imagesize": [8, 8]}, r"unknown key config\.imagesize; did you mean 'image_size'"),
        ({"kind": []}, "expected kind pretrain or classifier"),
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
