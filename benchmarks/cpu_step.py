"""A base model's training step on the CPU, compared with its matrix products and with plain scans.

    python benchmarks/cpu_step.py [--repeats 7] [--cases pretrain classifier] [--skip-literal]

For base pretraining (batch 4) and the base classifier (batch 2, four directions) on the torch engine:

- the step: forward, backward, gradient norm and AdamW, with the scan `cpu`;
- its matrix products: every product of that step recorded once, then run alone on the same operands
  (attention as the products it consists of);
- the same step with the scan written as a good torch loop (`reference`), and as a literal one that
  indexes the time axis under autograd, whose backward is quadratic in the length, as in mamba-ssm's
  `selective_scan_ref`.

Each step runs in a separate process, which gives its peak memory. Then the scan is measured alone at lengths
from 64 to 4096. Seconds are medians, with the fastest and slowest; about 8 minutes on 2 cores.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import psutil
import torch
import torch.nn.functional as F  # noqa: N812 (the field's name for it)
from hardware import header
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from arm_core import cpu_kernels
from arm_core.engine.optimizer import OptimizerSettings
from arm_core.engine.protocol import Batch, EngineOptions, TrainingState
from arm_core.engine.scans import Implementation
from arm_core.model.parameters import initial_parameters
from arm_core.model.presets import classifier_preset, pretrain_preset
from arm_core.model.spec import ClassifierSpec, ModelSpec
from arm_cuda import scan
from arm_cuda.devices import keep_freed_memory
from arm_cuda.engine import TorchEngine

CASES: dict[str, tuple[ModelSpec, int]] = {
    "pretrain": (pretrain_preset("base"), 4),
    "classifier": (classifier_preset("base"), 2),
}
WARM_UP = 3
"""Steps until the process has allocated all its memory; the first one compiles."""
LENGTHS = (64, 128, 256, 512, 1024, 2048, 4096)


def literal_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    z: Tensor,
    order: Tensor,
) -> Tensor:
    """One direction at a time; all decays and inputs at once, then a loop that indexes them."""
    total = torch.zeros_like(z)
    for k, path in enumerate(order.long()):
        step = F.softplus(dt[k][:, path] + dt_bias[k])
        x, b, c = (t[k][:, path] for t in (u, B, C))
        decay = torch.exp(torch.einsum("bld,dn->bldn", step, A[k]))
        drive = torch.einsum("bld,bln,bld->bldn", step, b, x)
        h, ys = torch.zeros_like(decay[:, 0]), []
        for t in range(len(path)):
            h = decay[:, t] * h + drive[:, t]
            ys.append(torch.einsum("bdn,bn->bd", h, c[:, t]))
        y = torch.stack(ys, dim=1) + x * D[k]
        total = total + y[:, path.argsort()]
    return F.silu(z) * total / len(order)


class MatrixProducts(TorchDispatchMode):
    """Collects the matrix products that run while it is active, with their operands."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Callable[[], object]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__.removesuffix("_")  # addmm_ adds to its first operand
        if name in ("mm", "addmm", "bmm", "baddbmm"):
            self.calls.append(lambda: function(*args, **(kwargs or {})))
        elif name == "_scaled_dot_product_flash_attention_for_cpu":
            self._attention(*args[:3], backward=False)
        elif name == "_scaled_dot_product_flash_attention_for_cpu_backward":
            self._attention(*args[1:4], backward=True)
        return function(*args, **(kwargs or {}))

    def _attention(self, query: Tensor, key: Tensor, value: Tensor, *, backward: bool) -> None:
        """softmax(query key^T) value: two products forward, four backward."""
        weights = query @ key.mT
        self.calls += [lambda: query @ key.mT, lambda: weights @ value]
        if backward:
            self.calls += [lambda: weights.mT @ query, lambda: weights @ key]

    @torch.no_grad()
    def run(self) -> None:
        for call in self.calls:
            call()


