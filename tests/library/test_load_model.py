"""`arm_vision.load_model` on both engines: sources, numbers, sizes, features, saving, messages."""

from __future__ import annotations

import shutil
import warnings
from dataclasses import replace
from typing import Any

import golden
import numpy as np
import pytest
from converting import SPECS, official_checkpoint
from PIL import Image

import arm_vision
from arm_convert.adapt import resize
from arm_core.engine.registry import installed_backends
from arm_core.files.model_folder import write_model
from arm_core.files.safetensors import as_tensors
from arm_core.model.parameters import initial_parameters, parameter_table
from arm_core.model.reference.model import forward
from arm_core.model.spec import ClassifierSpec, EncoderSpec, Pooling

ENGINES = [name for name in ("torch", "mlx") if installed_backends()[name].missing() is None]
every_engine = pytest.mark.parametrize("backend", ENGINES)
TOLERANCE = 1e-5
"""Tolerances relative to each tensor's largest value, as for the engines."""


def put(backend: str, images: np.ndarray) -> Any:
    """Images (B, H, W, C) in the layout of an engine's library models."""
    if backend == "torch":
        import torch

        return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
    import mlx.core as mx

    return mx.array(images)


def get(value: Any) -> np.ndarray:
    return value.detach().numpy() if hasattr(value, "detach") else np.array(value)


def error(found: Any, expected: np.ndarray) -> float:
    return float(np.abs(get(found) - expected).max() / np.abs(expected).max())


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """A classifier on an odd grid with 2 directions and the class token as its features."""
    encoder = EncoderSpec(width=24, depth=3, patch=8)
    spec = ClassifierSpec(
        encoder=encoder, classes=5, image_size=(40, 24), scan_directions=("row", "row_reverse"), pooling="cls"
    )
    folder = tmp_path_factory.mktemp("odd") / "model"
    write_model(folder, spec, initial_parameters(spec, 3))
    images = np.random.default_rng(0).standard_normal((3, 40, 24, 3)).astype(np.float32)
    return folder, spec, images


@every_engine
def test_the_official_classifier_gives_the_official_features_and_logits(backend, tmp_path):
    data = golden.load("classifier_strong")
    write_model(tmp_path / "m", data.spec, data.parameters)
    model = arm_vision.load_model(tmp_path / "m", backend)
    images = put(backend, data.images)
    assert data.error("logits", get(model(images))) < TOLERANCE
    tokens = model.forward_features(images)
    assert data.error("norm_f", get(tokens)) < TOLERANCE
    assert data.error("features", get(model.forward_head(tokens, pre_logits=True))) < TOLERANCE


@every_engine
def test_the_official_pretraining_model_gives_the_official_loss(backend, tmp_path):
    data = golden.load("pretrain_strong")
    write_model(tmp_path / "m", data.spec, data.parameters)
    outputs = arm_vision.load_model(tmp_path / "m", backend)(put(backend, data.images))
    assert data.error("loss", get(outputs["loss"])) < TOLERANCE
    assert data.error("prediction", get(outputs["prediction"])) < 5e-5  # as engines


@every_engine
def test_an_official_checkpoint_loads_without_a_conversion(backend, tmp_path):
    path = official_checkpoint(tmp_path)
    raw = arm_vision.load_model(path, backend)
    ema = arm_vision.load_model(path, backend, weights="ema")
    size = raw.spec.image_size
    images = np.random.default_rng(0).standard_normal((2, *size, 3)).astype(np.float32)
    assert raw.spec.pooling is Pooling.CLS
    assert error(raw(put(backend, images)), get(ema(put(backend, images)))) > 1e-3


@every_engine
def test_a_preset_is_a_model_with_random_weights_from_its_seed(backend):
    first, again, other = (arm_vision.load_model("tiny", backend, classes=4, seed=s) for s in (1, 1, 2))
    images = put(backend, np.random.default_rng(0).standard_normal((1, 224, 224, 3)).astype(np.float32))
    assert first.num_classes == 4
    assert np.array_equal(get(first(images)), get(again(images)))
    assert not np.array_equal(get(first(images)), get(other(images)))
    assert arm_vision.load_model("tiny-pretrain", backend).num_classes == 0


@every_engine
def test_blocks_are_returned_as_feature_maps_without_the_class_token(backend, odd):
    folder, spec, images = odd
    model = arm_vision.load_model(folder, backend)
    values = initial_parameters(spec, 3)
    expected = forward(spec, values, images.astype(np.float64))
    tokens, maps = model.forward_intermediates(put(backend, images), [0, -1])
    for i, found in zip((0, 2), maps, strict=True):
        patches = np.delete(expected[f"layers.{i}"], spec.class_position, axis=1)
        square = patches.transpose(0, 2, 1).reshape(3, 24, 5, 3)
        assert error(found, square) < TOLERANCE
    assert error(tokens, expected["norm_f"]) < TOLERANCE
    (pair,) = model.forward_intermediates(put(backend, images), 1, True, norm=True, output_fmt="NLC",
                                          intermediates_only=True)  # fmt: skip
    assert error(pair[1][:, 0], expected["norm_f"][:, spec.class_position]) < TOLERANCE
    assert error(pair[0], np.delete(expected["norm_f"], spec.class_position, axis=1)) < TOLERANCE


