"""The Metal scan on this Mac, compared with plain MLX and the memory's rate, and in whole training steps.

    python benchmarks/metal.py [--models tiny base] [--batch 8] [--repeats 20] [--out FILE.json]

Every implementation is checked against the CPU's first. Then, for a layer of each model in pretraining and
finetuning, float32 and bfloat16: forward, and forward with backward, of the kernels, of the loop with its
own backward pass (`reference`), of a log-depth scan, and of mlx-vision-mamba if it is installed; GB/s and
shares as in `arm bench scan`. Then images/s of training steps. docs/performance.md says how to read the
figures.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import mlx_peer
import numpy as np
from hardware import commit, header, machine
from log_depth import log_depth_scan

from arm_core.engine.optimizer import OptimizerSettings
from arm_core.engine.protocol import Batch, EngineOptions, Precision, TrainingState
from arm_core.engine.scan_timing import ScanShape, ScanTimes, median
from arm_core.model.parameters import initial_parameters
from arm_core.model.presets import classifier_preset, pretrain_preset
from arm_core.model.spec import ClassifierSpec, ModelSpec
from arm_mlx import backend

WARM_UP, STEPS = 3, 10
TOLERANCE = 1e-5
"""Tolerance relative to the largest value, between float32 implementations."""


def scans(device: str) -> list[str]:
    """The kernels first, if they can run, then the peers."""
    return [name for name, why in backend.scans(device).items() if why is None]


def offer_peers() -> None:
    """Add the log-depth scan and, if it is installed, mlx-vision-mamba to the scans of the engine."""
    from arm_mlx.scan import IMPLEMENTATIONS

    IMPLEMENTATIONS["log-depth"] = replace(IMPLEMENTATIONS["reference"], selective_scan=log_depth_scan)
    if mlx_peer.installed():
        unusable = IMPLEMENTATIONS["metal"].unusable
        IMPLEMENTATIONS[mlx_peer.NAME] = replace(
            IMPLEMENTATIONS["reference"], selective_scan=mlx_peer.peer_scan, unusable=unusable
        )


def check(device: str) -> None:
    """Every scan's result and gradients against those of the CPU. Raises AssertionError."""
    spec = classifier_preset("tiny")
    shape = ScanShape(spec=replace(spec, encoder=replace(spec.encoder, width=40)), batch=2)
    import mlx.core as mx

    from arm_mlx.devices import resolve_device
    from arm_mlx.scan import selective_scan

    inputs = [mx.array(a) for a in shape.arrays().values()]
    order, grad = mx.array(shape.order()), mx.ones_like(inputs[-1])

    def run(scan: str) -> list[np.ndarray]:
        outputs, grads = mx.vjp(lambda *a: selective_scan(*a, order, impl=scan), inputs, [grad])
        return [np.array(a) for a in (*outputs, *grads)]

    with mx.stream(mx.Device(mx.cpu)):
        expected = run("cpu")
    with mx.stream(resolve_device(device)):
        for scan in scans(device):
            for found, wanted in zip(run(scan), expected, strict=True):
                error = np.abs(found - wanted).max() / np.abs(wanted).max()
                assert error < TOLERANCE, f"{scan}: {error:.1e} from the CPU's scan"


def measure_scans(models: list[str], device: str, batch: int, repeats: int) -> Iterator[dict[str, Any]]:
    timer = backend.scan_timer(device)
    rate = timer.copy_rate()
    print(f"{timer.device} copies {rate / 1e9:.0f} GB/s")
    for model in models:
        for stage, spec in (("pretrain", pretrain_preset(model)), ("finetune", classifier_preset(model))):
            for bfloat16 in (False, True):
                shape = ScanShape(spec=spec, batch=batch, bfloat16=bfloat16)
                print(f"\n{model} {stage}, {shape}, {'bfloat16' if bfloat16 else 'float32'}")
                for scan in scans(device):
                    row = scan_row(shape, rate, timer.time(shape, scan, repeats=repeats))
                    print(scan_line(scan, row), flush=True)
                    yield {"model": model, "stage": stage, "bfloat16": bfloat16, "scan": scan, **row}


