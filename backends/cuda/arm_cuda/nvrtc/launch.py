"""From tensors to a launch of `scan_backward.cu`: element types, sizes as macros, arguments."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files

import torch
from torch import Tensor

RESIDENT = {8: 12, 16: 12, 32: 8}
"""Warps on a multiprocessor, by the state sizes that the kernel takes: as many as fit without spills. Of 64
states, the registers of a warp hold too few."""
STATES = tuple(RESIDENT)
LANES = 32
SPAN = 8
"""Tokens whose values shared memory holds at a time."""
GROUP = 2
"""Tokens whose decays and states registers hold at a time."""
ELEMENTS = {torch.float32: "float", torch.bfloat16: "bfloat16", torch.float16: "float16"}
LARGEST = 2**31 - 1
"""Strides are 32-bit arguments."""


@dataclass(frozen=True, kw_only=True)
class Build:
    """What the source is compiled for."""

    element: torch.dtype
    states: int
    chunk: int
    masked: bool
    """Whether the channels are not divisible by 32."""

    @property
    def macros(self) -> dict[str, str]:
        sizes = {"STATES": self.states, "CHUNK": self.chunk, "SPAN": SPAN, "GROUP": GROUP}
        sizes["RESIDENT"] = RESIDENT[self.states]
        return {
            "ELEMENT": ELEMENTS[self.element],
            "MASKED": str(int(self.masked)),
            **{name: str(size) for name, size in sizes.items()},
        }


def source() -> str:
    """The kernel's CUDA C++ source."""
    return files("arm_cuda.nvrtc").joinpath("scan_backward.cu").read_text(encoding="utf-8")


def execute(build: Build, programs: int, tensors: list[Tensor], sizes: list[int]) -> None:
    """Launch one warp per program on the current stream. Tests replace this by the emulator."""
    from arm_cuda.nvrtc import compiler

    with torch.cuda.device_of(tensors[0]):
        compiler.launch(build, programs, tensors, sizes)


def scan_backward(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor, order: Tensor,
    states: Tensor, grad_y: Tensor, grad_u: Tensor, grad_dt: Tensor, grad_A: Tensor, grad_B: Tensor,
    grad_C: Tensor, grad_D: Tensor, grad_bias: Tensor, *, chunk: int,
) -> None:  # fmt: skip
    """Write the gradients. Tensors as for the Triton kernel, see `arm_cuda.triton.scan_kernels`.

    A: (K, N, D).  states: (K, B, chunks, N, D) float32, the state before every `chunk`-th token.
    Raises ValueError for a stride beyond 32 bits.
    """
    directions, batch, length, channels = u.shape
    programs = batch * directions * -(-channels // LANES)
    if programs == 0:
        return
    for name, tensor in {"B": B, "C": C}.items():
        if max(tensor.stride()) > LARGEST:
            raise ValueError(f"scan 'cuda': {name}: strides {tensor.stride()} exceed {LARGEST}; use 'triton'")
    inputs = {"u": u, "dt": dt, "B": B, "C": C, "grad_y": grad_y}
    kinds = {tensor.dtype for tensor in inputs.values()}
    kind = u.dtype if len(kinds) == 1 else torch.float32
    inputs = {name: tensor.to(kind) for name, tensor in inputs.items()}
    to_u, to_dt = (g if g.dtype == kind else torch.empty_like(g, dtype=kind) for g in (grad_u, grad_dt))
    build = Build(element=kind, states=A.shape[1], chunk=chunk, masked=channels % LANES != 0)
    execute(
        build,
        programs,
        [
            inputs["u"], inputs["dt"], A.float().contiguous(), inputs["B"], inputs["C"], D.float(),
            dt_bias.float(), order, states, inputs["grad_y"], to_u, to_dt, grad_A, grad_B, grad_C, grad_D,
            grad_bias,
        ],
        [
            directions, length, channels, channels, channels, channels,
            *inputs["B"].stride()[:3], *inputs["C"].stride()[:3],
        ],
    )  # fmt: skip
    for to, gradient in ((to_u, grad_u), (to_dt, grad_dt)):
        if to is not gradient:
            gradient.copy_(to)
