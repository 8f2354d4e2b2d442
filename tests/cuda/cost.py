"""Lower bounds of the Triton kernels' times on an H200, from counts of bytes, instructions and exponentials.

    python tests/cuda/cost.py

Nothing here is measured. Bytes: every array once; shared arrays (x, grad_y, B and C) are assumed to be
cached. Instructions: from `machine_code.py`, four per clock on each multiprocessor. Exponentials: those of
states, softplus and gates and their reciprocals, 16 lanes per clock. Activations are bfloat16; 16 states.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from math import ceil
from pathlib import Path

PROCESSORS, CLOCK, BANDWIDTH = 132, 1.98e9, 4.3e12
"""An H200: multiprocessors, clock in Hz, and bytes per second of a device-to-device copy."""
STATES, BLOCK, CHUNK, GROUP = 16, 32, 16, 2


@dataclass(frozen=True, kw_only=True)
class Shape:
    name: str
    images: int
    length: int
    channels: int
    directions: int

    @property
    def values(self) -> int:
        """Of one (B, L, D) tensor."""
        return self.images * self.length * self.channels


SHAPES = (
    Shape(name="finetuning", images=128, length=197, channels=768, directions=4),
    Shape(name="pretraining", images=256, length=128, channels=768, directions=1),
)


def gigabytes(shape: Shape) -> dict[str, float]:
    """Bytes moved by each kernel in training."""
    K, V = shape.directions, 2 * shape.values
    tokens = shape.images * shape.length
    low = 2 * 2 * K * tokens * STATES  # B and C
    states = 4 * K * shape.images * ceil(shape.length / CHUNK) * STATES * shape.channels
    partials = 2 * 4 * (shape.channels // BLOCK) * K * tokens * STATES  # of dB and dC
    scratch = 4 * K * shape.images * shape.channels * STATES * (CHUNK // GROUP)
    moved = {
        "conv forward": (1 + K) * V,
        "scan forward": 3 * K * V + low + states,
        "gate forward": (K + 2 + (K > 1)) * V,
        "gate backward": 5 * V,
        "scan backward": (4 * K + 1) * V + low + states + partials + scratch,
        "sums of dB and dC": partials,
        "conv backward steps": (1 + 2 * K) * V,
        "conv backward tokens": (K + 1) * V,
    }
    return {kernel: amount / 1e9 for kernel, amount in moved.items()}


EXPONENTIALS = {
    "conv forward": 2,
    "scan forward": STATES + 2,
    "scan backward": STATES * (1 + (CHUNK - GROUP) / CHUNK) + 6,
    "conv backward steps": 2,
}
"""Special-function results per token, channel and direction; the rest has too few to matter."""


def instructions() -> dict[str, float]:
    script = Path(__file__).with_name("machine_code.py")
    printed = subprocess.run([sys.executable, script, "--json"], capture_output=True, text=True, check=True)
    return {
        row["kernel"]: row["instructions"]
        for row in json.loads(printed.stdout)
        if row["architecture"] == 90 and row["states"] in (0, STATES)
    }


def main() -> None:
    counts = instructions()
    for shape in SHAPES:
        warps = shape.values * shape.directions / 32
        print(f"\n{shape.name}: B={shape.images} L={shape.length} D={shape.channels} K={shape.directions}\n")
        print("| kernel | GB | bytes, us | instructions, us | exponentials, us | floor, us |")
        print("|---|---|---|---|---|---|")
        totals = {"forward": 0.0, "backward": 0.0}
        for kernel, moved in gigabytes(shape).items():
            times = (
                1e15 * moved / BANDWIDTH,
                1e6 * warps * counts.get(kernel, 0) / (4 * PROCESSORS * CLOCK),
                1e6 * warps * 32 * EXPONENTIALS.get(kernel, 0) / (16 * PROCESSORS * CLOCK),
            )
            print(
                f"| {kernel} | {moved:.2f} | " + " | ".join(f"{t:.0f}" for t in (*times, max(times))) + " |"
            )
            totals["forward" if kernel.endswith("forward") else "backward"] += max(times)
        print(f"\nTogether {totals['forward']:.0f} us forward, {totals['backward']:.0f} us backward.")


if __name__ == "__main__":
    main()
