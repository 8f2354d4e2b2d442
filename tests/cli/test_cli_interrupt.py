"""Ctrl-C in a terminal, which sends SIGINT to every process of the group, stops `arm demo` immediately."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

LIMIT = 2.0
"""Seconds within which every process has ended."""


@pytest.mark.parametrize("delay", [0.0, 1.5, 6.0])
def test_ctrl_c_ends_the_demo_and_its_workers_within_two_seconds(tmp_path, delay):
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", "from arm_cli.main import main; main()", "demo", "--out", "demo"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("Pretraining on ")
        time.sleep(delay)  # while workers are started, while they load the engine, while they train
        children = psutil.Process(process.pid).children(recursive=True)
        began = time.monotonic()
        os.killpg(process.pid, signal.SIGINT)
        code = process.wait(timeout=60)
        _, alive = psutil.wait_procs(children, timeout=60)
        seconds = time.monotonic() - began
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert (code, alive) == (130, [])
    assert seconds < LIMIT
    _, said = process.communicate()
    assert said.startswith("Stopped")
    assert "Traceback" not in said
