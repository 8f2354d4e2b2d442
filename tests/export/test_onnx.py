"""ONNX files against the float64 reference, the official computation, and both engines."""

import json

import golden
import numpy as np
import pytest

from arm_core.data.sources import Item
from arm_core.data.transforms import EvalTransform
from arm_core.engine.protocol import EngineOptions, TrainingState
from arm_core.engine.registry import installed_backends
from arm_core.model.parameters import initial_parameters, parameter_table
from arm_core.model.presets import classifier_preset
from arm_core.model.reference.model import forward
from arm_core.model.rng import KeyedRng
from arm_core.model.spec import DIRECTIONS, ClassifierSpec, Direction, EncoderSpec, PretrainSpec, from_json

onnx = pytest.importorskip("onnx", reason="needs onnx, of the extra 'onnx'")
pytest.importorskip("onnxruntime", reason="needs onnxruntime, of the extra 'onnx'")

from arm_convert.exported import noise_images  # noqa: E402
from arm_convert.onnx_model import file as onnx_file  # noqa: E402
from arm_convert.onnx_model.builder import FLOAT, UINT8, Builder, value  # noqa: E402
from arm_convert.onnx_model.file import OnnxOptions, build  # noqa: E402
from arm_convert.onnx_model.preprocess import preprocess  # noqa: E402
from arm_convert.onnx_model.quantize import write_int8  # noqa: E402
from arm_convert.onnx_model.session import OnnxFile  # noqa: E402

TINY = EncoderSpec(width=32, depth=6, patch=4)
FLOAT32 = 1e-5
"""Largest difference of an output relative to its largest value."""


def noisy_parameters(spec, seed=1):
    """Initial values plus noise, so that biases are not 0, norms are not trivial, and directions differ."""
    values = initial_parameters(spec, seed)
    for name, row in parameter_table(spec).items():
        noise = KeyedRng(seed, "noise", name).normal(row.size).reshape(row.shape)
        values[name] = (values[name] + 0.1 * noise).astype(np.float32)
    return values


def normal_images(spec, count=2):
    shape = (count, *spec.image_size, spec.encoder.channels)
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def written(tmp_path, spec, parameters, **options):
    model = build(spec, parameters, options=OnnxOptions(**options))
    model.write(tmp_path / "model.onnx", force=True)
    return OnnxFile(tmp_path / "model.onnx", threads=1)


def difference(found, expected):
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("size", [(24, 24), (12, 20), (8, 4)], ids=["6x6", "odd 3x5", "2x1"])
@pytest.mark.parametrize("directions", [1, 2, 4])
@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_a_classifier_computes_the_reference(tmp_path, size, directions, pooling):
    spec = ClassifierSpec(
        encoder=TINY, classes=7, image_size=size, scan_directions=DIRECTIONS[directions], pooling=pooling
    )
    parameters, images = noisy_parameters(spec), normal_images(spec)
    expected = forward(spec, parameters, images)
    logits = written(tmp_path, spec, parameters, dynamic_batch=True).run(images)["logits"]
    assert difference(logits, expected["logits"]) < FLOAT32
    assert difference(expected["logits"][::-1], expected["logits"]) > 0.01  # it depends on the image
    file = written(tmp_path, spec, parameters, dynamic_batch=True, features=True)
    found = file.run(images)
    assert set(found) == {"features", "tokens"}
    assert difference(found["features"], expected["features"]) < FLOAT32
    assert difference(found["tokens"], expected["norm_f"]) < FLOAT32


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("directions", [1, 4])
def test_the_influence_output_is_the_map_of_the_last_layer(tmp_path, directions, pooling):
    from arm_core.explain.influence import influence
    from arm_core.explain.layout import on_grid

    backend = next((b for b in installed_backends().values() if b.missing() is None), None)
    if backend is None:
        pytest.skip("needs an engine")
    spec = ClassifierSpec(
        encoder=TINY, classes=7, image_size=(12, 20), scan_directions=DIRECTIONS[directions], pooling=pooling
    )
    parameters, images = noisy_parameters(spec), normal_images(spec)
    state, last = TrainingState(parameters=parameters), spec.encoder.depth - 1
    engine = backend.create_engine(spec, state, options=EngineOptions(device="cpu"))
    maps = influence(engine, images, layers=[last]).to("class").mean[:, 0, 0]
    found = written(tmp_path, spec, parameters, dynamic_batch=True, influence=True).run(images)
    assert difference(found["influence"], on_grid(spec, maps)) < 2e-5
    assert difference(found["logits"], forward(spec, parameters, images)["logits"]) < FLOAT32