def seconds(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def peak_mb() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak / 1e3


def measure(case: str, implementation: str, repeats: int) -> dict[str, Any]:
    """Seconds per step, for `cpu` also those of its matrix products, and memory in MB."""
    spec, size = CASES[case]
    clip = None if isinstance(spec, ClassifierSpec) else 3.0
    engine = TorchEngine(
        spec,
        TrainingState(parameters=initial_parameters(spec, seed=0)),
        optimizer=OptimizerSettings(clip=clip),
        options=EngineOptions(device="cpu", scan=implementation),
    )
    rng = np.random.default_rng(0)
    images = rng.standard_normal((size, *spec.image_size, 3)).astype(np.float32)
    targets = None
    if isinstance(spec, ClassifierSpec):
        targets = np.eye(spec.classes, dtype=np.float32)[rng.integers(0, spec.classes, size)]
    batch = Batch(images=images, targets=targets)
    number = iter(range(1, 1000))

    def step() -> None:
        engine.train_step([batch], step=next(number), lr=1e-4).result()

    before = psutil.Process().memory_info().rss / 1e6
    results: dict[str, Any] = {"step": [], "products": []}
    for _ in range(WARM_UP if implementation == "cpu" else implementation != "literal"):
        step()
    products = MatrixProducts()
    for i in range(repeats):
        results["step"].append(seconds(step))
        if i == 0:
            results |= {"peak_mb": peak_mb(), "added_mb": peak_mb() - before}
        if implementation == "cpu":
            if not products.calls:
                with products:
                    step()
                products.run()
                step()  # gets new memory in place of the memory that the products keep
            results["products"].append(seconds(products.run))
    return results


def in_own_process(case: str, implementation: str, repeats: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--measure", case, implementation, "--repeats", str(repeats)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    result: dict[str, Any] = json.loads(output.splitlines()[-1])
    return result


def spread(times: list[float]) -> str:
    return f"{statistics.median(times):6.3f} s ({min(times):.3f} to {max(times):.3f})"


def report(case: str, repeats: int, *, literal: bool) -> None:
    size = CASES[case][1]
    ours = in_own_process(case, "cpu", repeats)
    step, products = statistics.median(ours["step"]), statistics.median(ours["products"])
    ratios = [a / b for a, b in zip(ours["step"], ours["products"], strict=True)]
    print(f"base {case}, batch {size}")
    print(f"  step              {spread(ours['step'])}   {memory(ours)}")
    print(f"  matrix products   {spread(ours['products'])}   step / products {statistics.median(ratios):.2f}")
    for name, label in (("reference", "tuned loop"), ("literal", "literal loop")):
        if name == "literal" and not literal:
            continue
        other = in_own_process(case, name, 3 if name == "reference" else 1)
        print(
            f"  {label:18s}{spread(other['step'])}   {memory(other)}"
            f"   {statistics.median(other['step']) / step:.1f}x the step, "
            f"memory {other['peak_mb'] / ours['peak_mb']:.1f}x, "
            f"in steps {other['added_mb'] / ours['added_mb']:.1f}x"
        )
    assert products > 0
    print(flush=True)


def memory(result: dict[str, Any]) -> str:
    return f"peak {result['peak_mb'] / 1e3:5.2f} GB, {result['added_mb'] / 1e3:5.2f} GB of it in steps"


def report_lengths(repeats: int) -> None:
    """Forward and backward of the scan for 4096 tokens, in images of each length."""
    keep_freed_memory()  # like the engine
    print("scan alone, 4096 tokens of 768 channels and 16 states, forward and backward")
    for length in LENGTHS:
        rng = np.random.default_rng(0)

        def normal(*shape: int, rng: np.random.Generator = rng) -> np.ndarray:
            return rng.standard_normal(shape, dtype=np.float32)

        batch = 4096 // length
        rate = -np.tile(np.arange(1, 17, dtype=np.float32), (1, 768, 1))
        tokens = normal(1, batch, length, 768), normal(1, batch, length, 768) - 4.0
        low = normal(1, batch, length, 16), normal(1, batch, length, 16)
        order = np.arange(length, dtype=np.int32)[None]
        inputs = (*tokens, rate, *low, normal(1, 768), normal(1, 768), normal(batch, length, 768), order)
        grad = normal(batch, length, 768)

        def both(inputs: Any = inputs, grad: np.ndarray = grad) -> None:
            _, residuals = cpu_kernels.scan_forward(*inputs, save_for_backward=True)
            assert residuals is not None
            cpu_kernels.scan_backward(grad, residuals, *inputs)

        both()
        times = [seconds(both) / 4096 * 1e6 for _ in range(3 * repeats)]
        print(
            f"  length {length:5d}  {statistics.median(times):6.2f} us per token "
            f"({min(times):.2f} to {max(times):.2f})"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--cases", nargs="*", choices=CASES, default=list(CASES))
    parser.add_argument("--skip-literal", action="store_true", help="leave out the slowest loop")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    scan.IMPLEMENTATIONS["literal"] = Implementation(
        directional_conv=scan.IMPLEMENTATIONS["reference"].directional_conv,
        selective_scan=literal_scan,
    )
    if options.measure:
        print(json.dumps(measure(*options.measure, options.repeats)))
        return
    print(header("torch", "numba", "numpy"), end="\n\n")
    for case in options.cases:
        report(case, options.repeats, literal=not options.skip_literal)
    report_lengths(options.repeats)


if __name__ == "__main__":
    main()
