"""Every engine against the complete official data, element by element; needs its folder in ARM_GOLDEN.

`test_golden_engines` does the same with the data in tests/fixtures. This file adds the classifier with mean
pooling, the trained checkpoints, steps of pretraining, sums of gradients, and losses with soft targets.
"""

import sys
from functools import cache
from typing import Any

import golden
import numpy as np
import pytest
from golden import OUR_NAMES, Golden, Sample, Steps
from test_golden_engines import every_engine, take_steps

from arm_convert.checkpoint_source import open_checkpoint_source
from arm_convert.official import canonical_view, official_view, spec_from_official
from arm_core.engine.protocol import Batch, EngineOptions, TrainingState
from arm_core.model.parameters import parameter_table

FOLDER = golden.complete()
pytestmark = [
    pytest.mark.skipif(FOLDER is None, reason="needs the complete official data: set ARM_GOLDEN"),
    pytest.mark.usefixtures("one_torch_thread"),
]

STRONG = {"pretrain_strong": "pretrain", "ft_cls_strong": "ft_cls", "ft_gp_strong": "ft_gp"}
TRAINED = {
    "pretrain": "pretrain_checkpoint-40.pth",
    "ft_cls": "ft_cls_checkpoint-10.pth",
    "ft_gp": "ft_gp_checkpoint-10.pth",
}
START = {
    "pretrain": "pretrain_init_state",
    "ft_cls": "ft_cls_expanded_state",
    "ft_gp": "ft_gp_expanded_state",
}

TOLERANCE = {
    "outputs": 1e-5,
    "gradients": 1e-4,
    "gradient norms": 1e-4,
    "gradient sums": 1e-4,
    "losses": 1e-6,
}
"""Tolerances relative to each tensor's largest value, a norm, a gradient's sum of magnitudes, a loss."""

WIDER = {
    **{("pretrain_strong", f"layers.{i}"): 3e-5 for i in (7, 9, 11)},
    **{("pretrain_strong", name): 5e-5 for name in ("taps_to_decoder", "decoder_input")},
    ("pretrain_strong", "gradients"): 4e-4,
}
"""As in `test_golden_engines`. The gradients' official float32 numbers are 2e-4 away from float64."""


@pytest.fixture(autouse=True)
def _whole_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(golden, "SAMPLES", sys.maxsize)


def read(name: str) -> dict[str, np.ndarray]:
    assert FOLDER is not None
    with np.load(FOLDER / f"{name}.npz") as file:
        return dict(file)


def whole(value: np.ndarray) -> Sample:
    return Sample(value.shape, value.reshape(-1).astype(np.float64), float(np.abs(value).max()))


@cache
def data(name: str) -> tuple[Golden, dict[str, np.ndarray]]:
    """A set, and everything else in its file."""
    stored = read(f"{name}_golden")
    plain = STRONG.get(name, name)
    if name in STRONG:
        state = read(f"{name}_state")
    else:
        state = {
            n: t.read()
            for n, t in open_checkpoint_source(FOLDER / TRAINED[name], warn=pytest.fail).tensors.items()
        }
    spec = spec_from_official({n: a.shape for n, a in state.items()}, {"global_pool": plain == "ft_gp"})
    parameters = canonical_view(spec, state)
    images = stored["images"] if "images" in stored else read(f"{plain}_golden")["images"]
    norms = zip(stored["gradstat_names"].tolist(), stored["gradstat_l2"].tolist(), strict=True)
    found = Golden(
        spec=spec,
        parameters={n: np.ascontiguousarray(parameters[n]) for n in parameter_table(spec)},
        images=np.ascontiguousarray(images.transpose(0, 2, 3, 1)),
        labels=stored.get("labels"),
        expected={ours: whole(stored[theirs]) for theirs, ours in OUR_NAMES.items() if theirs in stored},
        gradients={n[5:]: whole(value) for n, value in stored.items() if n.startswith("grad/")},
        gradient_norms=dict(norms),
    )
    return found, stored