def test_one_direction_that_is_not_the_raster_order_is_put_back(tmp_path):
    spec = ClassifierSpec(
        encoder=TINY, classes=7, image_size=(12, 20), scan_directions=(Direction.COLUMN_REVERSE,)
    )
    parameters, images = noisy_parameters(spec), normal_images(spec)
    logits = written(tmp_path, spec, parameters, dynamic_batch=True).run(images)["logits"]
    assert difference(logits, forward(spec, parameters, images)["logits"]) < FLOAT32


@pytest.mark.parametrize("opset", [18, 20, 23])
def test_every_operator_set_computes_the_same(tmp_path, classifier_spec, opset):
    parameters, images = noisy_parameters(classifier_spec), normal_images(classifier_spec, 1)
    logits = written(tmp_path, classifier_spec, parameters, opset=opset).run(images)["logits"]
    assert difference(logits, forward(classifier_spec, parameters, images)["logits"]) < FLOAT32


@pytest.mark.parametrize("changes", [{}, {"prediction_order": "random"}, {"image_size": (16, 24)}], ids=str)
def test_a_pretraining_encoder_computes_the_reference(tmp_path, pretrain_spec, changes):
    fields = {"encoder": TINY, "image_size": (24, 24), "cluster": (2, 2), "decoder_width": 16}
    spec = PretrainSpec(**{**fields, "decoder_depth": 2, "decoder_heads": 2, **changes})
    parameters, images = noisy_parameters(spec), normal_images(spec)
    found = written(tmp_path, spec, parameters, features=True, dynamic_batch=True).run(images)
    assert difference(found["decoder_input"], forward(spec, parameters, images)["decoder_input"]) < FLOAT32


def test_a_pretraining_model_is_exported_with_features_only(pretrain_spec):
    with pytest.raises(ValueError, match="pass --features"):
        build(pretrain_spec, initial_parameters(pretrain_spec, 0), options=OnnxOptions())


def test_the_official_classifier_gives_the_official_logits(tmp_path):
    strong = golden.load("classifier_strong")
    file = written(tmp_path, strong.spec, strong.parameters, dynamic_batch=True)
    assert strong.error("logits", file.run(strong.images)["logits"]) < 1e-4
    file = written(tmp_path, strong.spec, strong.parameters, dynamic_batch=True, features=True)
    found = file.run(strong.images)
    assert strong.error("features", found["features"]) < 1e-4
    assert strong.error("norm_f", found["tokens"]) < 1e-4


def test_the_official_pretraining_encoder_gives_the_official_latents(tmp_path):
    strong = golden.load("pretrain_strong")
    file = written(tmp_path, strong.spec, strong.parameters, dynamic_batch=True, features=True)
    assert strong.error("decoder_input", file.run(strong.images)["decoder_input"]) < 1e-4


@pytest.mark.parametrize("backend", ["torch", "mlx"])
def test_an_engine_gives_the_same_logits(tmp_path, classifier_spec, backend):
    found = installed_backends().get(backend)
    if found is None or found.missing():
        pytest.skip(f"needs the {backend} engine")
    parameters, images = noisy_parameters(classifier_spec), normal_images(classifier_spec)
    state = TrainingState(parameters=parameters)
    engine = found.create_engine(classifier_spec, state, options=EngineOptions(device="cpu"))
    file = written(tmp_path, classifier_spec, parameters, dynamic_batch=True)
    assert difference(file.run(images)["logits"], engine.forward(images)["logits"]) < FLOAT32


def test_a_fixed_batch_takes_one_image_and_a_dynamic_one_any_number(tmp_path, classifier_spec):
    parameters, images = noisy_parameters(classifier_spec), normal_images(classifier_spec, 3)
    one = written(tmp_path, classifier_spec, parameters)
    with pytest.raises(Exception, match="index: 0 Got: 3 Expected: 1"):
        one.run(images)
    many = written(tmp_path, classifier_spec, parameters, dynamic_batch=True)
    joined = np.concatenate([many.run(images[i : i + 1])["logits"] for i in range(3)])
    assert difference(many.run(images)["logits"], joined) < FLOAT32


