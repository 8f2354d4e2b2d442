"""benchmarks/metal.py: its peer computes the same, and it refuses to run without Metal."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core", reason="needs MLX")

import problems  # noqa: E402
from problems import SCAN, Case  # noqa: E402

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def log_depth(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import log_depth

    return log_depth


@pytest.mark.parametrize("length", [1, 2, 7, 16])
def test_the_log_depth_scan_equals_the_scan(length: int, log_depth: Any) -> None:
    values = problems.inputs(Case(directions=2, batch=2, length=length, channels=5, states=4))
    grad = np.random.default_rng(0).standard_normal(values["z"].shape).astype(np.float32)
    expected, grads = problems.scan(values, grad)
    arrays, order = [mx.array(values[name]) for name in SCAN], mx.array(values["order"])
    (out,), found = mx.vjp(lambda *a: log_depth.log_depth_scan(*a, order), arrays, [mx.array(grad)])
    for a, b in zip((out, *found), (expected, *grads.values()), strict=True):
        assert np.abs(np.asarray(a) - b).max() <= 2e-6 * np.abs(b).max()


@pytest.mark.parametrize("directions", [1, 4])
def test_the_arrangement_around_the_peer_is_our_scan(
    directions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from mlx_peer import peer_scan

    def plain(x: mx.array, delta: mx.array, A: mx.array, B: mx.array, C: mx.array, D: mx.array) -> mx.array:
        h, ys = mx.zeros((len(x), *A.shape)), []
        for t in range(x.shape[1]):
            drive = (delta[:, t] * x[:, t])[..., None] * B[:, t, None]
            h = mx.exp(delta[:, t, :, None] * A) * h + drive
            ys.append((h * C[:, t, None]).sum(-1))
        return mx.stack(ys, 1) + D * x

    values = problems.inputs(Case(directions=directions, batch=2, length=6, channels=5, states=4))
    grad = np.random.default_rng(0).standard_normal(values["z"].shape).astype(np.float32)
    expected, grads = problems.scan(values, grad)
    arrays, order = [mx.array(values[name]) for name in SCAN], mx.array(values["order"])
    (out,), found = mx.vjp(lambda *a: peer_scan(*a, order, scan=plain), arrays, [mx.array(grad)])
    for a, b in zip((out, *found), (expected, *grads.values()), strict=True):
        assert np.abs(np.asarray(a) - b).max() <= 2e-6 * np.abs(b).max()


@pytest.mark.skipif(mx.metal.is_available(), reason="here it would run")
def test_without_metal_the_benchmark_says_what_it_needs() -> None:
    command = [sys.executable, str(BENCHMARKS / "metal.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert done.stderr.strip() == "benchmarks/metal.py needs an Apple GPU: MLX finds no Metal GPU here"
