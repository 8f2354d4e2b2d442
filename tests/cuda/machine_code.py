"""Compiles the Triton kernels without a GPU, and counts their instructions and registers.

    python tests/cuda/machine_code.py [--all] [--json]

The operators are called as on a GPU, with a driver that names one and a launch that stops after compiling.
The counted code is therefore the code that would run, and arguments that Triton refuses are detected. It
needs a separate process, since Triton's interpreter must not have replaced the kernels. `--all` adds every
state size on every architecture, float32, and the forward pass without states. Counts are of machine
instructions (SASS), per token of 32 channels.
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

# Works in a checkout that is not installed.
sys.path[:0] = [str(Path(__file__).parents[2] / part) for part in ("", "backends/cuda")]

import torch  # noqa: E402
import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime import driver  # noqa: E402

from arm_cuda.triton import launch  # noqa: E402

BIN = Path(triton.__file__).parent / "backends/nvidia/bin"
ARCHITECTURES = (80, 90, 100)
DIRECTIONS, CHANNELS, CONV_WIDTH, RANK = 4, 768, 4, 48
"""Sizes of a base classifier."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """Resources of one compiled kernel."""

    kernel: str
    architecture: int
    states: int
    """0 for kernels that do not depend on them."""
    activations: str
    registers: int
    stack: int
    """Bytes of local memory: spilled registers, or arrays that are not in registers."""
    instructions: float

    def __str__(self) -> str:
        return (
            f"{self.kernel:24s} sm_{self.architecture:<4d} N={self.states:<3d} {self.activations:9s}"
            f"{self.registers:4d} registers {self.stack:4d} bytes spilled "
            f"{self.instructions:7.1f} instructions"
        )


class AbsentGPU:
    """The functions of a driver that Triton's runtime calls before a launch."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self) -> int:
        return self.architecture

    def get_current_stream(self, device: int) -> int:
        return 0


def rows(
    architecture: int,
    states: int,
    dtype: torch.dtype,
    *,
    save_for_backward: bool = True,
    scan_only: bool = False,
) -> Iterator[Row]:
    """All kernels of a mixer's forward and, with `save_for_backward`, backward pass.

    scan_only: only those that depend on the states.
    """
    driver.set_active(AbsentGPU(architecture))
    found: list[Row] = []

    def compile_only(kernel: Any, programs: int, *arguments: object, warps: int, **sizes: int) -> None:
        if scan_only and "N" not in sizes:
            return
        compiled = kernel.warmup(
            *arguments, grid=(programs,), num_warps=warps, enable_fp_fusion=True, **sizes
        )
        name = kernel.__name__ + ("" if sizes.get("SAVE", True) else ", no states")
        registers, stack, code = read(compiled.asm["cubin"])
        found.append(
            Row(
                kernel=name.replace("_", " "),
                architecture=architecture,
                states=sizes.get("N", 0),
                activations=str(dtype).removeprefix("torch."),
                registers=registers,
                stack=stack,
                instructions=per_token(kernel.__name__, code, warps, sizes),
            )
        )

    launch.launch = compile_only
    order = torch.zeros(DIRECTIONS, 197, dtype=torch.int32)
    u = torch.ones(DIRECTIONS, 2, 197, CHANNELS, dtype=dtype)
    x, z = torch.ones(2, 197, 2 * CHANNELS, dtype=dtype).chunk(2, -1)
    _, B, C = torch.ones(DIRECTIONS, 2, 197, RANK + 2 * states, dtype=dtype).split([RANK, states, states], -1)
    vector = torch.ones(DIRECTIONS, CHANNELS)
    scan = (u, u, vector[:, None].expand(-1, states, -1), B, C, vector, vector, z, order)
    conv = (x, torch.ones(DIRECTIONS, CONV_WIDTH, CHANNELS), vector, order)
    out, mean, kept = launch.scan_forward(*scan, save_for_backward)
    if save_for_backward:
        launch.scan_backward(out, mean, kept, *scan)
    if save_for_backward and not scan_only:
        launch.conv_forward(*conv)
        launch.conv_backward(u, *conv)
    yield from found


def read(cubin: bytes) -> tuple[int, int, list[tuple[int, str]]]:
    """Registers, bytes of stack, and the machine code as (address, instruction)."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage, listing = (
            subprocess.run(
                [BIN / "cuobjdump", option, path], capture_output=True, text=True, check=True
            ).stdout
            for option in ("-res-usage", "-sass")
        )
    used = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert used, usage
    code = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", listing, re.MULTILINE)
    return int(used[1]), int(used[2]) + int(used[3]), [(int(at, 16), text) for at, text in code]


def loops(code: list[tuple[int, str]]) -> list[int]:
    """Instructions of each loop, outer ones first: from the target of a backward branch to the branch."""
    spans = set()
    for at, text in code:
        branch = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)
        if branch and int(branch[1], 16) < at:
            spans.add((int(branch[1], 16), at))
    return [sum(start <= at <= end for at, _ in code) for start, end in sorted(spans)]


def per_token(kernel: str, code: list[tuple[int, str]], warps: int, sizes: dict[str, int]) -> float:
    """Instructions per token and 32 channels of one direction."""
    found = loops(code)
    if kernel == "scan_forward":
        outer, token = found
        return token + (outer - token) / sizes["CHUNK"]
    if kernel == "scan_backward":
        outer, again, back = found
        groups = sizes["CHUNK"] // sizes["GROUP"]
        return (again * (groups - 1) + back * groups + (outer - again - back)) / sizes["CHUNK"]
    # The others take tiles: a loop covers directions or tiles; without a loop the code is linear.
    everything = sum("NOP" not in text for _, text in code)
    elements = sizes.get("ROWS", 1) * sizes["BLOCK"] / (32 * warps)
    all_directions = not found and kernel in ("conv_backward_tokens", "gate_forward", "gate_backward")
    return (found[0] if found else everything) / elements / (DIRECTIONS if all_directions else 1)


def table(*, everything: bool) -> Iterator[Row]:
    for architecture in ARCHITECTURES:
        for states in launch.GROUP if everything or architecture == 90 else (16,):
            yield from rows(architecture, states, torch.bfloat16, scan_only=states != 16)
        if everything:
            yield from rows(architecture, 16, torch.float32)
            yield from rows(architecture, 16, torch.bfloat16, save_for_backward=False, scan_only=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--json", action="store_true", help="for the tests")
    options = parser.parse_args()
    found = list(table(everything=options.all))
    if options.json:
        print(json.dumps([asdict(row) for row in found]))
        return
    print(f"Triton {triton.__version__}")
    for row in found:
        print(row)


if __name__ == "__main__":
    main()