@every_engine
def test_features_of_a_pretraining_model_are_those_of_all_patches_in_raster_order(backend):
    spec = replace(SPECS["pretrain"], prediction_order="column_reverse")
    from arm_core.data.model_config import ModelConfig

    values = initial_parameters(spec, 5)
    model = installed_backends()[backend].create_module(spec, values, ModelConfig())
    images = np.random.default_rng(1).standard_normal((2, *spec.image_size, 3)).astype(np.float32)
    found = get(model.forward_features(put(backend, images)))
    assert found.shape == (2, spec.patches, spec.encoder.width)
    # Causal: a change in the last cluster does not change the features of the others.
    from arm_core.model.tokens import patch_order

    last = patch_order(spec)[spec.tokens :]
    changed = images.copy()
    patch, columns = spec.encoder.patch, spec.grid[1]
    for p in last:
        y, x = divmod(int(p), columns)
        changed[:, y * patch : (y + 1) * patch, x * patch : (x + 1) * patch] += 1
    again = get(model.forward_features(put(backend, changed)))
    before = np.setdiff1d(np.arange(spec.patches), last)
    assert np.allclose(found[:, before], again[:, before], atol=1e-6)
    assert not np.allclose(found[:, last], again[:, last], atol=1e-3)


@every_engine
def test_another_image_size_resizes_the_position_table_like_the_converter(backend, odd):
    folder, spec, _ = odd
    size = (24, 56)
    images = np.random.default_rng(2).standard_normal((2, *size, 3)).astype(np.float32)
    target, tensors = resize(spec, as_tensors(initial_parameters(spec, 3)), size)
    expected = forward(target, {n: t.read() for n, t in tensors.items()}, images.astype(np.float64))["logits"]
    fixed = arm_vision.load_model(folder, backend, image_size=size)
    dynamic = arm_vision.load_model(folder, backend, dynamic_image_size=True)
    assert error(fixed(put(backend, images)), expected) < TOLERANCE
    assert error(dynamic(put(backend, images)), expected) < TOLERANCE
    assert fixed.config["input_size"] == (3, *size)


@every_engine
def test_dynamic_size_is_exact_at_the_trained_size(backend, odd):
    folder, _, images = odd
    plain = arm_vision.load_model(folder, backend)
    dynamic = arm_vision.load_model(folder, backend, dynamic_image_size=True)
    assert np.array_equal(get(plain(put(backend, images))), get(dynamic(put(backend, images))))


@every_engine
def test_a_saved_model_loads_on_every_engine_with_the_same_values(backend, odd, tmp_path):
    folder, _spec, images = odd
    arm_vision.load_model(folder, backend).save(tmp_path / "saved")
    expected = get(arm_vision.load_model(folder, backend)(put(backend, images)))
    for other in ENGINES:
        found = arm_vision.load_model(tmp_path / "saved", other)(put(other, images))
        assert error(found, expected) < TOLERANCE
    with pytest.raises(ValueError, match="exists"):
        arm_vision.load_model(folder, backend).save(tmp_path / "saved")


@every_engine
def test_a_new_head_has_the_requested_classes_and_pooling(backend, odd, tmp_path):
    folder, _spec, images = odd
    model = arm_vision.load_model(folder, backend, classes=9)
    assert get(model(put(backend, images))).shape == (3, 9)
    model.reset_classifier(4, "avg")
    assert model.global_pool == "avg"
    assert model.spec.classes == 4
    assert get(model(put(backend, images))).shape == (3, 4)
    model.save(tmp_path / "four")
    assert arm_vision.load_model(tmp_path / "four", backend).spec.pooling is Pooling.MEAN
    model.reset_classifier(0)
    assert get(model(put(backend, images))).shape == (3, 24)
    with pytest.raises(ValueError, match="without head"):
        model.save(tmp_path / "none")


@every_engine
def test_extracted_features_are_those_of_the_reference(backend, odd):
    folder, spec, images = odd
    model = arm_vision.load_model(folder, backend)
    expected = forward(spec, initial_parameters(spec, 3), images.astype(np.float64))
    middle = spec.class_position
    patches = np.delete(expected["norm_f"], middle, axis=1)
    assert error(model.extract(images), expected["features"]) < TOLERANCE
    assert error(model.extract(images, pool="cls"), expected["norm_f"][:, middle]) < TOLERANCE
    assert error(model.extract(images, pool="mean"), patches.mean(1)) < TOLERANCE
    assert error(model.extract(images, pool="none"), patches) < TOLERANCE
    with pytest.raises(ValueError, match="pool: expected default, mean, cls, none, found 'max'"):
        model.extract(images, pool="max")


