"""Sources that are not complete ARM models: `load_model` explains each one in one line."""

from __future__ import annotations

import json
import shutil

import foreign
import numpy as np
import pytest
from converting import official_checkpoint

import arm_vision
from arm_convert import published
from arm_core.engine.registry import installed_backends
from arm_core.files.model_folder import write_model
from arm_core.files.safetensors import as_tensors, write_tensors
from arm_core.model.parameters import initial_parameters

BACKEND = next((name for name in ("torch", "mlx") if installed_backends()[name].missing() is None), None)
pytestmark = pytest.mark.skipif(BACKEND is None, reason="needs an engine")


def refusal(source, **options) -> str:
    with pytest.raises(ValueError) as found:  # noqa: PT011 (the tests compare its text)
        arm_vision.load_model(source, BACKEND, **options)
    text = str(found.value)
    assert "\n" not in text
    return text


@pytest.fixture
def model(tmp_path):
    write_model(tmp_path / "model", foreign.CLASSIFIER, initial_parameters(foreign.CLASSIFIER, 0))
    return tmp_path / "model"


def halve(path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_a_half_downloaded_safetensors_file_is_truncated(model, tmp_path):
    shutil.copy(model / "model.safetensors", tmp_path / "alone.safetensors")
    for source, file in ((model, model / "model.safetensors"), (tmp_path / "alone.safetensors",) * 2):
        halve(file)
        text = refusal(source)
        assert f"{file}: truncated: the tensors take" in text
        assert text.endswith("download or copy it again")


def test_a_file_cut_within_its_header_is_truncated(model):
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    assert "truncated: the header takes" in refusal(model)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.999])
def test_a_half_downloaded_checkpoint_is_truncated(tmp_path, share):
    path = official_checkpoint(tmp_path)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    assert "corrupt or truncated zip archive" in (text := refusal(path))
    assert text.endswith("download or copy it again")


def test_a_missing_shard_is_named(model):
    (model / "model.safetensors").rename(model / "model-00001-of-00002.safetensors")
    places = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    assert "1 of the 2 files" in (text := refusal(model))
    assert "such as model-00002-of-00002.safetensors; download or copy them again" in text


ARCHITECTURES = {
    "a Vision Transformer": ("cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight"),
    "a VMamba": ("patch_embed.0.weight", "layers.0.blocks.0.op.x_proj_weight", "classifier.head.weight"),
    "a Swin Transformer": ("patch_embed.proj.weight", "layers.0.blocks.0.attn.qkv.weight"),
}


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_checkpoint_of_another_architecture_is_named(tmp_path, kind, suffix):
    tensors = {name: np.zeros((4, 4), np.float32) for name in ARCHITECTURES[kind]}
    path = tmp_path / f"other{suffix}"
    if suffix == ".pth":
        foreign.save(path, foreign.torch_zip({"model": tensors}))
    else:
        write_tensors(path, as_tensors(tensors))
    assert f"{path}: these are not the tensors of an official ARM checkpoint ({kind}: it has " in refusal(
        path
    )


def test_a_vision_mamba_of_two_directions_is_another_one(tmp_path):
    state = foreign.official_state(foreign.CLASSIFIER, 0)
    kept = {name: value for name, value in state.items() if "_c" not in name or name.startswith("cls")}
    foreign.save(tmp_path / "vim.pth", foreign.torch_zip({"model": kept}))
    text = refusal(tmp_path / "vim.pth")
    assert "expected 1 or 4 scan directions, found 2 (_b)" in text
    assert "Vim" in text


def test_a_folder_of_another_library_is_named(model):
    (model / "config.json").write_text('{"model_type": "vit", "hidden_size": 192}')
    assert "expected format 'arm-vision/1', found None; this is a configuration of 'vit'" in refusal(model)


@pytest.mark.parametrize(
    ("name", "near"),
    [("tinny", "tiny"), ("base-pretrian", "base-pretrain"), ("official/arm_b.pth", "official/arm_base.pth")],
)
def test_an_unknown_name_is_compared_with_presets_and_published_names(tmp_path, monkeypatch, name, near):
    monkeypatch.setenv("ARM_VISION_CACHE", str(tmp_path))
    monkeypatch.setattr(published, "_ask_hub", lambda repository: ["arm_base.pth"])
    (tmp_path / "official.json").write_text('["arm_base.pth", "README.md"]')
    assert f"did you mean {near}" in refusal(name)


def test_an_unknown_path_is_compared_with_its_folder_without_a_network(model, tmp_path, monkeypatch):
    monkeypatch.setenv("ARM_VISION_CACHE", str(tmp_path / "none"))
    monkeypatch.setattr(published, "_ask_hub", lambda repository: pytest.fail("asked the network"))
    assert "no such file or folder" in (text := refusal(tmp_path / "modle"))
    assert f"did you mean {model}?" in text
    assert "did you mean" not in refusal("x" * 100_000)


def test_wrong_options_are_refused(model):
    assert refusal(model, weights="average") == "weights: expected raw or ema, found 'average'"
    assert "dtype: expected" in refusal(model, dtype="bfloat17")
    assert "device" in refusal(model, device="gpu99")
    assert "image_size" in refusal(model, image_size=(10, 10))