def test_half_precision_stays_close_and_halves_the_file(tmp_path, classifier_spec):
    parameters, images = noisy_parameters(classifier_spec), normal_images(classifier_spec, 1)
    expected = forward(classifier_spec, parameters, images)["logits"]
    full = written(tmp_path, classifier_spec, parameters)
    half = written(tmp_path, classifier_spec, parameters, half=True)
    assert half.precision == "float16"
    assert FLOAT32 < difference(half.run(images)["logits"], expected) < 0.05
    assert half.facts["bytes"] < 0.75 * full.facts["bytes"]


def test_int8_weights_stay_close_and_shrink_the_file(tmp_path):
    spec = classifier_preset("tiny", classes=10, image_size=(64, 64))
    parameters, images = initial_parameters(spec, 1), normal_images(spec, 1)
    model = build(spec, parameters, options=OnnxOptions())
    model.write(tmp_path / "full.onnx", force=False)
    write_int8(model, tmp_path / "int8.onnx", force=False)
    full, quantized = OnnxFile(tmp_path / "full.onnx"), OnnxFile(tmp_path / "int8.onnx")
    assert (quantized.precision, quantized.spec) == ("int8", spec)
    expected = full.run(images)["logits"]
    assert FLOAT32 < difference(quantized.run(images)["logits"], expected) < 0.1
    assert quantized.facts["bytes"] < 0.5 * full.facts["bytes"]
    with pytest.raises(ValueError, match="already exists"):
        write_int8(model, tmp_path / "int8.onnx", force=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full.onnx", "int8.onnx"]


def test_large_gates_do_not_spoil_an_int8_file(tmp_path):
    """In trained models a few channels of gate times scan are much larger than the others."""
    spec = ClassifierSpec(encoder=EncoderSpec(width=64, depth=6, patch=4), classes=10, image_size=(24, 24))
    parameters, images = noisy_parameters(spec), normal_images(spec, 4)
    for i in range(spec.encoder.depth):
        parameters[f"layers.{i}.mixer.in_proj.weight"][[64, 70, 80]] *= 1000  # rows of z
        parameters[f"layers.{i}.mixer.out_proj.weight"][:, [0, 6, 16]] /= 1000
    model = build(spec, parameters, options=OnnxOptions(dynamic_batch=True))
    write_int8(model, tmp_path / "int8.onnx", force=False)
    expected = forward(spec, parameters, images)["logits"]
    found = OnnxFile(tmp_path / "int8.onnx").run(images)["logits"]
    assert difference(found, expected) < 0.08  # 0.2 if the output projection is quantized


PICTURES = [((24, 24), (40, 56)), ((24, 24), (97, 61)), ((24, 24), (12, 9)), ((12, 20), (60, 30))]
"""Sizes of models, and of larger, smaller, wide and tall pictures."""


@pytest.mark.parametrize(("size", "picture"), [*PICTURES, ((24, 24), (27, 27))], ids=str)
@pytest.mark.parametrize("crop_fraction", [None, 1.0, 0.7])
def test_preprocessing_inside_the_file_is_the_evaluation_transform(size, picture, crop_fraction):
    import onnxruntime

    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.1)
    transform = EvalTransform(crop_fraction=crop_fraction, mean=mean, std=std)
    g = Builder()
    prepared = preprocess(g, "image", transform, size, np.float32, batch=None)
    g.nodes.append(onnx.helper.make_node("Identity", [prepared], ["y"]))
    graph = onnx.helper.make_graph(
        g.nodes,
        "preprocess",
        [value("image", UINT8, ("batch", "height", "width", 3))],
        [value("y", FLOAT, ("batch", 3, *size))],
        [onnx.numpy_helper.from_array(array, name) for name, array in g.constants.items()],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=8)
    pixels = np.random.default_rng(3).integers(0, 256, (2, *picture, 3), dtype=np.uint8)
    found = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"image": pixels})[0]
    expected = np.stack([transform(Item(image=image, label=-1, name=""), size) for image in pixels])
    grey = np.abs(found.transpose(0, 2, 3, 1) - expected) * np.array(std) * 255
    assert grey.max() < 1.01  # Pillow and onnxruntime may round a value to neighbours
    assert (grey > 0.01).mean() < 0.01


