"""Times on a GPU, the machine's ceilings, and result files of the CUDA benchmarks."""

from __future__ import annotations

import argparse
import json
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
from cuda_peers import versions
from hardware import commit, machine

RESULTS = Path(__file__).parent / "results"
EXPONENTIALS_PER_CLOCK = 16
"""Of one multiprocessor, from compute capability 8.0 to 10.0."""


def options(text: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="sizes that run anywhere: a trial of the script")
    parser.add_argument("--peers", type=Path, default=Path("peers"), help="folder with the peers' sdists")
    parser.add_argument(
        "--output", type=Path, help="folder of the result files (default: benchmarks/results)"
    )
    parser.add_argument("--commit", help="what the results name as the commit (default: asks git)")
    return parser


def check_device(device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        sys.exit("needs an NVIDIA GPU; a trial of the script without one: --device cpu --tiny")


@dataclass(frozen=True)
class Times:
    """Milliseconds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, samples: list[float], scale: float = 1.0) -> Times:
        samples = [scale * sample for sample in samples]
        return cls(statistics.median(samples), min(samples), max(samples))


def milliseconds(action: Callable[[], object], device: str) -> list[float]:
    """Seconds of repeated calls after warm-up; on a GPU the sum of the kernels' times, without gaps."""
    if device == "cuda":
        for _ in range(3):
            action()
        return [sum(kernel_microseconds(action, 4).values()) / 1e3 for _ in range(5)]
    action()
    samples = []
    for _ in range(3):
        start = time.perf_counter()
        action()
        samples.append(1e3 * (time.perf_counter() - start))
    return samples


def kernel_microseconds(action: Callable[[], object], calls: int) -> dict[str, float]:
    """GPU time of every kernel that a call launches, by the kernel's name."""
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(calls):
            action()
        torch.cuda.synchronize()
    found: dict[str, float] = {}
    for event in profiler.key_averages():
        if spent := event.self_device_time_total:
            found[event.key] = found.get(event.key, 0.0) + spent / calls
    return found


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """The maximum rates of the machine; None for an unknown rate."""

    bytes_per_second: float
    """Bytes read and written in a large copy; measured."""
    product_flops: float
    """Operations of a large bfloat16 matrix product; measured."""
    exponentials_per_second: float | None
    """Multiprocessors x 16 x the highest clock that nvidia-smi reports."""


def ceilings(device: str) -> Ceilings:
    on_gpu = device == "cuda"
    size = 1 << (32 if on_gpu else 22)
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = Times.of(milliseconds(partial(target.copy_, source), device)).median
    del source, target
    side = 8192 if on_gpu else 128
    a = torch.randn(side, side, device=device).bfloat16()
    product = Times.of(milliseconds(lambda: a @ a, device)).median
    exponentials = None
    if on_gpu and (clock := highest_clock()):
        processors = torch.cuda.get_device_properties(0).multi_processor_count
        exponentials = processors * EXPONENTIALS_PER_CLOCK * clock
    return Ceilings(
        bytes_per_second=2e3 * size / copy,
        product_flops=2e3 * side**3 / product,
        exponentials_per_second=exponentials,
    )


def highest_clock() -> float | None:
    """Hz of the multiprocessors."""
    query = ["nvidia-smi", "--query-gpu=clocks.max.sm", "--format=csv,noheader,nounits"]
    try:
        printed = subprocess.run(query, capture_output=True, text=True, check=True).stdout
        return 1e6 * float(printed.splitlines()[0])
    except (OSError, subprocess.CalledProcessError, ValueError, IndexError):
        return None


def circumstances(options: argparse.Namespace, peers: str) -> dict[str, Any]:
    return {
        "date": date.today().isoformat(),
        "command": " ".join(["python", *sys.argv]),
        "device": torch.cuda.get_device_name() if options.device == "cuda" else machine(),
        "python": platform.python_version(),
        "versions": versions(),
        "commit": options.commit or commit(),
        "peers": peers,
    }


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"


def heading(name: str, facts: dict[str, Any]) -> str:
    known = ", ".join(f"{package} {number}" for package, number in facts["versions"].items() if number)
    return (
        f"# {name}, {facts['device']}, {facts['date']}\n\n"
        f"`{facts['command']}` at commit {facts['commit']}; Python {facts['python']}, {known}.\n"
        f"Peers: {facts['peers']}.\n"
    )


def write(name: str, results: dict[str, Any], sections: list[str], options: argparse.Namespace) -> None:
    """Print the newest section, and write all sections so far, so that an interrupted run keeps its results.

    A trial writes nothing without `--output`.
    """
    facts = results["circumstances"]
    head = heading(name, facts)
    print(head if len(sections) == 1 else "", sections[-1], sep="\n", flush=True)
    if options.tiny and options.output is None:
        return
    folder = options.output or RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    slug = re.sub(r"[^a-z0-9]+", "-", facts["device"].lower())[:40].strip("-")
    stem = f"{name}-{slug}-{facts['date']}"
    (folder / f"{stem}.json").write_text(json.dumps(results, indent=2) + "\n")
    (folder / f"{stem}.md").write_text("\n".join([head, *sections]))
