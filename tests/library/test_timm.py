"""ARM models in timm, with the real timm, and with a stand-in if torchvision's wheel does not load."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs torch")

import torchvision_stand_in  # noqa: E402

torchvision_stand_in.install()
timm = pytest.importorskip("timm", reason="needs timm, part of the dev extra")

import golden  # noqa: E402

import arm_cuda.timm  # noqa: E402, F401
import arm_vision  # noqa: E402
from arm_core.engine.optimizer import OptimizerSettings, parameter_groups  # noqa: E402
from arm_core.files.model_folder import write_model  # noqa: E402

NAME = "arm_tiny_patch16_224"


@pytest.fixture(scope="module")
def images():
    return torch.from_numpy(np.random.default_rng(0).standard_normal((2, 3, 224, 224)).astype(np.float32))


def test_models_are_listed_with_tags_for_the_official_weights():
    assert NAME in timm.list_models("arm_*")
    assert "arm_base_patch16_224.official_in1k" in timm.list_models("arm_*", pretrained=True)
    assert NAME not in timm.list_models("arm_*", pretrained=True)


def test_a_model_runs_forward_and_backward_with_finite_values(images):
    model = timm.create_model(NAME, num_classes=7)
    assert model.training
    out = model(images)
    assert out.shape == (2, 7)
    out.mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_the_classifier_can_be_reset_to_other_classes_and_to_none(images):
    model = timm.create_model(NAME, num_classes=7).eval()
    features = model.forward_features(images)
    model.reset_classifier(3)
    assert model.get_classifier().out_features == 3
    assert model(images).shape == (2, 3)
    model.reset_classifier(0)
    pooled = model(images)
    assert pooled.shape == (2, model.num_features)
    assert torch.equal(pooled, model.forward_head(features, pre_logits=True))
    assert timm.create_model(NAME, num_classes=0)(images).shape == (2, model.num_features)
    assert timm.create_model(NAME, num_classes=5, global_pool="token").eval()(images).shape == (2, 5)


def test_features_equal_those_of_forward_hooks_bit_for_bit(images):
    model = timm.create_model(NAME, num_classes=7).eval()
    seen = {}
    for i in (2, 11):
        model.layers[i].register_forward_hook(lambda _m, _a, out, i=i: seen.__setitem__(i, out))
    with torch.no_grad():
        model(images)
        extractor = timm.create_model(NAME, features_only=True, out_indices=(2, -1)).eval()
        extractor.model.load_state_dict(
            {k: v for k, v in model.state_dict().items() if not k.startswith(("head.", "norm_f."))}
        )
        maps = extractor(images)
    for i, found in zip((2, 11), maps, strict=True):
        patches = torch.cat([seen[i][:, :98], seen[i][:, 99:]], 1)
        assert torch.equal(found, patches.transpose(1, 2).reshape(2, -1, 14, 14))
    assert extractor.feature_info.channels() == [192, 192]
    assert extractor.feature_info.reduction() == [16, 16]


def test_the_data_configuration_is_the_models():
    config = timm.data.resolve_data_config(model=timm.create_model(NAME))
    assert config["input_size"] == (3, 224, 224)
    assert config["crop_pct"] == 0.875
    assert config["interpolation"] == "bicubic"


def test_layer_decay_gives_each_parameter_the_official_learning_rate_and_decay():
    from timm.optim import create_optimizer_v2

    model = timm.create_model(NAME, num_classes=7)
    optimizer = create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.65)
    names = {id(p): name for name, p in model.named_parameters()}
    found = {
        names[id(p)]: (group["lr_scale"], group["weight_decay"])
        for group in optimizer.param_groups
        for p in group["params"]
    }
    ours = parameter_groups(model.spec, OptimizerSettings(weight_decay=0.05, layer_decay=0.65))
    for group in ours:
        for name in group.names:
            assert found[name] == pytest.approx((group.lr_scale, group.weight_decay)), name


def test_weights_of_a_file_load_through_create_model(tmp_path):
    data = golden.load("classifier_strong")
    write_model(tmp_path / "m", data.spec, data.parameters)
    x = torch.from_numpy(data.images.transpose(0, 3, 1, 2).copy())
    model = timm.create_model(
        NAME,
        pretrained=True,
        pretrained_cfg_overlay={"file": str(tmp_path / "m")},
        num_classes=data.spec.classes,
    ).eval()
    with torch.no_grad():
        assert data.error("logits", model(x).numpy()) < 1e-5
    assert torch.equal(model(x), arm_vision.load_model(tmp_path / "m", "torch")(x))


def test_weights_that_are_not_published_are_refused_with_the_way_to_pass_a_file():
    with pytest.raises(ValueError, match="no published weights; pass pretrained_cfg_overlay"):
        timm.create_model(NAME, pretrained=True)
