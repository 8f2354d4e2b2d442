"""Training continues when its output is no longer read."""

import os
import pty
import signal
import subprocess
import sys
import time

import pytest
from training_folder import furnish

from arm_core.training.checkpoint import saved_steps

WORDS = ["pretrain", "pre.toml", "--data", "train", "--out", "run", "--device", "cpu", "--threads", "1"]
ARM = [sys.executable, "-c", "from arm_cli.main import main; main()", *WORDS]


@pytest.fixture
def place(tmp_path):
    furnish(tmp_path)
    return tmp_path


def environment(**more):
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONUNBUFFERED": "1", **more}


@pytest.mark.parametrize("redirected", [subprocess.STDOUT, subprocess.DEVNULL])
def test_a_closed_pipe_does_not_end_training(place, redirected):
    """Like `2>&1 | head -1`, and like --json with a reader that exits."""
    words = [] if redirected == subprocess.STDOUT else ["--json"]
    process = subprocess.Popen(
        [*ARM, *words], cwd=place, env=environment(), stdout=subprocess.PIPE, stderr=redirected
    )
    assert process.stdout is not None
    if redirected == subprocess.STDOUT:
        process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=120) == 0
    assert saved_steps(place / "run")[-1] == 4


def test_a_closed_terminal_saves_and_stops(place):
    main, end = pty.openpty()
    words = ["--set", "training.length=100000 steps", "--set", "training.save_every=50000 steps"]
    process = subprocess.Popen(
        [*ARM, *words],
        cwd=place,
        env=environment(),
        stdout=end,
        stderr=end,
        stdin=end,
        start_new_session=True,
    )
    os.close(end)
    while not (place / "run" / "metrics.jsonl").exists():
        os.read(main, 1000)
        time.sleep(0.05)
        assert process.poll() is None
    os.close(main)  # writing now fails with EIO
    process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=60) == 128 + signal.SIGHUP
    assert saved_steps(place / "run")[-1] > 0
