"""Runs and library modules on an NVIDIA GPU: resumed runs have the same bits, results agree with the CPU."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch_scans import assert_close  # noqa: E402
from toy_engine import state_of  # noqa: E402

import arm_cuda  # noqa: E402
from arm_core.data import Synthetic  # noqa: E402
from arm_core.engine.protocol import Compile, EngineOptions, Precision  # noqa: E402
from arm_core.model.parameters import initial_parameters  # noqa: E402
from arm_core.model.spec import ClassifierSpec, EncoderSpec  # noqa: E402
from arm_core.recipe.recipe import load_recipe, override  # noqa: E402
from arm_core.training.checkpoint import newest_checkpoint  # noqa: E402
from arm_core.training.observer import Observer  # noqa: E402
from arm_core.training.run_folder import resume_run, start_run  # noqa: E402
from arm_core.training.trainer import Trainer  # noqa: E402
from arm_cuda.library import ArmClassifier  # noqa: E402

STEPS, KILLED = 8, 5
CHANGES = [
    "model.width=32",
    "model.depth=6",
    "model.image_size=24",
    "training.batch_size=8",
    f"training.length={STEPS} steps",
    "training.save_every=2 steps",
    "training.drop_path=0.2",
    "schedule.warmup=1 step",
]
OWN = {
    "pretrain": ["model.decoder_width=32", "model.decoder_heads=2"],
    "finetune": ["data.labels_per_class=none", "mixing.mixup=0.8", "optimizer.ema_decay=0.9"],
}
OPTIONS = {
    "float32": EngineOptions(),
    "bfloat16": EngineOptions(precision=Precision.BFLOAT16),
    "compiled": EngineOptions(compile=Compile.BLOCKS),
}


class Killed(BaseException):
    """Ends a run immediately, like SIGKILL."""


class Killer(Observer):
    def stepped(self, step: int, images: int) -> None:
        if step == KILLED:
            raise Killed


def train(path: Path, stage: str, options: EngineOptions, *, kill: bool = False) -> None:
    """Start or resume a run."""
    recipe = override(load_recipe(f"{stage}-digits"), [*CHANGES, *OWN[stage]])
    images = Synthetic(37, (24, 24), classes=3, seed=1)
    begun = (path / "checkpoints").exists()
    run = resume_run(path, warn=pytest.fail) if begun else start_run(path, recipe, recipe.spec(3))
    with run:
        engine = arm_cuda.backend.create_engine(
            run.spec, state_of(run), optimizer=recipe.optimizer, options=options
        )
        Trainer(run, engine, images, None, observer=Killer() if kill else None).train()


@pytest.mark.gpu
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("stage", OWN)
def test_a_killed_run_resumes_to_the_same_bits(stage: str, options: str, tmp_path: Path) -> None:
    chosen = OPTIONS[options]
    train(tmp_path / "whole", stage, chosen)
    with pytest.raises(Killed):
        train(tmp_path / "killed", stage, chosen, kill=True)
    train(tmp_path / "killed", stage, chosen)
    found, expected = (newest_checkpoint(tmp_path / name, pytest.fail) for name in ("killed", "whole"))
    assert found.progress.step == expected.progress.step == STEPS
    for kind in ("parameters", "exp_avg", "exp_avg_sq", "ema"):
        values = getattr(expected.state, kind)
        for name, value in values.items():
            assert np.isfinite(value).all(), name
            assert getattr(found.state, kind)[name].tobytes() == value.tobytes(), f"{kind} {name}"


CLASSIFIER = ClassifierSpec(encoder=EncoderSpec(width=32, depth=6, patch=4), classes=10, image_size=(24, 24))


@pytest.fixture
def module() -> Any:
    """A library module on the CPU, in evaluation mode."""
    values = {n: torch.from_numpy(v) for n, v in initial_parameters(CLASSIFIER, seed=1).items()}
    made = ArmClassifier(CLASSIFIER)
    made.load_state_dict(values, assign=True, strict=False)
    return made.eval()


@pytest.mark.gpu
@pytest.mark.filterwarnings("default")
def test_a_module_moved_to_the_gpu_agrees_with_the_cpu(module: Any) -> None:
    x = torch.randn(3, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = module(x)
        module.cuda()
        found = module(x.cuda())
        compiled = torch.compile(module, fullgraph=True)(x.cuda())
        with torch.autocast("cuda", torch.bfloat16):
            rounded = module(x.cuda())
    assert_close(found.cpu(), expected, "logits", 1e-5)
    assert_close(compiled.cpu(), expected, "compiled logits", 1e-5)
    assert_close(rounded.float().cpu(), expected, "logits under autocast", 5e-2)
    module(x.cuda()).sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in module.parameters())
