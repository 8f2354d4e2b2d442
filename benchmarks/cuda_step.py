"""Training steps of ARM on a GPU, against the official arrangement: images/s, TFLOP/s, memory.

    python benchmarks/cuda_step.py [--peers FOLDER] [--models base large huge] [--stages ...]
    python benchmarks/cuda_step.py --device cpu --tiny          (a trial without a GPU)

Full steps in bfloat16 with float32 master weights: images from host memory, forward, backward, clipping,
AdamW, and for classifiers the moving average. The variants are Triton, Triton with compiled blocks, and the
same engine with the mixers arranged as in the official code (a call of mamba-ssm per direction, with flips
around it). TFLOP/s counts two operations per multiply-add of `arm info`, three forward passes a step.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from cuda_builds import build_peers
from cuda_peers import officially_arranged, peer_functions
from cuda_report import check_device, circumstances, options, table, write

from arm_core.data import IMAGENET_MEAN, IMAGENET_STD
from arm_core.engine.byte_images import ByteImages, Mix
from arm_core.engine.optimizer import OptimizerSettings
from arm_core.engine.protocol import (
    Array,
    Batch,
    Compile,
    EngineOptions,
    OutOfMemory,
    Precision,
    TrainingState,
)
from arm_core.model.cost import cost_table
from arm_core.model.parameters import initial_parameters
from arm_core.model.presets import classifier_preset, pretrain_preset
from arm_core.model.spec import ClassifierSpec, EncoderSpec, ModelSpec, PretrainSpec
from arm_cuda import scan as scans
from arm_cuda.engine import TorchEngine

WARM_UP, SAMPLES, STEPS = 4, 3, 20
BATCHES = {
    ("base", "pretrain"): 256,
    ("base", "finetune"): 128,
    ("large", "pretrain"): 128,
    ("large", "finetune"): 64,
    ("huge", "pretrain"): 64,
    ("huge", "finetune"): 32,
}
"""Images on one GPU; the recipes' batches, divided by 8 or more GPUs."""
STAGES = ("pretrain", "finetune")


def as_it_is(device: str, spec: ModelSpec) -> AbstractContextManager[object]:
    return nullcontext()


@dataclass(frozen=True, kw_only=True)
class Way:
    """One way to run a training step."""

    name: str
    scan: str
    compile: Compile = Compile.NONE
    arranged: Callable[[str, ModelSpec], AbstractContextManager[object]] = as_it_is
    """For a device and a model: the context in which the model is run."""


WAYS = (
    Way(name="Triton", scan="triton"),
    Way(name="Triton, compiled blocks", scan="triton", compile=Compile.BLOCKS),
    Way(name="CUDA C++ backward, compiled blocks", scan="cuda", compile=Compile.BLOCKS),
    Way(name="mamba-ssm, grouped", scan="mamba-ssm"),
    Way(name="official arrangement", scan="reference", arranged=officially_arranged),
    Way(name="torch loop", scan="reference"),
)


def ways(device: str, tiny: bool) -> Iterator[Way]:
    """The variants that can run here; torch loops only in a trial, since they take minutes per step."""
    usable = scans.scans(device)
    for way in WAYS:
        loops = way.scan == "reference" and not peer_functions(device)[2].startswith("mamba-ssm")
        if usable[way.scan] is None and (tiny or not (loops or way.name == "torch loop")):
            yield way


def tiny_spec(stage: str) -> ModelSpec:
    encoder = EncoderSpec(width=32, depth=6, patch=4)
    if stage == "finetune":
        return ClassifierSpec(encoder=encoder, classes=10, image_size=(12, 12))
    return PretrainSpec(
        encoder=encoder, image_size=(12, 12), cluster=(1, 1), decoder_width=16, decoder_depth=2,
        decoder_heads=2,
    )  # fmt: skip


