"""The cost of a model in `arm info`, against the official counts and against torch."""

import dataclasses

import pytest

from arm_core.model.cost import cost_table
from arm_core.model.parameters import count_parameters, initial_parameters
from arm_core.model.presets import classifier_preset, pretrain_preset

OFFICIAL = {
    "base": (99_243_008, 99_427_328, 85_031_656),
    "large": (303_721_696, 303_942_880, 297_035_720),
    "huge": (659_128_064, 659_422_976, 662_682_088),
}


@pytest.mark.parametrize("name", OFFICIAL)
def test_parts_add_up_to_the_official_parameter_counts(name):
    pretraining, classifier = cost_table(pretrain_preset(name)), cost_table(classifier_preset(name))
    trainable = sum(part.parameters for part in pretraining)
    fixed = sum(part.fixed for part in pretraining)
    assert (trainable, trainable + fixed, sum(p.parameters for p in classifier)) == OFFICIAL[name]
    assert sum(part.fixed for part in classifier) == 0


def test_every_parameter_belongs_to_one_part(pretrain_spec, classifier_spec):
    for spec in (pretrain_spec, classifier_spec):
        total = sum(part.parameters + part.fixed for part in cost_table(spec))
        assert total == count_parameters(spec, trainable_only=False)


def test_multiply_adds_of_a_small_classifier_counted_by_hand(classifier_spec):
    work = {part.name: part.multiply_adds for part in cost_table(classifier_spec)}
    tokens, width, depth, directions, state, rank, mlp = 37, 32, 6, 4, 16, 2, 85
    assert work == {
        "patch embedding": 36 * 48 * width,
        "block norms": 0,
        "mixer projections": depth
        * tokens
        * (3 * width * width + directions * (width * (rank + 2 * state) + rank * width)),
        "mixer convolution": depth * tokens * directions * width * 4,
        "mixer scan": depth * tokens * directions * width * state * 4,
        "block MLPs": depth * tokens * 3 * width * mlp,
        "head": width * 10,
    }


def test_scan_work_doubles_with_the_directions(classifier_spec):
    two = dataclasses.replace(classifier_spec, scan_directions=classifier_spec.scan_directions[:2])
    scans = [next(p for p in cost_table(s) if p.name == "mixer scan") for s in (two, classifier_spec)]
    assert scans[1].multiply_adds == 2 * scans[0].multiply_adds


def matrix_products(model, images) -> int:
    """Multiply-adds of a forward pass's matrix products, as torch counts them."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):  # the CPU's fused attention is not counted
        model(images)
    return counter.get_total_flops() // 2


def kept_values(model, images) -> int:
    """Values that autograd and the scan's kernel keep for the backward pass, without weights."""
    import torch

    from arm_core import cpu_kernels

    weights = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}
    states: list[int] = []

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes() // 4
        return tensor

    def scan_forward(*arrays, **options):
        out, residuals = forward(*arrays, **options)
        states.append(residuals.mean.size + residuals.states.size)
        return out, residuals

    forward = cpu_kernels.scan_forward
    with pytest.MonkeyPatch.context() as patch, torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        patch.setattr(cpu_kernels, "scan_forward", scan_forward)
        outputs = model(images)  # kept until the count: the address of a freed storage can be reused
        assert outputs
        return sum(kept.values()) + sum(states)


@pytest.mark.parametrize("spec", [pretrain_preset("tiny"), classifier_preset("tiny")], ids=["pre", "cls"])
def test_multiply_adds_and_activations_are_those_of_the_torch_engine(spec):
    torch = pytest.importorskip("torch", reason="needs torch")
    from arm_cuda.model import build_model

    model = build_model(spec, "cpu", torch.device("cpu"))
    values = {name: torch.from_numpy(value) for name, value in initial_parameters(spec, seed=0).items()}
    model.load_state_dict(values)
    images = torch.zeros(2, *spec.image_size, 3)
    parts = cost_table(spec)
    products = sum(p.multiply_adds for p in parts if p.name not in ("mixer convolution", "mixer scan"))
    assert matrix_products(model, images) == pytest.approx(2 * products, rel=1e-3)
    assert kept_values(model, images) == pytest.approx(2 * sum(p.activations for p in parts), rel=0.05)
