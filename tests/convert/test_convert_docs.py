"""The examples in docs/convert.md run unchanged."""

from __future__ import annotations

import re
from pathlib import Path

import foreign
import numpy as np
import pytest

from arm_convert.export import Format, export_model
from arm_convert.official import official_shapes
from arm_core.files.safetensors import as_tensors
from arm_core.model.parameters import initial_parameters
from arm_core.model.reference.model import forward

TEXT = (Path(__file__).parents[2] / "docs/convert.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with the three exports of a classifier."""
    parameters = initial_parameters(foreign.CLASSIFIER, 5)
    for to, name in (
        (Format.OFFICIAL, "official.pth"),
        (Format.TORCH, "torch.safetensors"),
        (Format.MLX, "mlx.safetensors"),
    ):
        export_model(foreign.CLASSIFIER, as_tensors(parameters), {}, tmp_path / name, to)
    monkeypatch.chdir(tmp_path)
    return parameters


def example(number: int, word: str, **given):
    assert word in EXAMPLES[number]
    exec(EXAMPLES[number], given)
    return given


def test_the_official_example_loads_strictly_into_modules_with_the_official_names(folder):
    torch = pytest.importorskip("torch")

    model = torch.nn.Module()
    for name, shape in official_shapes(foreign.CLASSIFIER).items():
        *path, leaf = name.split(".")
        module = model
        for part in path:
            if not hasattr(module, part):
                module.add_module(part, torch.nn.Module())
            module = getattr(module, part)
        module.register_parameter(leaf, torch.nn.Parameter(torch.zeros(shape)))
    example(0, "load_state_dict", model=model)
    D = model.get_parameter("layers.2.mixer.D_c").detach().numpy()
    assert np.array_equal(D, folder["layers.2.mixer.D"][2])


def test_the_torch_example_loads_strictly_and_computes_the_same_embedding(folder):
    torch = pytest.importorskip("torch")

    model = example(1, "from torch import nn")["model"]
    image = np.random.default_rng(0).normal(size=(16, 16, 3)).astype(np.float32)
    found = model.patch_embed(torch.tensor(image).permute(2, 0, 1)[None])[0, :, 1, 2].detach().numpy()
    patch = image[4:8, 8:12].reshape(-1)
    assert np.allclose(found, folder["patch_embed.weight"] @ patch + folder["patch_embed.bias"], atol=1e-5)
    sequence = torch.tensor(image[0].T[:1].repeat(8, 0))[None]
    found = model.layers[1].mixer.conv[3](sequence)[0, :, :16].detach().numpy()
    weight, bias = folder["layers.1.mixer.conv.weight"][3], folder["layers.1.mixer.conv.bias"][3]
    padded = np.concatenate([np.zeros(3, np.float32), image[0, :, 0]])
    expected = np.stack([np.convolve(padded, w[::-1], "valid") for w in weight]) + bias[:, None]
    assert np.allclose(found, expected, atol=1e-5)


def test_the_plain_torch_forward_computes_the_logits_of_the_reference(folder):
    torch = pytest.importorskip("torch")
    given = example(1, "from torch import nn")
    given = example(2, "def classify", **given)
    images = np.random.default_rng(1).normal(size=(2, *foreign.CLASSIFIER.image_size, 3)).astype(np.float32)
    found = given["classify"](given["model"], given["config"], torch.tensor(images.transpose(0, 3, 1, 2)))
    expected = forward(foreign.CLASSIFIER, folder, images.astype(np.float64))["logits"]
    assert np.abs(found.numpy() - expected).max() < 1e-5 * np.abs(expected).max()


def test_the_mlx_example_loads_strictly_and_computes_the_same_embedding(folder):
    mx = pytest.importorskip("mlx.core")

    model = example(3, "from mlx import nn")["model"]
    image = np.random.default_rng(0).normal(size=(16, 16, 3)).astype(np.float32)
    found = np.array(model.patch_embed(mx.array(image)[None]))[0, 1, 2]
    patch = image[4:8, 8:12].reshape(-1)
    assert np.allclose(found, folder["patch_embed.weight"] @ patch + folder["patch_embed.bias"], atol=1e-5)
    sequence = mx.array(image[0, :, :1].repeat(8, 1))[None]
    found = np.array(model.layers[1].mixer.conv[3](sequence))[0, :16]
    weight, bias = folder["layers.1.mixer.conv.weight"][3], folder["layers.1.mixer.conv.bias"][3]
    padded = np.concatenate([np.zeros(3, np.float32), image[0, :, 0]])
    expected = np.stack([np.convolve(padded, w[::-1], "valid") for w in weight], -1) + bias
    assert np.allclose(found, expected, atol=1e-5)


def test_every_command_that_the_page_names_exists():
    from arm_cli.convert import COMMANDS

    named = set(re.findall(r"arm convert ([a-z-]+)", TEXT))
    assert named == set(COMMANDS)