def batch_of(spec: ModelSpec, size: int) -> Batch:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (size, *spec.image_size, 3), np.uint8)
    images = ByteImages(pixels=pixels, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    if not isinstance(spec, ClassifierSpec):
        return Batch(images=images)
    images = replace(images, mix=Mix(weight=0.7))
    return Batch(images=images, targets=np.eye(spec.classes, dtype=np.float32)[rng.integers(0, 10, size)])


def measure(
    spec: ModelSpec, parameters: dict[str, Array], size: int, way: Way, device: str, steps: int
) -> dict[str, Any]:
    """Seconds per step, the median of `SAMPLES` runs of `steps` without waiting in between; peak memory."""
    classifier = isinstance(spec, ClassifierSpec)
    settings = OptimizerSettings(clip=None if classifier else 3.0, ema_decay=0.99992 if classifier else None)
    chosen = EngineOptions(device=device, scan=way.scan, precision=Precision.BFLOAT16, compile=way.compile)
    batch = batch_of(spec, size)
    with way.arranged(device, spec):
        engine = TorchEngine(spec, TrainingState(parameters=parameters), optimizer=settings, options=chosen)
        for step in range(1, WARM_UP + 1):
            loss = engine.train_step([batch], step=step, lr=1e-5).result().loss
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        samples = []
        for sample in range(SAMPLES):
            start = time.perf_counter()
            for step in range(steps):
                number = WARM_UP + sample * steps + step + 1
                pending = engine.train_step([batch], step=number, lr=1e-5)
            last = pending.result().loss
            samples.append((time.perf_counter() - start) / steps)
        seconds = statistics.median(samples)
    assert np.isfinite(last), "the loss is not finite"
    assert abs(last - loss) < 0.5 * abs(loss), "the loss jumped"
    multiply_adds = sum(part.multiply_adds for part in cost_table(spec))
    return {
        "way": way.name,
        "images_per_second": size / seconds,
        "seconds": samples,
        "tflops": 6e-12 * multiply_adds * size / seconds,
        "memory_gb": torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else None,
        "loss": last,
    }


def row_of(result: dict[str, Any], official: dict[str, Any] | None) -> list[str]:
    if "failed" in result:
        return [result["way"], result["failed"], "", "", ""]
    ratio = result["images_per_second"] / official["images_per_second"] if official else None
    return [
        result["way"],
        f"{result['images_per_second']:.0f}",
        "" if ratio is None else f"{ratio:.2f}",
        f"{result['tflops']:.1f}",
        "" if result["memory_gb"] is None else f"{result['memory_gb']:.1f}",
    ]


def main() -> None:
    parser = options(__doc__)
    parser.add_argument(
        "--models", nargs="*", choices=["base", "large", "huge"], default=["base", "large", "huge"]
    )
    parser.add_argument("--stages", nargs="*", choices=STAGES, default=list(STAGES))
    arguments = parser.parse_args()
    check_device(arguments.device)
    built = build_peers(arguments.peers) if arguments.device == "cuda" else "not built on a CPU"
    facts = circumstances(arguments, f"{peer_functions(arguments.device)[2]} ({built})")
    results: dict[str, Any] = {"circumstances": facts, "steps": {}}
    sections: list[str] = []
    for model in ["tiny"] if arguments.tiny else arguments.models:
        for stage in arguments.stages:
            presets = {"pretrain": pretrain_preset, "finetune": classifier_preset}
            spec = tiny_spec(stage) if arguments.tiny else presets[stage](model)
            size = 2 if arguments.tiny else BATCHES[model, stage]
            parameters = initial_parameters(spec, seed=0)
            found = []
            for way in ways(arguments.device, arguments.tiny):
                try:
                    steps = 1 if arguments.tiny else STEPS
                    found.append(measure(spec, parameters, size, way, arguments.device, steps))
                except (OutOfMemory, torch.OutOfMemoryError):
                    found.append({"way": way.name, "failed": "out of memory"})
                gc.collect()
                if arguments.device == "cuda":
                    torch.cuda.empty_cache()
            official = next((r for r in found if r["way"] == "official arrangement" and "loss" in r), None)
            results["steps"][f"{model} {stage}"] = {"batch": size, "ways": found}
            header = ["", "images/s", "/ official", "TFLOP/s", "memory, GB"]
            rows = [row_of(result, official) for result in found]
            sections.append(f"## {model}, {stage}, batch {size}\n\n{table(header, rows)}")
            write("cuda_step", results, sections, arguments)


if __name__ == "__main__":
    main()
