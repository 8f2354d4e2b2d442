"""Cost of the kernels: bytes from their arrays, instructions from clang's optimised code of their source.

    python tests/metal/cost.py      the tables of docs/performance.md

Apple's compiler is not available on Linux. clang shares its middle end, so clang's code of a kernel's loop
after inlining, unrolling and promotion to registers is used instead. Operations that only the GPU has
remain calls and are counted as calls.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import mlx.core as mx
import problems
from emulator import Launch, trace
from emulator.strict import NEEDED, compiler
from emulator.translate import HERE, strict_program

from arm_core.model.cost import cost_table
from arm_core.model.presets import classifier_preset, pretrain_preset
from arm_mlx.metal import launch
from arm_mlx.metal.operators import scan_function
from arm_mlx.metal.tuning import TABLE, Tuning

CYCLES = {
    "arithmetic": 1,  # add, multiply, fused multiply-add, select, integer operations
    "exp2": 4,
    "exp": 5,
    "log": 5,
    "division": 8,
    "quad shuffle": 2,
    "SIMD shuffle": 2,
    "load": 1,
    "store": 1,
    "branch": 1,
    "barrier": 1,
    "free": 0,  # extensions, address arithmetic of a load, signs and absolute values of an operand
}
"""Assumed cycles of a lane in each operation, since Apple publishes none. 1 is the result of microbenchmarks
for floating-point arithmetic; the others are conservative estimates relative to it."""

ARITHMETIC = set(
    re.findall(
        r"\w+", "fadd fsub fmul add sub mul and or xor shl lshr ashr sdiv srem udiv urem select fcmp icmp"
    )
)
FREE = set(re.findall(r"\w+", "phi getelementptr sext zext trunc bitcast fneg fpext fptrunc ret freeze"))
"""fpext and fptrunc: conversions of 16-bit values belong to loads and stores."""
CALLS = {
    "quad_shuffle": "quad shuffle",
    "simd_shuffle": "SIMD shuffle",
    "exp2": "exp2",
    "expEf": "exp",
    "logEf": "log",
    "barrier": "barrier",
    "llvm.fma": "arithmetic",
    "llvm.smin": "arithmetic",
    "llvm.fabs": "free",
    "llvm.lifetime": "free",
    "llvm.assume": "free",
}


def kind(instruction: str) -> str:
    """The key of CYCLES for a line of LLVM IR."""
    words = instruction.split(" = ", 1)[-1].split()
    opcode = words[1] if words[0] in ("tail", "musttail", "notail") else words[0]
    if opcode == "call":
        return next(
            (name for mark, name in CALLS.items() if mark in instruction), f"call {instruction.strip()}"
        )
    if opcode in ("load", "store"):
        return opcode
    if opcode in ("br", "switch"):
        return "branch"
    if opcode == "fdiv":
        return "division"
    return "arithmetic" if opcode in ARITHMETIC else "free" if opcode in FREE else opcode


@dataclass(frozen=True)
class Code:
    """A compiled kernel."""

    blocks: dict[str, Counter[str]]
    """Basic block -> the number of instructions of each kind."""
    successors: dict[str, list[str]]
    stack_arrays: int
    """Local arrays that did not become registers."""

    def in_loops(self) -> Counter[str]:
        """Instructions of all blocks inside a loop."""
        total: Counter[str] = Counter()
        for name in self.blocks:
            if name in self._reachable(name):
                total += self.blocks[name]
        return total

    def _reachable(self, start: str) -> set[str]:
        found: set[str] = set()
        stack = list(self.successors[start])
        while stack:
            block = stack.pop()
            if block not in found:
                found.add(block)
                stack += self.successors[block]
        return found


@cache
def compiled(kernel: Launch) -> Code:
    """The kernel after clang's optimisation. Raises RuntimeError with clang's message."""
    body = re.search(rf"^define [^\n]*{kernel.name}.*?^}}", optimised(kernel), re.MULTILINE | re.DOTALL)
    assert body, kernel.name
    blocks: dict[str, Counter[str]] = {}
    successors: dict[str, list[str]] = {}
    for line in body[0].splitlines()[1:-1]:
        if label := re.match(r'"?([\w.$]+)"?:', line):
            block = label[1]
            blocks[block], successors[block] = Counter(), []
        elif line.strip():
            blocks[block][kind(line)] += 1
            successors[block] += re.findall(r'label %"?([\w.$]+)', line)
    return Code(blocks, successors, sum(line.count(" = alloca") for line in body[0].splitlines()))


@cache
def optimised(kernel: Launch) -> str:
    """The kernel as LLVM IR after clang's optimisation."""
    command = [str(compiler()), "-std=c++17", "-O3", "-S", "-emit-llvm", "-fno-discard-value-names"]
    # No x86 vectors; products are fused only where the source says so.
    command += ["-fno-vectorize", "-fno-slp-vectorize", "-ffp-contract=off", "-fno-exceptions", "-w"]
    command += [f"-I{HERE / 'include'}", "-x", "c++", "-", "-o", "-"]
    text = strict_program(kernel)
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[:4000])
    return done.stdout


