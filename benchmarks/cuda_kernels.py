"""GPU time of every kernel of the mixer's two operators, and of the scan's kernels over launch constants.

    python benchmarks/cuda_kernels.py [--shapes finetuning pretraining large huge] [--sweep]

Times are the GPU's own, the mean of a profiled run. `--sweep` varies the constants of
`arm_cuda.triton.launch` and `arm_cuda.nvrtc.launch`; each setting is compiled, about 3 seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from cuda_report import check_device, circumstances, kernel_microseconds, options, table, write
from torch import Tensor

from arm_cuda import scan as scans
from arm_cuda.nvrtc import launch as native
from arm_cuda.triton import launch

CALLS = 10


@dataclass(frozen=True)
class Shape:
    directions: int
    batch: int
    length: int
    channels: int
    rank: int
    states: int = 16

    def __str__(self) -> str:
        return f"K={self.directions} B={self.batch} L={self.length} D={self.channels} N={self.states}"


SHAPES = {
    "finetuning": Shape(4, 128, 197, 768, 48),
    "pretraining": Shape(1, 256, 128, 768, 48),
    "large": Shape(4, 64, 197, 1024, 64),
    "huge": Shape(4, 32, 197, 1536, 96),
}
SETTINGS = [
    {"CHUNK": 16, "GROUP": 2},
    {"CHUNK": 8, "GROUP": 2},
    {"CHUNK": 32, "GROUP": 2},
    {"CHUNK": 16, "GROUP": 1},
    {"CHUNK": 16, "GROUP": 4},
]
NATIVE_SETTINGS = [
    {"CHUNK": 16, "SPAN": 8, "GROUP": 2, "RESIDENT": 12},
    {"CHUNK": 16, "SPAN": 8, "GROUP": 2, "RESIDENT": 8},
    {"CHUNK": 16, "SPAN": 8, "GROUP": 1, "RESIDENT": 9},
    {"CHUNK": 8, "SPAN": 8, "GROUP": 2, "RESIDENT": 12},
    {"CHUNK": 8, "SPAN": 8, "GROUP": 1, "RESIDENT": 9},
    {"CHUNK": 16, "SPAN": 16, "GROUP": 2, "RESIDENT": 7},
    {"CHUNK": 16, "SPAN": 4, "GROUP": 2, "RESIDENT": 12},
]
"""The constants of a build; the first is the present one."""


def step(shape: Shape, scan: str) -> Callable[[], object]:
    """Forward and backward pass of convolution and scan in bfloat16."""
    K, B, L, D, N = shape.directions, shape.batch, shape.length, shape.channels, shape.states
    r = torch.Generator(device="cuda").manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=r, device="cuda")

    x, z = normal(B, L, 2 * D).bfloat16().chunk(2, -1)
    low = normal(K, B, L, shape.rank + 2 * N).bfloat16()
    orders = [torch.randperm(L, generator=torch.Generator().manual_seed(k)) for k in range(K)]
    order = torch.stack(orders).int().cuda()
    leaves = [
        x, normal(K, D, 4), normal(K, D), (normal(K, B, L, D) - 4).bfloat16(),
        -torch.arange(1, N + 1, device="cuda").float().expand(K, D, N).contiguous(),
        low[..., shape.rank : shape.rank + N], low[..., shape.rank + N :], normal(K, D), normal(K, D), z,
    ]  # fmt: skip
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    x, weight, bias, dt, A, B_, C, skip, dt_bias, z = leaves

    def run() -> object:
        u = scans.directional_conv(x, weight, bias, order, impl=scan)
        out = scans.selective_scan(u, dt, A, B_, C, skip, dt_bias, z, order, impl=scan)
        return torch.autograd.grad(out, leaves, torch.ones_like(out))

    return run


def microseconds(run: Callable[[], object]) -> dict[str, float]:
    """Of our kernels by name, and of all others together."""
    for _ in range(3):
        run()
    found = kernel_microseconds(run, CALLS)
    ours = {name: time for name, time in found.items() if name.startswith(("scan_", "conv_", "gate_"))}
    return {**ours, "other kernels": sum(found.values()) - sum(ours.values()), "all": sum(found.values())}


@contextmanager
def constants(setting: dict[str, int], *, of_native: bool, states: int) -> Iterator[None]:
    """The launch constants of one setting."""
    before = launch.CHUNK, dict(launch.GROUP), native.SPAN, native.GROUP, dict(native.RESIDENT)
    launch.CHUNK = setting["CHUNK"]
    if of_native:
        native.SPAN, native.GROUP = setting["SPAN"], setting["GROUP"]
        native.RESIDENT[states] = setting["RESIDENT"]
    else:
        launch.GROUP[states] = setting["GROUP"]
    try:
        yield
    finally:
        launch.CHUNK, group, native.SPAN, native.GROUP, resident = before
        launch.GROUP.update(group)
        native.RESIDENT.update(resident)


def rows(found: dict[str, dict[str, float]]) -> str:
    """A table: settings or scans as columns, kernels as rows."""
    names = dict.fromkeys(name for times in found.values() for name in times)
    cells = [[name, *(f"{times.get(name, 0):.0f}" for times in found.values())] for name in names]
    return table(["kernel, us", *found], cells)


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--shapes", nargs="*", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--sweep", action="store_true")
    arguments = parser.parse_args()
    check_device(arguments.device)
    usable = [name for name in ("triton", "cuda") if scans.scans("cuda")[name] is None]
    results: dict[str, Any] = {"circumstances": circumstances(arguments, "none"), "shapes": {}, "sweep": {}}
    sections: list[str] = []
    for name in arguments.shapes:
        found = {scan: microseconds(step(SHAPES[name], scan)) for scan in usable}
        results["shapes"][name] = found
        sections.append(f"## {name}: {SHAPES[name]}\n\n{rows(found)}")
        write("cuda_kernels", results, sections, arguments)
    if not arguments.sweep:
        return
    for scan, settings in (("triton", SETTINGS), ("cuda", NATIVE_SETTINGS)):
        if scan not in usable:
            continue
        for name in arguments.shapes[:2]:
            run, found = step(SHAPES[name], scan), {}
            for setting in settings:
                label = " ".join(f"{key.lower()} {value}" for key, value in setting.items())
                with constants(setting, of_native=scan == "cuda", states=SHAPES[name].states):
                    found[label] = microseconds(run)
            results["sweep"][f"{scan} {name}"] = found
            sections.append(f"## {scan}, {name}, launch constants\n\n{rows(found)}")
            write("cuda_kernels", results, sections, arguments)


if __name__ == "__main__":
    main()
