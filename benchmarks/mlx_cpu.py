"""MLX on a CPU: a base pretraining step compared with the torch engine's, and the scan with plain MLX scans.

    python benchmarks/mlx_cpu.py [--repeats 7] [--batch 4] [--threads 1] [--out FILE.json]

Each engine runs in a separate process, and the steps alternate, so that both run under the same
conditions. A step is forward, backward, gradient norm and AdamW on random images. The scan runs forward and
backward with B=8 L=128 D=192 N=16: the kernel that both engines share, a loop over the tokens with its own
backward pass (`--scan reference`), and a log-depth scan. Results are compared before they are timed.
Medians, with the fastest and slowest; about two minutes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from hardware import header, machine

from arm_core.engine.optimizer import OptimizerSettings
from arm_core.engine.protocol import Batch, EngineOptions, TrainingState
from arm_core.engine.registry import choose_backend
from arm_core.model.parameters import initial_parameters
from arm_core.model.presets import pretrain_preset

ENGINES = ("torch", "mlx")
WARM_UP = 3
"""Steps until kernels are compiled and memory is allocated."""
STEP_TARGET, SCAN_TARGET = 2.5, 8.0
"""Largest ratio of MLX's step to torch's; smallest ratio of the best plain scan to the kernel."""
TOLERANCE = 1e-4
"""Relative, between the engines' losses and between the scans' gradients."""


# one engine, in its own process


def serve(name: str, batch: int, threads: int | None) -> None:
    """Take a step for every line on stdin; print seconds and loss of each."""
    spec = pretrain_preset("base")
    engine = choose_backend(name).create_engine(
        spec,
        TrainingState(parameters=initial_parameters(spec, seed=0)),
        optimizer=OptimizerSettings(clip=3.0),
        options=EngineOptions(device="cpu", threads=threads),
    )
    images = np.random.default_rng(0).standard_normal((batch, *spec.image_size, 3)).astype(np.float32)
    for step, _ in enumerate(sys.stdin, start=1):
        start = time.perf_counter()
        loss = engine.train_step([Batch(images=images)], step=step, lr=1e-4).result().loss
        print(json.dumps([time.perf_counter() - start, loss]), flush=True)


@contextmanager
def served(name: str, batch: int, threads: int | None) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, __file__, "--serve", name, "--batch", str(batch)]
    command += [] if threads is None else ["--threads", str(threads)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def step(process: subprocess.Popen[str]) -> tuple[float, float]:
    assert process.stdin is not None
    assert process.stdout is not None
    print(file=process.stdin, flush=True)
    seconds, loss = json.loads(process.stdout.readline())
    return seconds, loss


def compare_steps(batch: int, threads: int | None, repeats: int) -> dict[str, Any]:
    """Seconds of each engine's steps, and the ratios of MLX to torch, interleaved."""
    times: dict[str, list[float]] = {name: [] for name in ENGINES}
    with served("torch", batch, threads) as torch, served("mlx", batch, threads) as mlx:
        for turn in range(WARM_UP + repeats):
            (torch_seconds, torch_loss), (mlx_seconds, mlx_loss) = step(torch), step(mlx)
            assert abs(mlx_loss - torch_loss) < TOLERANCE * torch_loss, "the engines disagree"
            if turn >= WARM_UP:
                times["torch"].append(torch_seconds)
                times["mlx"].append(mlx_seconds)
    return {"seconds": times, "ratios": [b / a for a, b in zip(*times.values(), strict=True)]}


# the scan


def compare_scans(threads: int | None, repeats: int) -> dict[str, list[float]]:
    """Seconds of forward and backward by implementation, interleaved."""
    from arm_mlx import blas

    blas.load()
    import mlx.core as mx
    from log_depth import log_depth_scan

    from arm_core import cpu_kernels
    from arm_core.engine.scan_timing import ScanShape
    from arm_mlx import scan

    cpu_kernels.set_threads(threads)

    shape = ScanShape(spec=pretrain_preset("tiny"), batch=8)
    assert shape.sizes == (1, 8, 128, 192, 16)
    scan.IMPLEMENTATIONS["log-depth"] = replace(
        scan.IMPLEMENTATIONS["reference"], selective_scan=log_depth_scan
    )
    with mx.stream(mx.cpu):
        inputs, order = [mx.array(a) for a in shape.arrays().values()], mx.array(shape.order())
        grad = mx.random.normal(inputs[-1].shape)

        def both(name: str) -> list[Any]:
            run = lambda *arrays: scan.selective_scan(*arrays, order, impl=name)  # noqa: E731
            outputs, gradients = mx.vjp(run, inputs, [grad])
            mx.eval(outputs, gradients)
            return [*outputs, *gradients]

        names = ("cpu", "reference", "log-depth")
        expected = both("cpu")
        for name in names[1:]:
            for found, value in zip(both(name), expected, strict=True):
                error = mx.abs(found - value).max() / mx.abs(value).max()
                assert error.item() < TOLERANCE, f"{name} disagrees with the kernel"
        times: dict[str, list[float]] = {name: [] for name in names}
        for _ in range(repeats):
            for name in names:
                start = time.perf_counter()
                both(name)
                times[name].append(time.perf_counter() - start)
    return times


def spread(times: list[float], unit: float, digits: int) -> str:
    low, middle, high = (f(times) * unit for f in (min, statistics.median, max))
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--batch", type=int, default=4, help="images in a step")
    parser.add_argument("--threads", type=int, help="CPU threads; by default each library's own choice")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="also write the measurements")
    parser.add_argument("--serve", choices=ENGINES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve, options.batch, options.threads)
        return
    about = header("mlx", "torch", "numba", "numpy")
    products = "; ".join(f"{name}: {choose_backend(name).cpu_products()[0]}" for name in ENGINES)
    print(f"{about}\nproducts  {products}", end="\n\n")

    scans = compare_scans(options.threads, 3 * options.repeats)
    best = min((name for name in scans if name != "cpu"), key=lambda name: statistics.median(scans[name]))
    print("scan, B=8 L=128 D=192 N=16, forward and backward, in ms")
    for name, times in scans.items():
        times_kernel = statistics.median(times) / statistics.median(scans["cpu"])
        print(f"  {name:10s} {spread(times, 1e3, 1):28s} {times_kernel:6.1f}x the kernel")
    times_faster = statistics.median(a / b for a, b in zip(scans[best], scans["cpu"], strict=True))
    print(f"  the kernel is {times_faster:.1f} times as fast as {best} (target {SCAN_TARGET:g})\n")

    steps = compare_steps(options.batch, options.threads, options.repeats)
    print(f"base pretraining step, batch {options.batch}, in s")
    for name, label in zip(ENGINES, ("torch", "mlx"), strict=True):
        print(f"  {label:10s} {spread(steps['seconds'][name], 1.0, 2)}")
    print(f"  mlx / torch {spread(steps['ratios'], 1.0, 2)} (target {STEP_TARGET:g})")
    if options.out:
        found = {"machine": machine(), "about": about, "scan_seconds": scans, "step": steps}
        options.out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