@dataclass(frozen=True)
class Shape:
    """Sizes to count at."""

    directions: int
    length: int
    channels: int = 768
    states: int = 16
    dtype: Any = mx.float32


@dataclass(frozen=True)
class Work:
    """A kernel's cost for each token, channel and direction."""

    bytes: float
    counts: dict[str, float]
    code: Code

    @property
    def lane_cycles(self) -> float:
        return sum(CYCLES[name] * count for name, count in self.counts.items())

    @property
    def exponentials(self) -> float:
        return sum(self.counts.get(name, 0) for name in ("exp2", "exp"))


def traced_calls(shape: Shape, tuning: Tuning) -> dict[str, tuple[Launch, float]]:
    """Every kernel's launch in a step of one image, and the bytes of its arrays, each counted once."""
    calls: dict[str, tuple[Launch, float]] = {}
    K, L, D, N = shape.directions, shape.length, shape.channels, shape.states
    sizes = {
        "x": (1, L, D), "weight": (K, D, 4), "bias": (K, D), "u": (K, 1, L, D), "dt": (K, 1, L, D),
        "A": (K, D, N), "B": (K, 1, L, N), "C": (K, 1, L, N), "D": (K, D), "dt_bias": (K, D), "z": (1, L, D),
    }  # fmt: skip

    def zeros(name: str) -> mx.array:
        return mx.zeros(sizes[name], shape.dtype if name in problems.BY_TOKEN else mx.float32)

    def record(kernel: Any, **call: Any) -> tuple[mx.array, ...]:
        outputs = tuple(
            mx.zeros(s, d) for s, d in zip(call["output_shapes"], call["output_dtypes"], strict=True)
        )
        traced = trace(kernel, **call)
        name = traced.name.removeprefix("custom_kernel_arm_").split("__")[0]
        calls[name] = traced, sum(a.nbytes for a in (*call["inputs"], *outputs))
        return outputs

    execute, order = launch.execute, mx.zeros((K, L), mx.int32)
    launch.execute = record
    try:
        arrays = [zeros(name) for name in problems.SCAN]
        mx.vjp(lambda *a: scan_function(tuning)(*a, order)[0], arrays, [zeros("z")])
        launch.scan_forward(launch.ScanInputs(*arrays[:7], order), tuning, save=False)
        conv = [zeros(name) for name in problems.CONV]
        launch.conv_forward(*conv, order)
        launch.conv_backward(zeros("u"), *conv, order)
    finally:
        launch.execute = execute
    return calls


def work(shape: Shape, tuning: Tuning | None = None) -> dict[str, Work]:
    """Each kernel's cost at a shape."""
    tuning = tuning or TABLE["any"][shape.states]
    calls = traced_calls(shape, tuning)
    # Loops are counted at a length that leaves them loops.
    long = traced_calls(replace(shape, length=64 * max(32, tuning.chunk) + 1), tuning)
    codes = {name: compiled(long[name][0]) for name in calls}
    turn = {
        "scan_forward": tuning.lanes,
        "scan_backward": tuning.chunk,
        "conv_forward": 4,
        "conv_backward": 4,
    }
    counts: dict[str, dict[str, float]] = {}
    for name, code in codes.items():
        if name.startswith("gate"):
            # One element and no loop.
            counts[name] = dict(sum(code.blocks.values(), Counter()))
            counts[name] = {k: v / shape.directions for k, v in counts[name].items()}
        elif name != "scan_forward_saving":
            lanes = tuning.lanes if name.startswith("scan") else 1
            counts[name] = {k: v * lanes / turn[name] for k, v in code.in_loops().items()}
    if "scan_forward_saving" in codes:
        # The code for saving runs once in a chunk, although its block is in a loop of `lanes` tokens.
        plain, saving = codes["scan_forward"].in_loops(), codes["scan_forward_saving"].in_loops()
        more = {k: (saving[k] - plain[k]) * tuning.lanes / tuning.chunk for k in saving}
        counts["scan_forward_saving"] = {k: counts["scan_forward"].get(k, 0) + more[k] for k in saving}
    elements = shape.directions * shape.length * shape.channels
    return {name: Work(calls[name][1] / elements, counts[name], codes[name]) for name in calls}


