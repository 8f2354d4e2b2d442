"""The torch library model with torch's features: compile, export, transforms, copies, autocast, DDP."""

from __future__ import annotations

import copy
import io
from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs torch")

import arm_vision  # noqa: E402
from arm_core.data.model_config import ModelConfig  # noqa: E402
from arm_core.model.parameters import initial_parameters  # noqa: E402
from arm_core.model.spec import ClassifierSpec, EncoderSpec  # noqa: E402
from arm_cuda.library import create_module  # noqa: E402
from arm_cuda.pyramid import FeaturePyramid, LinearSegmenter  # noqa: E402

SPEC = ClassifierSpec(encoder=EncoderSpec(width=64, depth=2, patch=8), classes=5, image_size=(40, 40))


@pytest.fixture
def model():
    return create_module(SPEC, initial_parameters(SPEC, 0), ModelConfig())


@pytest.fixture
def images():
    return torch.from_numpy(np.random.default_rng(0).standard_normal((2, 3, 40, 40)).astype(np.float32))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_model_has_the_outputs_and_gradients_of_the_eager_one(model, images, backend):
    if backend == "inductor":
        import os

        if not os.environ.get("ARM_LONG_TESTS"):
            pytest.skip("compiles for a minute: set ARM_LONG_TESTS=1")
    model(images).square().mean().backward()
    eager = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    out = compiled(images)
    assert torch.allclose(out, model(images), atol=1e-5)
    out.square().mean().backward()
    for name, p in model.named_parameters():
        assert torch.allclose(p.grad, eager[name], atol=1e-4 * float(eager[name].abs().max()) + 1e-8), name


def test_an_exported_program_gives_the_logits_of_the_model(model, images):
    program = torch.export.export(model, (images,))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    again = torch.export.load(file).module()
    assert torch.allclose(again(images), model(images), atol=1e-5)


def test_function_transforms_give_the_gradients_of_backward(model, images):
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def loss(w):
        return torch.func.functional_call(model, w, (images,)).square().mean()

    found = torch.func.grad(loss)(weights)
    model(images).square().mean().backward()
    for name, p in model.named_parameters():
        assert torch.allclose(found[name], p.grad, atol=1e-5 * float(p.grad.abs().max()) + 1e-9), name


def test_copies_and_state_dicts_are_independent_models(model, images):
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.head.bias += 1
    assert torch.allclose(other(images), model(images) + 1, atol=1e-5)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(images), model(images))


def test_checkpointed_blocks_have_the_same_gradients(model, images):
    model(images).square().mean().backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model.set_grad_checkpointing()
    model(images).square().mean().backward()
    assert all(torch.equal(p.grad, plain[name]) for name, p in model.named_parameters())


def test_autocast_and_half_precision_weights_stay_near_float32(model, images):
    exact = model(images).detach()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(images)
    assert torch.allclose(mixed.detach().float(), exact, atol=0.05 * float(exact.abs().max()))
    half = create_module(SPEC, initial_parameters(SPEC, 0), ModelConfig(), dtype=torch.bfloat16)
    assert half.layers[0].mixer.A_log.dtype == torch.float32
    assert half.layers[0].mixer.in_proj.weight.dtype == torch.bfloat16
    out = half(images.bfloat16())
    assert out.dtype == torch.bfloat16
    assert torch.allclose(out.detach().float(), exact, atol=0.05 * float(exact.abs().max()))


def test_drop_path_acts_in_training_mode_only(images):
    spec = replace(SPEC, encoder=replace(SPEC.encoder, depth=4))
    model = create_module(spec, initial_parameters(spec, 0), ModelConfig(), drop_path_rate=0.9)
    assert torch.equal(model(images), model(images))
    model.train()
    torch.manual_seed(0)
    assert not torch.equal(model(images), model(images))


def gradients(module, images):
    """Gradients of the mean over the images, by parameter; a wrapper's prefix is removed."""
    module.train()
    module(images).square().mean().backward()
    return {name.removeprefix("module."): p.grad for name, p in module.named_parameters()}