def scan_row(shape: ScanShape, rate: float, times: ScanTimes) -> dict[str, Any]:
    forward, both = median(times.forward), median(times.both)
    return {
        "shape": str(shape),
        "forward_s": times.forward,
        "both_s": times.both,
        "forward_gb_per_s": shape.forward_bytes / forward / 1e9,
        "both_gb_per_s": shape.both_bytes / both / 1e9,
        "forward_share": shape.forward_bytes / rate / forward,
        "both_share": shape.both_bytes / rate / both,
        "copy_gb_per_s": rate / 1e9,
    }


def scan_line(scan: str, row: dict[str, Any]) -> str:
    words = [f"  {scan:16s}"]
    for way, label in (("forward", "forward"), ("both", "with backward")):
        words.append(f"{label} {median(row[f'{way}_s']) * 1e3:9.3f} ms")
        words.append(f"{row[f'{way}_gb_per_s']:6.1f} GB/s {row[f'{way}_share']:5.0%}  ")
    return " ".join(words)


def measure_steps(models: list[str], device: str, batch: int, steps: int) -> Iterator[dict[str, Any]]:
    for model in models:
        for stage, spec in (("pretrain", pretrain_preset(model)), ("finetune", classifier_preset(model))):
            for precision in (Precision.FLOAT32, Precision.BFLOAT16):
                print(f"\n{model} {stage}, training step, batch {batch}, {precision}")
                # The plain scans take minutes in a base model.
                for scan in scans(device) if model == "tiny" else scans(device)[:1]:
                    seconds = step_seconds(spec, device, scan, precision, batch, steps)
                    print(
                        f"  {scan:10s} {seconds * 1e3:9.1f} ms   {batch / seconds:8.1f} images/s", flush=True
                    )
                    yield {
                        "model": model,
                        "stage": stage,
                        "precision": str(precision),
                        "scan": scan,
                        "batch": batch,
                        "step_s": seconds,
                        "images_per_s": batch / seconds,
                    }


def step_seconds(
    spec: ModelSpec, device: str, scan: str, precision: Precision, batch: int, steps: int
) -> float:
    """Mean over `steps` steps without waiting in between, as between two logged ones."""
    engine = backend.create_engine(
        spec,
        TrainingState(parameters=initial_parameters(spec, seed=0)),
        optimizer=OptimizerSettings(clip=3.0),
        options=EngineOptions(device=device, scan=scan, precision=precision),
    )
    rng = np.random.default_rng(0)
    images = rng.standard_normal((batch, *spec.image_size, 3), dtype=np.float32)
    targets = None
    if isinstance(spec, ClassifierSpec):
        targets = np.eye(spec.classes, dtype=np.float32)[rng.integers(0, spec.classes, batch)]
    data = Batch(images=images, targets=targets)
    number = iter(range(1, 10000))
    for _ in range(WARM_UP):
        engine.train_step([data], step=next(number), lr=1e-4).result()
    start = time.perf_counter()
    for _ in range(steps):
        last = engine.train_step([data], step=next(number), lr=1e-4)
    last.result()
    return (time.perf_counter() - start) / steps


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=["tiny", "base"])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--steps", type=int, default=STEPS, help="0 skips the training steps")
    parser.add_argument("--device", choices=("gpu", "cpu"), default="gpu", help="cpu: without the kernels")
    parser.add_argument("--out", type=Path, help="by default benchmarks/results/metal-DEVICE-DATE.json")
    options = parser.parse_args()
    if options.device not in backend.devices():
        sys.exit("benchmarks/metal.py needs an Apple GPU: MLX finds no Metal GPU here")
    offer_peers()
    name = backend.scan_timer(options.device).device
    print(header("mlx", "numpy"), f"device    {name}", sep="\n", end="\n\n")
    check(options.device)
    print(f"{', '.join(scans(options.device))}: as on the CPU, to {TOLERANCE:.0e} of the largest value")
    report = {
        "device": name,
        "machine": machine(),
        "version": backend.version(),
        "commit": commit(),
        "date": date.today().isoformat(),
        "command": " ".join(sys.argv),
        "scans": list(measure_scans(options.models, options.device, options.batch, options.repeats)),
        "steps": list(measure_steps(options.models, options.device, options.batch, options.steps))
        if options.steps
        else [],
    }
    place = f"metal-{name.lower().replace(' ', '-')}-{report['date']}.json"
    out = options.out or Path(__file__).parent / "results" / place
    out.write_text(json.dumps(report, indent=1) + "\n")
    print(f"\nwritten to {out}")


if __name__ == "__main__":
    main()
