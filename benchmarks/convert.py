"""Speed and memory of converting models, compared with a plain file copy.

    python benchmarks/convert.py [--model huge] [--repeats 3] [--folder /scratch]

Creates an official checkpoint of the requested size (`huge` pretraining: 2.6 GB), then imports it, exports
the model in every format, and copies the file, each in a separate process and flushed to the disk. Prints
medians, and exits with 1 if a target is missed: peak memory at most 1.3x the largest tensor plus 300 MB,
speed at least half a copy's.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from arm_convert.official import to_official
from arm_convert.torch_writer import write_torch
from arm_core.files.safetensors import Tensor
from arm_core.model.parameters import Parameter, initial_value, parameter_table
from arm_core.model.presets import PRESETS, pretrain_preset

BYTES_OVER, FACTOR = 300e6, 1.3
"""Memory target: FACTOR times the largest tensor plus BYTES_OVER."""

EXPORTS = (("official", "pth"), ("official", "safetensors"), ("torch", "safetensors"), ("mlx", "safetensors"))

SPEED = 0.5
"""Speed target, relative to a plain copy."""

MEASURED = """
import sys, time
from click.testing import CliRunner
from arm_cli.main import main
start = time.perf_counter()
result = CliRunner().invoke(main, {words!r})
seconds = time.perf_counter() - start
assert result.exit_code == 0, result.output
try:
    lines = open("/proc/self/status").read().splitlines()
    peak = 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
except OSError:
    import resource
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(seconds, peak)
"""

COPY = """
import os, shutil, sys, time
start = time.perf_counter()
with open({source!r}, "rb") as a, open({target!r}, "wb") as b:
    shutil.copyfileobj(a, b, 16 << 20)
    b.flush()
    os.fsync(b.fileno())
print(time.perf_counter() - start, 0)
"""


def run(code: str) -> tuple[float, int]:
    """Seconds and peak bytes, as reported by a separate process."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, peak = done.stdout.split()
    return float(seconds), int(peak)


def value(row: Parameter) -> np.ndarray:
    """Random numbers, generated quickly; fixed tables have their values."""
    if not row.trainable:
        return initial_value(row, 0)
    rng = np.random.Generator(np.random.SFC64(len(row.name)))
    return rng.random(row.shape, dtype=np.float32)


def commit() -> str:
    """The measured commit, marked if files differ from it."""
    here = Path(__file__).parent
    words = ("git", "describe", "--always", "--dirty", "--exclude=*")
    return subprocess.run(words, cwd=here, capture_output=True, text=True, check=False).stdout.strip()


def make_checkpoint(path: Path, model: str) -> int:
    """Write an official checkpoint; returns the bytes of its largest tensor."""
    spec = pretrain_preset(model)
    tensors = {
        name: Tensor(row.shape, "F32", partial(value, row)) for name, row in parameter_table(spec).items()
    }
    write_torch(path, to_official(spec, tensors), {})
    return max(tensor.nbytes for tensor in tensors.values())


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=PRESETS, default="huge")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="Where to write; needs four times the checkpoint.")
    parser.add_argument("--json", action="store_true")
    chosen = parser.parse_args(arguments)
    folder = Path(tempfile.mkdtemp(prefix="arm-convert-", dir=chosen.folder))
    try:
        return measure(folder, chosen.model, chosen.repeats, as_json=chosen.json)
    finally:
        shutil.rmtree(folder)


def measure(folder: Path, model: str, repeats: int, *, as_json: bool) -> int:
    source = folder / "official.pth"
    largest = make_checkpoint(source, model)
    size = source.stat().st_size
    target = folder / "model"
    steps = {
        "copy": COPY.format(source=str(source), target=str(folder / "copy")),
        "import": MEASURED.format(words=["convert", "import", str(source), str(target), "--force"]),
    }
    for to, suffix in EXPORTS:
        words = ["convert", "export", str(target), str(folder / f"out.{suffix}"), "--to", to, "--force"]
        steps[f"export {to} .{suffix}"] = MEASURED.format(words=words)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    peaks = dict.fromkeys(steps, 0)
    for _ in range(repeats):  # interleaved, so that a slow moment of the disk affects all equally
        for name, code in steps.items():
            taken, peak = run(code)
            seconds[name].append(taken)
            peaks[name] = max(peaks[name], peak)
    limit = FACTOR * largest + BYTES_OVER
    copy = statistics.median(seconds["copy"])
    rows = []
    for name, taken in seconds.items():
        median = statistics.median(taken)
        rows.append(
            {
                "step": name,
                "MB/s": round(size / median / 1e6),
                "seconds": [round(value, 2) for value in taken],
                "of a copy": round(copy / median, 2),
                "peak MB": round(peaks[name] / 1e6) if peaks[name] else None,
                "holds": copy / median >= SPEED and peaks[name] <= limit,
            }
        )
    facts = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()} {platform.system()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "commit": commit(),
        "numpy": np.__version__,
        "model": model,
        "checkpoint MB": round(size / 1e6),
        "largest tensor MB": round(largest / 1e6, 1),
        "memory target MB": round(limit / 1e6),
    }
    if as_json:
        print(json.dumps({**facts, "rows": rows}, indent=2))
    else:
        print(", ".join(f"{key} {value}" for key, value in facts.items()))
        print(f"{'step':28} {'MB/s':>6} {'of a copy':>10} {'peak MB':>8}  seconds")
        for row in rows:
            missed = "" if row["holds"] else "MISSED"
            print(
                f"{row['step']:28} {row['MB/s']:>6} {row['of a copy']:>10} {row['peak MB'] or '':>8}  "
                f"{row['seconds']} {missed}"
            )
    return 0 if all(row["holds"] for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