def train_on_a_share(rank, world, folder):
    """One process: its share of the images through DDP; the first one saves the gradients."""
    torch.set_num_threads(1)
    meet = f"file://{folder}/meet"
    torch.distributed.init_process_group("gloo", init_method=meet, rank=rank, world_size=world)
    model = arm_vision.load_model(folder / "model", "torch", "cpu")
    images = torch.load(folder / "images.pt").chunk(world)[rank]
    found = gradients(torch.nn.parallel.DistributedDataParallel(model), images)
    if rank == 0:
        torch.save(found, folder / "gradients.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_under_ddp_have_the_gradients_of_the_whole_batch(model, tmp_path):
    images = torch.from_numpy(np.random.default_rng(1).standard_normal((4, 3, 40, 40)).astype(np.float32))
    model.save(tmp_path / "model")
    torch.save(images, tmp_path / "images.pt")
    torch.multiprocessing.spawn(train_on_a_share, (2, tmp_path), nprocs=2)
    found, expected = torch.load(tmp_path / "gradients.pt"), gradients(model, images)
    assert set(found) == set(expected)
    for name, gradient in expected.items():
        assert (found[name] - gradient).abs().max() < 1e-5 * gradient.abs().max(), name
    half = gradients(create_module(SPEC, initial_parameters(SPEC, 0), ModelConfig()), images[:2])
    assert (half["head.weight"] - found["head.weight"]).abs().max() > 1e-3 * found["head.weight"].abs().max()


def test_a_pyramid_has_maps_at_its_strides(model, images):
    pyramid = FeaturePyramid(model, (2, 4, 8, 16), channels=32)
    maps = pyramid(images)
    assert [tuple(m.shape) for m in maps.values()] == [(2, 32, s, s) for s in (20, 10, 5, 2)]
    assert list(maps) == ["0", "1", "2", "3"]
    assert pyramid.out_channels == 32
    sum(m.square().mean() for m in pyramid.maps(images)).backward()
    assert all(p.grad is not None for p in pyramid.scales.parameters())
    with pytest.raises(ValueError, match=r"strides: expected 8 \(the patch size\) times a power of two"):
        FeaturePyramid(model, (4, 12))
    with pytest.raises(ValueError, match="ascending"):
        FeaturePyramid(model, (16, 8))


def test_a_pyramid_takes_images_of_any_size_with_a_dynamic_model():
    model = create_module(SPEC, initial_parameters(SPEC, 0), ModelConfig(), dynamic_image_size=True)
    maps = FeaturePyramid(model, (4, 8), channels=16)(torch.randn(1, 3, 32, 64))
    assert [tuple(m.shape[2:]) for m in maps.values()] == [(8, 16), (4, 8)]


def test_a_linear_segmenter_learns_where_a_bright_square_is(model):
    rng = np.random.default_rng(0)
    images = np.zeros((16, 3, 40, 40), np.float32)
    labels = np.zeros((16, 40, 40), np.int64)
    for i in range(16):
        y, x = rng.integers(0, 4, 2) * 8
        images[i, :, y : y + 8, x : x + 8] = 2.0
        labels[i, y : y + 8, x : x + 8] = 1
    for p in model.parameters():
        p.requires_grad_(False)
    segmenter = LinearSegmenter(model, 2)
    optimizer = torch.optim.AdamW([p for p in segmenter.parameters() if p.requires_grad], lr=0.05)
    x, y = torch.from_numpy(images), torch.from_numpy(labels)
    losses = []
    for _ in range(30):
        loss = torch.nn.functional.cross_entropy(segmenter(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    found = segmenter(x).argmax(1)
    both = ((found == 1) & (y == 1)).sum() / ((found == 1) | (y == 1)).sum()
    assert losses[-1] < 0.3 * losses[0]
    assert both > 0.7


def test_an_official_preset_is_available_from_the_package():
    assert isinstance(arm_vision.load_model("tiny", "torch", classes=3), torch.nn.Module)