def test_a_file_with_preprocessing_takes_a_batch_of_pictures(tmp_path, classifier_spec):
    parameters, transform = noisy_parameters(classifier_spec), EvalTransform()
    images = np.stack(noise_images(classifier_spec, 2))
    size = classifier_spec.image_size
    prepared = np.stack([transform(Item(image=image, label=-1, name=""), size) for image in images])
    file = written(tmp_path, classifier_spec, parameters, preprocess=transform, dynamic_batch=True)
    assert file.raw_pixels
    expected = forward(classifier_spec, parameters, prepared)["logits"]
    assert difference(file.run(images)["logits"], expected) < 0.01


def test_the_base_model_has_at_most_a_thousand_nodes():
    spec = classifier_preset("base")
    zeros = {name: np.zeros(row.shape, np.float32) for name, row in parameter_table(spec).items()}
    assert build(spec, zeros, options=OnnxOptions()).nodes <= 700
    inside = OnnxOptions(preprocess=EvalTransform(), dynamic_batch=True, half=True)
    assert build(spec, zeros, options=inside).nodes <= 1000


def test_the_file_is_plain_onnx_and_names_its_model(tmp_path, classifier_spec):
    names = [f"kind {i}" for i in range(10)]
    model = build(
        classifier_spec,
        noisy_parameters(classifier_spec),
        options=OnnxOptions(),
        classes=tuple(names),
        metadata={"history": '["made"]', "license": "CC0-1.0"},
    )
    model.write(tmp_path / "model.onnx", force=False)
    onnx.checker.check_model(tmp_path / "model.onnx", full_check=True)
    found = onnx.load(tmp_path / "model.onnx")
    assert {node.domain for node in found.graph.node} == {""}
    strings = {prop.key: prop.value for prop in found.metadata_props}
    assert json.loads(strings["classes"]) == names
    assert from_json(json.loads(strings["spec"])) == classifier_spec
    assert (strings["history"], strings["license"]) == ('["made"]', "CC0-1.0")


def test_constants_of_a_large_model_are_in_a_second_file(tmp_path, classifier_spec, monkeypatch):
    parameters, images = noisy_parameters(classifier_spec), normal_images(classifier_spec, 1)
    expected = written(tmp_path, classifier_spec, parameters).run(images)["logits"]
    monkeypatch.setattr(onnx_file, "LARGEST_FILE", 1000)
    file = written(tmp_path, classifier_spec, parameters)
    assert (tmp_path / "model.onnx").stat().st_size < 300_000 < (tmp_path / "model.onnx.data").stat().st_size
    assert file.facts["bytes"] > 300_000
    np.testing.assert_array_equal(file.run(images)["logits"], expected)


def test_parameters_of_another_model_are_refused(classifier_spec, pretrain_spec):
    with pytest.raises(ValueError, match="missing cls_token"):
        build(classifier_spec, initial_parameters(pretrain_spec, 0), options=OnnxOptions())


@pytest.mark.parametrize("opset", [17, 24])
def test_other_operator_sets_are_refused(opset):
    with pytest.raises(ValueError, match=f"opset: expected 18 to 23, found {opset}"):
        OnnxOptions(opset=opset)


def test_a_file_that_is_not_onnx_is_refused_by_name(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"no model")
    with pytest.raises(ValueError, match=r"model\.onnx: onnxruntime cannot load this file"):
        OnnxFile(tmp_path / "model.onnx")


def test_an_onnx_file_of_another_program_is_refused(tmp_path):
    from onnx import TensorProto, helper

    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(model, tmp_path / "other.onnx")
    with pytest.raises(ValueError, match="expected a file of `arm export`"):
        OnnxFile(tmp_path / "other.onnx")


def test_noise_images_are_the_same_on_every_machine(classifier_spec):
    images = noise_images(classifier_spec, 2)
    assert images[0].shape == (33, 38, 3)
    assert images[0].dtype == np.uint8
    assert not np.array_equal(images[0], images[1])
