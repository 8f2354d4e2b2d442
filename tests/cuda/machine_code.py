"""Compiles the Triton kernels for GPUs that need not be there, and counts what the compiler made of them.

    python tests/cuda/machine_code.py [--all] [--json]

A process of its own: compiling needs kernels that Triton's interpreter has not taken over. `--all` adds
every state size on every architecture, float32, and the forward without states. Counts are of machine
instructions (SASS), per token of a warp's 32 channels.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# A checkout that is not installed will do.
sys.path[:0] = [str(Path(__file__).parents[2] / part) for part in ("", "backends/cuda")]

import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from arm_cuda.triton import conv_kernels, gate_kernels, launch, scan_kernels  # noqa: E402

BIN = Path(triton.__file__).parent / "backends/nvidia/bin"
ARCHITECTURES = (80, 90, 100)
DIRECTIONS, CHANNELS, TAPS = 4, 768, 4
FLOAT32 = {
    "A", "D", "dt_bias", "saved", "scratch", "grad_A", "grad_B", "grad_C", "grad_D", "grad_bias", "weight",
    "bias", "partials",
}  # fmt: skip
INT32 = {"order", "inverse"}


@dataclass(frozen=True, kw_only=True)
class Row:
    """What one compiled kernel needs."""

    kernel: str
    architecture: int
    states: int
    activations: str
    registers: int
    stack: int
    """Bytes of local memory: spilled registers, or arrays that are not in registers."""
    instructions: float
    """Per token and 32 channels of one direction."""

    def __str__(self) -> str:
        return (
            f"{self.kernel:22s} sm_{self.architecture:<4d} N={self.states:<3d} {self.activations:5s} "
            f"{self.registers:4d} registers {self.stack:4d} bytes spilled "
            f"{self.instructions:7.1f} instructions"
        )


def compile_for(
    kernel: Any, architecture: int, activations: str, sizes: dict[str, int], warps: int
) -> tuple[int, int, list[tuple[int, str]]]:
    """Registers, bytes of stack, and the machine code as (address, instruction)."""
    signature, attributes = {}, {}
    for i, parameter in enumerate(kernel.params):
        name = parameter.name
        if parameter.is_constexpr:
            signature[name] = "constexpr"
        elif name in FLOAT32:
            signature[name] = "*fp32"
        elif name in INT32:
            signature[name] = "*i32"
        elif name == "length" or name.endswith(("_direction", "_image", "_token")):
            signature[name] = "i32"
        else:
            signature[name] = f"*{activations}"
        skipped = parameter.do_not_specialize or parameter.do_not_specialize_on_alignment
        if not parameter.is_constexpr and not skipped:
            attributes[(i,)] = [["tt.divisibility", 16]]  # as pointers of torch and strides are at run time
    compiled = triton.compile(
        ASTSource(fn=kernel, signature=signature, constexprs=sizes, attrs=attributes),
        target=GPUTarget("cuda", architecture, 32),
        options={"num_warps": warps, "enable_fp_fusion": True},
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(compiled.asm["cubin"])
        usage = _cuobjdump("-res-usage", path)
        listing = _cuobjdump("-sass", path)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert found, usage
    code = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", listing, re.MULTILINE)
    return int(found[1]), int(found[2]) + int(found[3]), [(int(at, 16), text) for at, text in code]


def _cuobjdump(option: str, path: Path) -> str:
    return subprocess.run(
        [BIN / "cuobjdump", option, path], capture_output=True, text=True, check=True
    ).stdout


def loops(code: list[tuple[int, str]]) -> list[int]:
    """Instructions of each loop, outer ones first: from the target of a backward branch to the branch."""
    spans = set()
    for at, text in code:
        branch = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)
        if branch and int(branch[1], 16) < at:
            spans.add((int(branch[1], 16), at))
    return [sum(start <= at <= end for at, _ in code) for start, end in sorted(spans)]


def straight(code: list[tuple[int, str]]) -> int:
    """Instructions without the padding at the end."""
    return sum("NOP" not in text for _, text in code)


def scan_rows(architecture: int, states: int, activations: str, *, inference: bool = False) -> Iterator[Row]:
    warps = max(1, states // launch.STATES_PER_WARP)
    sizes = {"directions": DIRECTIONS, "channels": CHANNELS, "N": states, "BLOCK": launch.LANES}
    common = {"architecture": architecture, "states": states, "activations": activations}

    chunk = launch.CHUNK
    forwards = {"scan forward": True} | ({"scan forward, no states": False} if inference else {})
    for kernel, save in forwards.items():
        forward = sizes | {"CHUNK": chunk, "SAVE": save}
        registers, stack, code = compile_for(
            scan_kernels.scan_forward, architecture, activations, forward, warps
        )
        outer, token = loops(code)
        per_token = token + (outer - token) / chunk
        yield Row(kernel=kernel, registers=registers, stack=stack, instructions=per_token, **common)

    group = launch.GROUP[states]
    groups = chunk // group
    backward = sizes | {"CHUNK": chunk, "GROUP": group}
    registers, stack, code = compile_for(
        scan_kernels.scan_backward, architecture, activations, backward, warps
    )
    outer, again, back = loops(code)
    per_token = (again * (groups - 1) + back * groups + (outer - again - back)) / chunk
    yield Row(kernel="scan backward", registers=registers, stack=stack, instructions=per_token, **common)


def other_rows(architecture: int, activations: str) -> Iterator[Row]:
    """Convolution and gate; instructions again per 32 elements of one direction."""
    conv = {"directions": DIRECTIONS, "channels": CHANNELS, "W": TAPS, "BLOCK": launch.CONV_BLOCK}
    gate = {"directions": DIRECTIONS, "channels": CHANNELS, "BLOCK": launch.GATE_BLOCK}
    lanes = 32 * launch.CONV_WARPS
    common = {"architecture": architecture, "states": 0, "activations": activations}
    table = [
        (
            "convolution", conv_kernels.conv_forward, conv | {"ROWS": launch.CONV_ROWS},
            launch.CONV_WARPS, launch.CONV_ROWS * launch.CONV_BLOCK / lanes,
        ),
        (
            "convolution, steps", conv_kernels.conv_backward_steps,
            conv | {"ROWS": launch.CONV_STEP_ROWS, "TILES": launch.CONV_TILES},
            launch.CONV_WARPS, launch.CONV_STEP_ROWS * launch.CONV_BLOCK / lanes,
        ),
        (
            "convolution, tokens", conv_kernels.conv_backward_tokens,
            conv | {"ROWS": launch.CONV_TOKEN_ROWS},
            launch.CONV_WARPS, DIRECTIONS * launch.CONV_TOKEN_ROWS * launch.CONV_BLOCK / lanes,
        ),
        (
            "gate", gate_kernels.gate_forward, gate | {"SAVE": True}, 1,
            DIRECTIONS * launch.GATE_BLOCK / 32,
        ),
        ("gate, backward", gate_kernels.gate_backward, gate, 1, DIRECTIONS * launch.GATE_BLOCK / 32),
    ]  # fmt: skip
    for name, kernel, sizes, warps, elements in table:
        registers, stack, code = compile_for(kernel, architecture, activations, sizes, warps)
        counts = loops(code)
        per_token = (counts[0] if counts else straight(code)) / elements
        yield Row(kernel=name, registers=registers, stack=stack, instructions=per_token, **common)


def rows(*, everything: bool) -> Iterator[Row]:
    for architecture in ARCHITECTURES:
        for states in launch.GROUP if everything or architecture == 90 else (16,):
            yield from scan_rows(architecture, states, "bf16", inference=everything)
        if everything or architecture == 90:
            yield from other_rows(architecture, "bf16")
        if everything:
            yield from scan_rows(architecture, 16, "fp32")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--json", action="store_true", help="for the tests")
    options = parser.parse_args()
    found = list(rows(everything=options.all))
    if options.json:
        print(json.dumps([asdict(row) for row in found]))
        return
    print(f"Triton {triton.__version__}")
    for row in found:
        print(row)


if __name__ == "__main__":
    main()