@every_engine
@pytest.mark.parametrize("name", [*STRONG, *TRAINED])
def test_outputs_and_gradients_match(name: str, backend: Any, device: str, scan: str) -> None:
    official, stored = data(name)
    options = EngineOptions(device=device, scan=scan)
    engine = backend.create_engine(
        official.spec, TrainingState(parameters=official.parameters), options=options
    )
    outputs = engine.forward(official.images, intermediates=True)
    loss, gradients = engine.loss_and_gradients(Batch(images=official.images, targets=official.targets))
    outputs["loss"] = np.float32(loss)

    errors = {
        "outputs": {key: official.error(key, outputs[key]) for key in official.expected},
        "gradients": official.gradient_errors(gradients),
        "gradient norms": official.gradient_norm_errors(gradients),
        "gradient sums": sum_errors(official, stored, gradients),
        "losses": soft_loss_errors(official, stored, engine),
    }
    beyond = {
        f"{what} {key}": error
        for what, found in errors.items()
        for key, error in found.items()
        if not error < WIDER.get((name, key), WIDER.get((name, what), TOLERANCE[what]))
    }
    assert not beyond


def sum_errors(official: Golden, stored: dict[str, Any], gradients: dict[str, Any]) -> dict[str, float]:
    """Errors of gradient sums, relative to the sum of magnitudes (at least 1e-6 of the largest)."""
    view = official_view(official.spec, gradients)
    size = {name: float(np.abs(view[name]).sum()) for name in official.gradient_norms}
    least = 1e-6 * max(size.values())
    sums = zip(stored["gradstat_names"].tolist(), stored["gradstat_sum"].tolist(), strict=True)
    return {n: abs(float(view[n].sum(dtype=np.float64)) - s) / max(size[n], least) for n, s in sums}


def soft_loss_errors(official: Golden, stored: dict[str, Any], engine: Any) -> dict[str, float]:
    """Losses with label smoothing 0.1 and with mixed targets."""
    if "loss_soft" not in stored:
        return {}
    smooth = 0.9 * official.targets + 0.1 / official.spec.classes
    found = {}
    for name, targets in (("loss_ls01", smooth), ("loss_soft", stored["soft_targets"])):
        loss, _ = engine.loss_and_gradients(Batch(images=official.images, targets=targets))
        found[name] = abs(loss / float(stored[name]) - 1)
    return found


@every_engine
@pytest.mark.parametrize("name", TRAINED)
def test_two_optimizer_steps_lead_to_the_official_checkpoint(
    name: str, backend: Any, device: str, scan: str
) -> None:
    official, stored = data(name)
    checkpoint = open_checkpoint_source(FOLDER / TRAINED[name], warn=pytest.fail)
    pretraining = name == "pretrain"
    lr = stored["steps_lr"] if pretraining else stored["steps_group_lr"].max(1)
    trainable = {name for name, row in parameter_table(official.spec).items() if row.trainable}
    names = official_view(official.spec, {name: official.parameters[name] for name in trainable})
    steps = Steps(
        spec=official.spec,
        parameters=canonical_view(official.spec, read(START[name])),
        images=official.images,
        targets=None if pretraining else (0.9 * official.targets + 0.01).astype(np.float32),
        betas=(0.9, 0.95) if pretraining else (0.9, 0.999),
        weight_decay=0.05,
        layer_decay=1.0 if pretraining else 0.75,
        ema_decay=None if pretraining else 0.99992,
        lr=lr.tolist(),
        losses=stored["steps_loss"].tolist(),
        grad_norms=stored["steps_gradnorm"].tolist(),
        weights={n: whole(checkpoint.tensors[n].read()) for n in names},
        ema={n: whole(t.read()) for n, t in (checkpoint.average or {}).items()},
    )
    take_steps(steps, backend, device, scan, clip=3.0 if pretraining else None, stored=1e-7)
