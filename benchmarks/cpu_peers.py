"""ARM-B compared with a ViT-B/16 of the same width and depth on a CPU: steps, inference, image sizes.

    python benchmarks/cpu_peers.py [--repeats 5] [--sizes 224 384 512 768 1024] [--plot FILE.svg] [--skip-mlx]

The ViT is plain torch: pre-norm blocks, `scaled_dot_product_attention`, exact GELU, class token, learned
positions; its training step uses fused AdamW. Inference is one image at a time, in float32; classifier steps
have a batch of 2, in float32 and in bfloat16 (products in bfloat16, weights in float32). Repeats of the
models are interleaved; figures are medians with the fastest and slowest, and ratios of medians.
`benchmarks/cpu_step.py` compares a step with its matrix products.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 (the field's name for it)
from hardware import header
from torch import Tensor, nn

from arm_core.data.model_config import ModelConfig
from arm_core.engine.optimizer import OptimizerSettings
from arm_core.engine.protocol import Batch, EngineOptions, Precision, TrainingState
from arm_core.engine.registry import installed_backends
from arm_core.model.parameters import initial_parameters
from arm_core.model.presets import classifier_preset
from arm_cuda.library import create_module

WIDTH, DEPTH, HEADS, PATCH = 768, 12, 12, 16
TRAIN_BATCH = 2


class ViTBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.fc1, self.fc2 = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, tokens, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class ViT(nn.Module):
    """ViT-B/16 (arXiv:2010.11929) for one image size."""

    def __init__(self, size: int, classes: int = 1000) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.token = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.positions = nn.Parameter(torch.randn(1, (size // PATCH) ** 2 + 1, WIDTH) * 0.02)
        self.blocks = nn.Sequential(*(ViTBlock() for _ in range(DEPTH)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions
        return self.head(self.norm(self.blocks(x))[:, 0])


def interleaved(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each run by name, interleaved, after a warm-up run of each."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if repeat:
                times[name].append(time.perf_counter() - start)
    return times


def words(times: list[float]) -> str:
    return f"{statistics.median(times):7.3f} s ({min(times):.3f} to {max(times):.3f})"


def inference(size: int, repeats: int) -> dict[str, list[float]]:
    spec = replace(classifier_preset("base"), image_size=(size, size))
    arm, vit = create_module(spec, initial_parameters(spec, 0), ModelConfig()), ViT(size).eval()
    images = torch.randn(1, 3, size, size)

    def forward(model: nn.Module) -> Callable[[], object]:
        def run() -> object:
            with torch.inference_mode():
                return model(images)

        return run

    return interleaved({"ARM-B": forward(arm), "ViT-B/16": forward(vit)}, repeats)


def training(size: int, repeats: int, backends: list[str]) -> dict[str, list[float]]:
    spec = replace(classifier_preset("base"), image_size=(size, size))
    rng = np.random.default_rng(0)
    images = rng.standard_normal((TRAIN_BATCH, size, size, 3), dtype=np.float32)
    targets = np.full((TRAIN_BATCH, spec.classes), 1 / spec.classes, np.float32)
    batch = Batch(images=images, targets=targets)
    runs: dict[str, Callable[[], object]] = {}
    for name in backends:
        for precision in (Precision.FLOAT32, Precision.BFLOAT16)[: 2 if name == "torch" else 1]:
            engine = installed_backends()[name].create_engine(
                spec,
                TrainingState(parameters=initial_parameters(spec, 0)),
                optimizer=OptimizerSettings(clip=3.0),
                options=EngineOptions(device="cpu", precision=precision),
            )
            runs[f"ARM-B ({name}, {precision})"] = lambda engine=engine: engine.train_step(
                [batch], step=1, lr=1e-5
            ).result()
    x, y = torch.from_numpy(images.transpose(0, 3, 1, 2).copy()), torch.from_numpy(targets)

    def vit_step(precision: Precision) -> Callable[[], object]:
        vit = ViT(size)
        optimizer = torch.optim.AdamW(vit.parameters(), lr=1e-5, fused=True)

        def run() -> object:
            with torch.autocast("cpu", torch.bfloat16, enabled=precision is Precision.BFLOAT16):
                logits = vit(x)
            loss = -(y * F.log_softmax(logits.float(), -1)).sum(-1).mean()
            loss.backward()
            nn.utils.clip_grad_norm_(vit.parameters(), 3.0)
            optimizer.step()
            optimizer.zero_grad()
            return loss.item()

        return run

    vits = {f"ViT-B/16 ({precision})": vit_step(precision) for precision in Precision}
    return interleaved({**runs, **vits}, repeats)


def plot(path: Path, tokens: list[int], seconds: dict[str, list[float]]) -> None:
    """Milliseconds per token against the number of tokens."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.6))
    for name, values in seconds.items():
        axes.plot(tokens, [1e3 * s / t for s, t in zip(values, tokens, strict=True)], marker="o", label=name)
    axes.set(xscale="log", xlabel="patches", ylabel="ms per patch", ylim=(0, None))
    axes.set_xticks(tokens, [str(t) for t in tokens])
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--sizes", type=int, nargs="+", default=[224, 384, 512, 768, 1024])
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--skip-mlx", action="store_true")
    arguments = parser.parse_args()
    print(header("torch", "numpy", "numba"))
    print(f"command   python benchmarks/cpu_peers.py --repeats {arguments.repeats}")
    print(f"threads   {torch.get_num_threads()}")
    medians: dict[str, list[float]] = {}
    print("\ninference, one image")
    for size in arguments.sizes:
        found = inference(size, arguments.repeats)
        for name, times in found.items():
            medians.setdefault(name, []).append(statistics.median(times))
            print(f"  {size:5d} px  {name:10s} {words(times)}")
        print(
            f"  {size:5d} px  ARM-B / ViT-B {medians['ARM-B'][-1] / medians['ViT-B/16'][-1]:.2f}", flush=True
        )
    print(f"\nclassifier training step, batch {TRAIN_BATCH}, 224 px")
    backends = ["torch"] + ([] if arguments.skip_mlx or installed_backends()["mlx"].missing() else ["mlx"])
    steps = training(224, arguments.repeats, backends)
    for name, times in steps.items():
        precision = "bfloat16" if "bfloat16" in name else "float32"
        vit = statistics.median(steps[f"ViT-B/16 ({precision})"])
        ratio = statistics.median(times) / vit
        print(f"  {name:24s} {words(times)}  {ratio:.2f} of ViT-B's in {precision}")
    if arguments.plot:
        plot(arguments.plot, [(size // PATCH) ** 2 for size in arguments.sizes], medians)


if __name__ == "__main__":
    main()