FORWARD = ("conv_forward", "scan_forward_saving", "gate_forward", "gate_forward_saving")
"""The forward kernels in training; a model launches one of the two gates."""


@dataclass(frozen=True)
class Chip:
    name: str
    cores: int
    ghz: float
    gb_per_s: float

    @property
    def lane_cycles_per_s(self) -> float:
        return self.cores * 128 * self.ghz * 1e9

    def seconds(self, lane_cycles: float, size: float) -> float:
        """The longer of the times for computing and for moving bytes."""
        return max(lane_cycles / self.lane_cycles_per_s, size / (self.gb_per_s * 1e9))


CHIPS = (
    Chip("M1", 8, 1.28, 68),
    Chip("M1 Max", 32, 1.30, 400),
    Chip("M2", 10, 1.40, 100),
    Chip("M2 Ultra", 76, 1.40, 800),
    Chip("M3", 10, 1.4, 100),
    Chip("M3 Max", 40, 1.4, 400),
    Chip("M4", 10, 1.6, 120),
    Chip("M4 Max", 40, 1.6, 546),
    Chip("M5", 10, 1.6, 153),
)
"""The full chip of each name; clocks from the M3 on are estimates, and lower bounds scale with the clock."""
SHAPES = {
    "pretraining": (pretrain_preset("base"), Shape(1, 128)),
    "finetuning": (classifier_preset("base"), Shape(4, 197)),
}


def print_kernels(title: str, shape: Shape) -> None:
    print(f"\n{title}, {str(shape.dtype).split('.')[-1]}\n")
    print("| kernel | bytes | exponentials | shuffles | loads + stores | other | lane-cycles |")
    print("|---|---|---|---|---|---|---|")
    for name, found in sorted(work(shape).items()):
        count = found.counts.get
        shuffles = count("quad shuffle", 0) + count("SIMD shuffle", 0)
        memory = count("load", 0) + count("store", 0)
        rest = sum(found.counts.values()) - count("free", 0) - shuffles - memory - found.exponentials
        cells = [found.bytes, found.exponentials, shuffles, memory, rest, found.lane_cycles]
        print(f"| {name} | " + " | ".join(f"{cell:.1f}" for cell in cells) + " |")


def print_floors() -> None:
    print("\n| chip | stage | forward | backward | both, 12 layers | matrix products of the step | share |")
    print("|---|---|---|---|---|---|---|")
    for chip in CHIPS:
        for stage, (spec, shape) in SHAPES.items():
            ways = {"forward": 0.0, "backward": 0.0}
            for name, found in work(shape).items():
                if name == "scan_forward":
                    continue  # inference's
                elements = shape.directions * shape.length * shape.channels
                seconds = chip.seconds(found.lane_cycles * elements, found.bytes * elements)
                ways["forward" if name in FORWARD else "backward"] += seconds * 1e6
            both = 12 * sum(ways.values()) / 1e3
            products = 3 * total_products(spec) / chip.lane_cycles_per_s * 1e3
            print(
                f"| {chip.name} | {stage} | {ways['forward']:.0f} us | {ways['backward']:.0f} us "
                f"| {both:.2f} ms | {products:.1f} ms | {both / products:.0%} |"
            )


def total_products(spec: Any) -> float:
    """Multiply-adds of a forward pass on one image; a backward pass has twice as many."""
    scan = ("mixer scan", "mixer convolution")
    return float(sum(part.multiply_adds for part in cost_table(spec) if part.name not in scan))


def main() -> None:
    if compiler() is None:
        sys.exit(f"counting instructions {NEEDED}")
    for stage, (_, shape) in SHAPES.items():
        for dtype in (mx.float32, mx.bfloat16):
            print_kernels(f"{stage}, K={shape.directions} L={shape.length}", replace(shape, dtype=dtype))
    print_floors()


if __name__ == "__main__":
    main()
