"""Checkpoints that are written while training continues, and steps that end between micro-batches."""

import os
import signal
import threading
import time

import pytest
import test_resume
from test_resume import HELD_OUT, TRAIN, assert_same_run, in_another_process, make_recipe
from toy_engine import ToyEngine, state_of

from arm_core.data import Synthetic
from arm_core.training import checkpoint as ck
from arm_core.training.checkpoint import newest_checkpoint, saved_steps
from arm_core.training.observer import Observer
from arm_core.training.run_folder import resume_run, start_run
from arm_core.training.trainer import Trainer

SAVED = 8
"""A step with a checkpoint; the run has 20."""


class Slow(Observer):
    """Holds back the end of the write of step `SAVED` until step `until`; `seen` are steps in between."""

    def __init__(self, monkeypatch, until: int) -> None:
        self.until, self.seen = until, []
        self.go, real = threading.Event(), ck._write_content

        def write(folder, checkpoint):
            if checkpoint.progress.step == SAVED:
                assert self.go.wait(60)
            real(folder, checkpoint)

        monkeypatch.setattr(ck, "_write_content", write)

    def started(self, trainer):
        self.trainer = trainer

    def stepped(self, step, images):
        if SAVED < step <= self.until and not self.go.is_set():
            self.seen.append(step)
            assert SAVED not in saved_steps(self.trainer.run.path)
            if step == self.until:
                self.go.set()


def train(path, backend="toy", observer=None, engine_class=None, changes=(), source=TRAIN):
    from arm_core.recipe.recipe import override

    recipe = override(make_recipe(backend), ["training.keep=99", *changes])
    run = resume_run(path, warn=pytest.fail) if saved_steps(path) else start_run(path, recipe, recipe.spec(3))
    with run:
        if engine_class is None:
            engine = test_resume.make_engine(run, backend)
        else:
            engine = engine_class(run.spec, state_of(run), run.recipe.optimizer)
        return Trainer(run, engine, source, HELD_OUT, observer=observer).train()


@pytest.mark.parametrize("backend", ["toy", "torch", "mlx"])
def test_what_is_written_is_the_state_of_its_step_although_training_continues(tmp_path, monkeypatch, backend):
    if backend != "toy":
        pytest.importorskip({"torch": "torch", "mlx": "mlx.core"}[backend])
    changes = [
        "training.length=12 steps",
        f"training.save_every={SAVED} steps",
        "training.evaluate_every=none",
    ]
    train(tmp_path / "plain", backend, changes=changes)
    slow = Slow(monkeypatch, until=SAVED + 3)
    train(tmp_path / "slow", backend, slow, changes=changes)
    assert slow.seen == [SAVED + 1, SAVED + 2, SAVED + 3]
    assert saved_steps(tmp_path / "slow") == saved_steps(tmp_path / "plain") == [0, SAVED, 12]
    for step in (SAVED, 12):
        for file in ("model", "optimizer", "ema"):
            place = f"checkpoints/{ck.step_name(step)}/{file}.safetensors"
            assert (tmp_path / "slow" / place).read_bytes() == (tmp_path / "plain" / place).read_bytes(), (
                place
            )


def train_and_die_while_writing(path):
    """Killed at step 10, while the checkpoint of step 8 is held back."""
    real = ck._write_content

    def write(folder, checkpoint):
        real(folder, checkpoint)
        if checkpoint.progress.step == SAVED:
            (folder / ck.MANIFEST).unlink()
            time.sleep(60)

    ck._write_content = write

    class Killer(Observer):
        def stepped(self, step, images):
            if step == SAVED + 2:
                os.kill(os.getpid(), signal.SIGKILL)

    train(path, observer=Killer())


def test_a_run_killed_during_a_write_resumes_from_the_checkpoint_before(tmp_path):
    process = in_another_process(tmp_path / "killed", target=train_and_die_while_writing)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    left = sorted(item.name for item in (tmp_path / "killed/checkpoints").iterdir())
    assert left[-1] == f"{ck.step_name(SAVED)}.tmp"
    # Evaluations save, too: that of step 6 is the last one before step 8.
    assert newest_checkpoint(tmp_path / "killed", pytest.fail).progress.step == 6
    train(tmp_path / "killed")
    train(tmp_path / "whole")
    assert_same_run(tmp_path / "killed", tmp_path / "whole")
    assert not list((tmp_path / "killed/checkpoints").glob("*.tmp"))


def test_a_failed_write_ends_training_at_the_next_step(tmp_path, monkeypatch):
    def full(folder, checkpoint):
        if checkpoint.progress.step == SAVED:
            raise OSError(28, "No space left on device")
        real(folder, checkpoint)

    real = ck._write_content
    monkeypatch.setattr(ck, "_write_content", full)

    class Watch(Observer):
        def started(self, trainer):
            self.trainer = trainer

        def stepped(self, step, images):
            self.step = step
            if step == SAVED + 1:
                self.trainer._writer.join()

    watch = Watch()
    with pytest.raises(OSError, match=rf"step-0000000{SAVED}: cannot be written \(No space left"):
        train(tmp_path, observer=watch)
    assert watch.step == SAVED + 1
    assert saved_steps(tmp_path)[-1] == 6


def test_an_interrupted_program_completes_the_write_before_it_releases_the_run(tmp_path, monkeypatch):
    def slowly(folder, checkpoint):
        if checkpoint.progress.step == SAVED:
            time.sleep(0.5)
        real(folder, checkpoint)

    real = ck._write_content
    monkeypatch.setattr(ck, "_write_content", slowly)

    class Interrupting(Observer):
        def stepped(self, step, images):
            if step == SAVED + 1:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, observer=Interrupting())
    assert newest_checkpoint(tmp_path, pytest.fail).progress.step == SAVED


@pytest.mark.parametrize("moment", ["between micro-batches", "while images are read"])
def test_a_signal_does_not_wait_for_the_rest_of_a_step(tmp_path, moment):
    """The unfinished step is dropped, and the resumed run ends with the same bits."""
    computed: list[int] = []

    class Interrupted(ToyEngine):
        def loss_and_gradients(self, batch):
            computed.append(1)
            if len(computed) == 3 * 7 + 2 and moment == "between micro-batches":  # second of three, step 8
                os.kill(os.getpid(), signal.SIGTERM)
            return super().loss_and_gradients(batch)

    class Reading(Synthetic):
        count = 0

        def item(self, index, epoch=0):
            self.count += 1
            if self.count == 2 * 3 * 7 + 1 and moment == "while images are read":  # first of two, step 8
                os.kill(os.getpid(), signal.SIGTERM)
            return super().item(index, epoch)

    source = Reading(len(TRAIN), (16, 16), classes=3)
    outcome = train(tmp_path / "stopped", engine_class=Interrupted, source=source)
    assert (outcome.signal, outcome.step) == ("SIGTERM", 7)
    assert len(computed) == (3 * 7 + 2 if moment == "between micro-batches" else 3 * 7)
    train(tmp_path / "stopped")
    train(tmp_path / "whole")
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")
