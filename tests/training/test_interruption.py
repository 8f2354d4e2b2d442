"""Signals and kills during an evaluation, second signals, closed terminals."""

import os
import signal

import numpy as np
import pytest
from test_trainer import HELD_OUT, SMALL, TRAIN, Recorder, make_engine
from toy_engine import ToyEngine

from arm_core.recipe.recipe import Recipe, load_recipe, override
from arm_core.training.checkpoint import newest_checkpoint, saved_steps
from arm_core.training.records import read_rows
from arm_core.training.run_folder import resume_run, start_run
from arm_core.training.signals import StopOnSignal
from arm_core.training.trainer import Trainer

EVALUATED = 7
"""A step with an evaluation, but without a regular checkpoint."""


class Killed(BaseException):
    """Ends the process immediately, like SIGKILL."""


@pytest.fixture
def recipe() -> Recipe:
    changes = ["training.evaluate_every=7 steps", "optimizer.ema_decay=0.9", "training.batch_size=8"]
    return override(load_recipe("finetune-digits"), [*SMALL, *changes])


class AtEvaluation(Recorder):
    """Does something at the first batch of the evaluation at step `EVALUATED`."""

    def __init__(self, action) -> None:
        super().__init__()
        self.action, self.step = action, 0

    def stepped(self, step, images):
        super().stepped(step, images)
        self.step = step

    def evaluating(self, images, total):
        if self.step == EVALUATED:
            self.action()


def run(path, recipe, observer=None):
    opened = (
        resume_run(path, warn=pytest.fail) if saved_steps(path) else start_run(path, recipe, recipe.spec(4))
    )
    with opened:
        engine = make_engine(opened)
        return Trainer(opened, engine, TRAIN, HELD_OUT, observer=observer).train(), engine


def assert_same_end(path, whole):
    found, expected = (newest_checkpoint(folder, pytest.fail) for folder in (path, whole))
    assert found.progress == expected.progress
    for name, value in expected.state.parameters.items():
        assert found.state.parameters[name].tobytes() == value.tobytes(), name
    rows, wanted = (
        [{**row, "images_per_s": 0} for row in read_rows(folder / "metrics.jsonl")]
        for folder in (path, whole)
    )
    assert rows == wanted


def test_a_run_killed_during_an_evaluation_loses_no_step(tmp_path, recipe):
    def kill():
        raise Killed

    with pytest.raises(Killed):
        run(tmp_path / "killed", recipe, AtEvaluation(kill))
    assert newest_checkpoint(tmp_path / "killed", pytest.fail).progress.step == EVALUATED
    run(tmp_path / "killed", recipe)
    run(tmp_path / "whole", recipe)
    assert_same_end(tmp_path / "killed", tmp_path / "whole")


@pytest.mark.parametrize("averaged", [False, True])
def test_a_signal_ends_an_evaluation_after_the_current_batch(tmp_path, recipe, averaged, monkeypatch):
    """This includes the evaluation of the averaged weights, which are swapped back."""
    calls: list[int] = []
    batches = 3  # 11 images in micro-batches of 4

    def forward(self, images, *, intermediates=False):
        calls.append(len(images))
        return real(self, images, intermediates=intermediates)

    real = ToyEngine.forward
    monkeypatch.setattr(ToyEngine, "forward", forward)

    def interrupt():
        if len(calls) == (batches + 1 if averaged else 1):
            os.kill(os.getpid(), signal.SIGTERM)

    outcome, engine = run(tmp_path / "stopped", recipe, AtEvaluation(interrupt))
    assert len(calls) == (batches + 1 if averaged else 1)
    assert (outcome.signal, outcome.step) == ("SIGTERM", EVALUATED)
    assert f"after step {EVALUATED} of 15; resume with: " in outcome.message
    saved = newest_checkpoint(tmp_path / "stopped", pytest.fail).state.parameters
    for name, value in engine.parameters.items():
        np.testing.assert_array_equal(value, saved[name])
    assert not [row for row in read_rows(tmp_path / "stopped" / "metrics.jsonl") if "eval_loss" in row]
    run(tmp_path / "stopped", recipe)
    run(tmp_path / "whole", recipe)
    assert_same_end(tmp_path / "stopped", tmp_path / "whole")


def test_the_old_best_checkpoint_is_removed_as_soon_as_there_is_a_better_one(tmp_path, recipe):
    scores = iter([0.5, 0.25, 0.75])

    class Scripted(ToyEngine):
        def forward(self, images, *, intermediates=False):
            count = len(images)
            right = round(next(scores) * count)
            chosen = np.where(np.arange(count) < right, np.arange(count), np.arange(count) + 1) % 4
            return {"logits": np.eye(4, dtype=np.float32)[chosen]}

    from arm_core.data import Synthetic

    changes = ["training.evaluate_every=5 steps", "training.keep=1", "optimizer.ema_decay=none"]
    recipe = override(recipe, changes)
    with start_run(tmp_path, recipe, recipe.spec(4)) as opened:
        engine = Scripted(opened.spec, make_engine(opened).export_state(), opened.recipe.optimizer)
        outcome = Trainer(opened, engine, TRAIN, Synthetic(4, (8, 8), classes=4)).train()
    assert outcome.best["step"] == 15
    assert saved_steps(tmp_path) == [15]


def test_an_ignored_signal_stays_ignored():
    """For example SIGHUP under `nohup`."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopOnSignal(pytest.fail) as noted:
            os.kill(os.getpid(), signal.SIGHUP)
        assert noted.signal is None
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_closed_terminal_does_not_hide_the_signal():
    def say(sentence):
        raise OSError(5, "Input/output error")

    with StopOnSignal(say) as noted:
        os.kill(os.getpid(), signal.SIGHUP)
        assert noted.signal == "SIGHUP"