@every_engine
def test_the_transform_prepares_every_form_of_an_image_alike(backend, odd, tmp_path):
    folder, _spec, _ = odd
    pixels = np.random.default_rng(4).integers(0, 256, (60, 50, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    transform = arm_vision.load_model(folder, backend).transform()
    forms = [tmp_path / "x.png", str(tmp_path / "x.png"), (tmp_path / "x.png").read_bytes(), pixels,
             Image.fromarray(pixels)]  # fmt: skip
    found = [get(transform(form)) for form in forms]
    assert found[0].shape == ((3, 40, 24) if backend == "torch" else (40, 24, 3))
    assert all(np.array_equal(found[0], other) for other in found[1:])
    training = arm_vision.load_model(folder, backend).transform(training=True, seed=1)
    assert not np.array_equal(get(training(pixels)), get(training(pixels)))


@every_engine
def test_images_in_the_wrong_layout_size_or_range_are_explained(backend, odd):
    folder, _spec, images = odd
    model = arm_vision.load_model(folder, backend)
    layout, swapped = ("NCHW", "NHWC") if backend == "torch" else ("NHWC", "NCHW")
    fitting = put(backend, images)
    wrong = put(backend, images.transpose(0, 2, 3, 1) if backend == "torch" else images.transpose(0, 3, 1, 2))
    with pytest.raises(ValueError, match=f"expected {layout} .* the layout looks like {swapped}"):
        model(wrong)
    with pytest.raises(ValueError, match="expected 4 axes"):
        model(fitting[0])
    with pytest.raises(ValueError, match=r"expected 40x24 pixels, found 24x24;.* image_size=\(24, 24\)"):
        model(put(backend, images[:, :24]))
    dynamic = arm_vision.load_model(folder, backend, dynamic_image_size=True)
    with pytest.raises(ValueError, match="30x24 is not divisible"):
        dynamic(put(backend, images[:, :30]))
    with pytest.warns(UserWarning, match="normalized by the mean and std"):
        model(fitting * 100)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(fitting * 100)  # only once


@every_engine
def test_unknown_sources_are_explained(backend, tmp_path):
    with pytest.raises(ValueError, match="no such file or folder"):
        arm_vision.load_model(tmp_path / "missing", backend)
    (tmp_path / "x.jpg").write_bytes(b"\xff\xd8\xff\xe0 not a model")
    with pytest.raises(ValueError, match=r"x\.jpg"):
        arm_vision.load_model(tmp_path / "x.jpg", backend)
    with pytest.raises(ValueError, match="unknown backend 'jax'"):
        arm_vision.load_model("tiny", "jax")


@every_engine
def test_a_model_can_be_trained_in_its_framework(backend, odd):
    folder, spec, images = odd
    model = arm_vision.load_model(folder, backend, drop_path_rate=0.2)
    names = set(parameter_table(spec))
    if backend == "torch":
        import torch

        model.train()
        torch.manual_seed(0)
        model(put(backend, images)).square().mean().backward()
        gradients = {name: p.grad.numpy() for name, p in model.named_parameters()}
    else:
        import mlx.core as mx
        from mlx import nn
        from mlx.utils import tree_flatten

        model.train()
        mx.random.seed(0)
        _, tree = nn.value_and_grad(model, lambda x: model(x).square().mean())(put(backend, images))
        gradients = {name: np.array(a) for name, a in tree_flatten(tree)}
    assert set(gradients) == names
    assert all(np.isfinite(g).all() for g in gradients.values())
    assert sum(bool(np.abs(g).max() > 0) for g in gradients.values()) > 0.9 * len(names)


def test_the_backends_offer_the_same_under_their_own_names(odd):
    for backend in ENGINES:
        module = __import__({"torch": "arm_cuda", "mlx": "arm_mlx"}[backend])
        assert module.load_model(odd[0]).spec == odd[1]


def test_an_unknown_name_of_the_package_lists_the_known_ones():
    with pytest.raises(AttributeError, match="it has load_model"):
        arm_vision.load_models  # noqa: B018
    assert "load_model" in dir(arm_vision)


@every_engine
def test_influence_maps_of_a_model_are_those_of_its_engine(backend, odd):
    from arm_core.engine.protocol import EngineOptions, TrainingState
    from arm_core.explain.influence import influence

    folder, spec, images = odd
    state = TrainingState(parameters=initial_parameters(spec, 3))
    engine = installed_backends()[backend].create_engine(spec, state, options=EngineOptions(device="cpu"))
    expected = influence(engine, images, layers=[0, 2])
    found = arm_vision.load_model(folder, backend).influence(put(backend, images), layers=[0, 2])
    assert found.layers == (0, 2)
    np.testing.assert_allclose(found.maps, expected.maps, atol=1e-5)
    with pytest.raises(ValueError, match="layers 0 to 2"):
        arm_vision.load_model(folder, backend).influence(put(backend, images), layers=[3])


def test_a_compiled_mlx_model_gives_the_logits_of_the_eager_one(odd):
    mx = pytest.importorskip("mlx.core", reason="needs MLX")
    if shutil.which("g++") is None:
        pytest.skip("MLX compiles for a CPU with g++, which is not installed")
    folder, _spec, images = odd
    model = arm_vision.load_model(folder, "mlx", scan="reference")  # the CPU kernels cannot be compiled
    assert error(mx.compile(model)(mx.array(images)), get(model(mx.array(images)))) < TOLERANCE
