"""The kernels' text. MLX generates each signature from the names and types of the arrays.

MLX passes to a kernel all of Metal's thread attributes whose names occur anywhere in its text. Comments are
therefore removed: they may mention attributes that the code does not use.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from typing import Any

import mlx.core as mx

SCAN_INPUTS = ("u", "dt", "A", "B", "C", "D", "dt_bias", "order")
CONV_INPUTS = ("x", "weight", "bias", "order")


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """One Metal kernel: the files it consists of, and its arrays in order."""

    files: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    strided: str = ""
    """The input that is read through its strides, so that half of a product's result needs no copy."""
    save: bool = False
    """Whether it saves the inputs of a backward pass (ARM_SAVE in the text)."""


def _forward_and_saving(name: str, kernel: Kernel, saved: str) -> dict[str, Kernel]:
    saving = replace(kernel, outputs=(*kernel.outputs, saved), save=True)
    return {name: kernel, f"{name}_saving": saving}


KERNELS = {
    "conv_forward": Kernel(files=("conv_forward",), inputs=CONV_INPUTS, outputs=("u",), strided="x"),
    "conv_backward": Kernel(
        files=("conv_backward",), inputs=("du", *CONV_INPUTS), outputs=("dx", "parts"), strided="x"
    ),
    **_forward_and_saving(
        "scan_forward",
        Kernel(files=("scan_setup", "scan_forward"), inputs=SCAN_INPUTS, outputs=("y",)),
        "states",
    ),
    "scan_backward": Kernel(
        files=("scan_setup", "scan_backward"),
        inputs=("grad_y", "states", *SCAN_INPUTS),
        outputs=("du", "ddt", "dA", "dBC", "dD", "ddt_bias"),
    ),
    **_forward_and_saving(
        "gate_forward",
        Kernel(files=("gate_forward",), inputs=("y", "z"), outputs=("out",), strided="z"),
        "mean",
    ),
    "gate_backward": Kernel(
        files=("gate_backward",), inputs=("grad", "z", "mean"), outputs=("dz", "grad_y"), strided="z"
    ),
}


@cache
def text(name: str) -> str:
    """A .metal file of this package, without comments."""
    return re.sub(r"[ \t]*//.*", "", files("arm_mlx.metal").joinpath(f"{name}.metal").read_text("utf-8"))


@cache
def load(name: str) -> Any:
    """The kernel of this name as MLX's callable. MLX compiles it at the first call with new sizes."""
    kernel = KERNELS[name]
    return mx.fast.metal_kernel(
        name=f"arm_{name}",
        input_names=kernel.inputs,
        output_names=kernel.outputs,
        header=("#define ARM_SAVE\n" if kernel.save else "") + text("helpers"),
        source="".join(text(file) for file in kernel.files),
        ensure_row_contiguous=not kernel.strided,  # `launch.run` copies all other inputs
        compile_options={"math_mode": "safe"},  # infinities in exp, and the order of log1p
    )
