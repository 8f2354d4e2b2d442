"""A process of an MLX job that loses the others ends within a time limit, with a nonzero exit code."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("mlx.core", reason="needs MLX")

from test_mlx_ranks import free_ports, needs_ring

from arm_core.engine.ranks import PeerFailed
from arm_mlx.distributed import MAX_TEXT, MlxRanks
from arm_mlx.watch import wait_limit

LINE = "Error: another process of the job does not answer; stopping\n"


class Damaged(MlxRanks):
    """Two ranks in one process; `damage` changes the message of the second one."""

    def __init__(self, damage) -> None:
        self.rank, self.world = 0, 2
        self._failure, self._exchanges, self._damage, self._calls = None, 0, damage, 0

    def _gather(self, row):
        self._calls += 1
        return self._damage(self._calls, np.stack([row, row]))


def change(call: int, column: int, value: int):
    def damage(calls, rows):
        if calls == call:
            rows[1, column] = value
        return rows

    return damage


def test_valid_messages_of_two_ranks_are_returned():
    assert Damaged(lambda calls, rows: rows).gather({"a": 1}) == [{"a": 1}] * 2


@pytest.mark.parametrize(
    "damage",
    [
        change(1, 0, 7),  # the number of the exchange
        change(1, 1, -1),
        change(1, 1, MAX_TEXT + 1),
        change(1, 1, 3),  # a size that does not match the text
        change(1, 2, 12345),  # the checksum
        change(2, 0, 0),  # the text
        lambda calls, rows: np.zeros_like(rows),
    ],
)
def test_an_invalid_message_is_a_lost_process(damage):
    ranks = Damaged(damage)
    with pytest.raises(PeerFailed, match="another process of the job has ended"):
        ranks.gather({"a": 1})


SCRIPT = """
import os, signal, sys, threading, time
from arm_mlx import backend, watch
watch.AFTER_SIGNAL = 1.0
ranks = backend.join("cpu")
assert ranks.gather(ranks.rank) == [0, 1]
if ranks.rank == 1:
    print("stopped", flush=True)
    os.kill(os.getpid(), signal.SIGSTOP)
signal.signal(signal.SIGTERM, lambda number, frame: None)
ranks.gather("never answered")
"""


def start(folder: Path, limit: str) -> list[subprocess.Popen[str]]:
    hosts = folder / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(2)]))
    environment = {**os.environ, "MLX_HOSTFILE": str(hosts), "ARM_PEER_TIMEOUT": limit}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    return [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT],
            env={**environment, "MLX_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]


@needs_ring
@pytest.mark.parametrize("signalled", [False, True])
def test_waiting_for_a_process_that_does_not_answer_has_a_time_limit(tmp_path, signalled):
    waiting, stopped = start(tmp_path, "600" if signalled else "2")
    try:
        assert stopped.stdout is not None
        assert stopped.stdout.readline() == "stopped\n"
        if signalled:
            time.sleep(1)
            waiting.send_signal(signal.SIGTERM)
        assert waiting.stderr is not None
        assert waiting.stderr.read() == LINE
        assert waiting.wait(timeout=30) == 1
    finally:
        for process in (waiting, stopped):
            process.kill()
            process.communicate()


def test_the_limit_is_a_number_of_seconds(monkeypatch):
    assert wait_limit() == 600
    monkeypatch.setenv("ARM_PEER_TIMEOUT", "20")
    assert wait_limit() == 20
    for text in ("0", "-1", "soon", "nan"):
        monkeypatch.setenv("ARM_PEER_TIMEOUT", text)
        with pytest.raises(ValueError, match="ARM_PEER_TIMEOUT: expected a number of seconds above 0"):
            wait_limit()
