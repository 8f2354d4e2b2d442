"""A run that was interrupted in any way ends with the same bits as an uninterrupted one."""

import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest
from toy_engine import ToyEngine, state_of

from arm_core.data import Synthetic
from arm_core.engine.protocol import Engine, EngineOptions
from arm_core.engine.registry import installed_backends
from arm_core.recipe.recipe import Recipe, load_recipe, override
from arm_core.training.checkpoint import Checkpoint, newest_checkpoint, saved_steps
from arm_core.training.observer import Observer
from arm_core.training.records import read_rows
from arm_core.training.run_folder import RunFolder, resume_run, start_run
from arm_core.training.trainer import Trainer

TRAIN = Synthetic(23, (16, 16), classes=3)
HELD_OUT = Synthetic(5, (16, 16), classes=3, seed=1)
CHANGES = [
    "model.width=16",
    "model.depth=6",
    "model.image_size=16",
    "data.labels_per_class=none",
    "augmentation.crop_scale=0.3,1",
    "augmentation.flip=0.5",
    "augmentation.erase=0.5",
    "mixing.mixup=0.8",
    "mixing.cutmix=1",
    "optimizer.ema_decay=0.9",
    "training.batch_size=6",
    "training.accumulation=3",
    "training.drop_path=0.3",
    "training.length=20 steps",  # an epoch has 11 micro-batches: updates span its end
    "training.log_every=3",
    "training.save_every=4 steps",
    "training.evaluate_every=6 steps",
]


SHORTER = [
    "training.batch_size=4",
    "training.accumulation=2",
    "training.length=6 steps",
    "schedule.warmup=2 steps",
    "training.save_every=2 steps",
    "training.evaluate_every=3 steps",
]
"""For real engines."""


def make_recipe(backend: str) -> Recipe:
    return override(load_recipe("finetune-digits"), [*CHANGES, *([] if backend == "toy" else SHORTER)])


class Killer(Observer):
    """Dies, like with `kill -9`, after step `step` was passed to the engine; or slows each step down."""

    def __init__(self, step: int | None = None, pause: float = 0.0) -> None:
        self.step, self.pause = step, pause

    def stepped(self, step, images):
        time.sleep(self.pause)
        if step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def make_engine(run: RunFolder, backend: str) -> Engine:
    state = state_of(run)
    if backend == "toy":
        return ToyEngine(run.spec, state, run.recipe.optimizer)
    return installed_backends()[backend].create_engine(
        run.spec, state, optimizer=run.recipe.optimizer, options=EngineOptions(device="cpu", threads=1)
    )


def train(path: Path, backend: str, kill_at: int | None = None, pause: float = 0.0, seen=print) -> None:
    """Start a run at `path`, or resume it."""
    recipe = make_recipe(backend)
    run = resume_run(path, warn=seen) if saved_steps(path) else start_run(path, recipe, recipe.spec(3))
    with run:
        Trainer(run, make_engine(run, backend), TRAIN, HELD_OUT, observer=Killer(kill_at, pause)).train()


def in_another_process(*args, target=None) -> multiprocessing.Process:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["toy_engine", "arm_core.training.trainer", "arm_core.training.run_folder"]
    )
    process = context.Process(target=target or train, args=args)
    process.start()
    return process


def final(path: Path) -> Checkpoint:
    found = newest_checkpoint(path, pytest.fail)
    assert found is not None
    return found


def assert_same_run(path: Path, reference: Path) -> None:
    """The same bits in every file of the state, and the same rows except for their speed."""
    found, expected = final(path), final(reference)
    assert found.progress == expected.progress
    for kind in ("parameters", "exp_avg", "exp_avg_sq", "ema"):
        for name, value in getattr(expected.state, kind).items():
            assert getattr(found.state, kind)[name].tobytes() == value.tobytes(), f"{kind}/{name}"
    rows, wanted = (
        [{**row, "images_per_s": 0} for row in read_rows(folder / "metrics.jsonl")]
        for folder in (path, reference)
    )
    assert rows == wanted


def test_a_run_killed_at_random_moments_ends_bit_identical(tmp_path):
    began = time.monotonic()
    train(tmp_path / "whole", "toy", pause=0.01)
    duration = time.monotonic() - began
    draws = random.Random(7)
    killed = 0
    for _ in range(40):
        process = in_another_process(tmp_path / "killed", "toy", None, 0.01)
        # Half of the kills are early: while starting, loading, or writing the first checkpoint.
        process.join(draws.uniform(0.02, 0.2 if killed % 2 else 0.6 * duration))
        if process.is_alive():
            killed += 1
            process.kill()
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
    else:
        train(tmp_path / "killed", "toy")
    assert killed >= 5
    assert_same_run(tmp_path / "killed", tmp_path / "whole")


@pytest.mark.parametrize("step", [1, 4, 7, 13])
def test_a_run_killed_after_any_step_ends_bit_identical(tmp_path, step):
    train(tmp_path / "whole", "toy")
    process = in_another_process(tmp_path / "killed", "toy", step)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    train(tmp_path / "killed", "toy")
    assert_same_run(tmp_path / "killed", tmp_path / "whole")


def test_a_run_resumes_from_the_checkpoint_before_a_corrupt_one(tmp_path):
    train(tmp_path / "whole", "toy")
    process = in_another_process(tmp_path / "killed", "toy", 14)
    process.join()
    path = tmp_path / "killed" / "checkpoints" / "step-00000012" / "optimizer.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 64
    path.write_bytes(content)
    warnings: list[str] = []
    train(tmp_path / "killed", "toy", seen=warnings.append)
    assert len(warnings) == 1
    assert "optimizer.safetensors: corrupt" in warnings[0]
    assert_same_run(tmp_path / "killed", tmp_path / "whole")


def test_the_number_of_data_workers_changes_nothing(tmp_path):
    train(tmp_path / "whole", "toy")
    process = in_another_process(tmp_path / "other", "toy", 7)
    process.join()
    with resume_run(tmp_path / "other", ["data.workers=2"], warn=pytest.fail) as run:
        Trainer(run, make_engine(run, "toy"), TRAIN, HELD_OUT).train()
    assert_same_run(tmp_path / "other", tmp_path / "whole")


def test_a_killed_run_of_the_torch_engine_ends_bit_identical_on_the_cpu(tmp_path):
    pytest.importorskip("torch")
    train(tmp_path / "whole", "torch")
    process = in_another_process(tmp_path / "killed", "torch", 5)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    train(tmp_path / "killed", "torch")
    assert_same_run(tmp_path / "killed", tmp_path / "whole")
