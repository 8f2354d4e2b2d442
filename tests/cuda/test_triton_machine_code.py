"""Registers and instructions of the Triton kernels, compiled without a GPU."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or importlib.util.find_spec("torch") is None,
    reason="needs Triton and torch",
)

# Kernel and states: most registers and most instructions per token of 32 channels, on any architecture.
# 96 registers leave 20 warps on a multiprocessor, 255 leave 8.
LIMITS = {
    ("scan forward", 8): (72, 120),
    ("scan forward", 16): (96, 180),
    ("scan forward", 32): (128, 180),
    ("scan forward", 64): (128, 180),
    ("scan backward", 8): (200, 400),
    ("scan backward", 16): (255, 560),
    ("scan backward", 32): (255, 700),
    ("scan backward", 64): (255, 700),
    ("conv forward", 0): (80, 36),
    ("conv backward steps", 0): (168, 38),
    ("conv backward tokens", 0): (64, 25),
    ("gate forward", 0): (56, 9),
    ("gate backward", 0): (56, 8),
}
NEWER_BACKWARD = {16: 580, 32: 760, 64: 760}
"""From Triton 3.8 on, sums over lanes are separate additions; earlier versions fused them."""


@pytest.fixture(scope="module")
def table() -> list[dict[str, Any]]:
    script = Path(__file__).with_name("machine_code.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, script, "--json"], env=environment, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr
    rows: list[dict[str, Any]] = json.loads(done.stdout)
    assert {(row["kernel"], row["states"]) for row in rows} == set(LIMITS)
    assert {row["architecture"] for row in rows} == {80, 90, 100}
    return rows


def limits(row: dict[str, Any]) -> tuple[int, int]:
    from importlib.metadata import version

    registers, instructions = LIMITS[row["kernel"], row["states"]]
    if row["kernel"] == "scan backward" and tuple(map(int, version("triton").split(".")[:2])) >= (3, 8):
        instructions = NEWER_BACKWARD.get(row["states"], instructions)
    return registers, instructions


def test_no_kernel_spills_registers(table: list[dict[str, Any]]) -> None:
    assert [row for row in table if row["stack"]] == []


def test_registers_leave_room_for_other_warps(table: list[dict[str, Any]]) -> None:
    assert [row for row in table if row["registers"] > limits(row)[0]] == []


def test_instructions_per_token_stay_within_the_table(table: list[dict[str, Any]]) -> None:
    assert [row for row in table if row["instructions"] > limits(row)[1]] == []


def test_counts_detect_a_missing_loop(table: list[dict[str, Any]]) -> None:
    """Each state takes five instructions forward and twelve backward."""
    for row in table:
        at_least = {"scan forward": 5, "scan backward": 12}.get(row["kernel"], 0)
        warps = max(1, row["states"] // 16)
        assert row["instructions"] > at_least * row["states"] / warps, row
