"""A model as a program of torch.export (a .pt2 file), or compiled by AOTInductor.

The recurrence is torch's own `scan` operator, so that the program loads with torch alone: one node for each
layer instead of one for each token. Alternatively it is the registered operator of this package, which is
faster and needs the package where the program is loaded. Sizes: K directions, B images, L tokens, D channels,
N states, W convolution width.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 (the field's name for it)
from torch import Tensor, nn
from torch._higher_order_ops.scan import scan as torch_scan

from arm_core.engine.protocol import Array
from arm_core.engine.scans import Implementation
from arm_core.files.atomic import new_file
from arm_core.model.parameters import check_parameters
from arm_core.model.spec import ModelSpec, PretrainSpec, to_json
from arm_cuda import cpu_operators  # registers them  # noqa: F401
from arm_cuda.model import build_model
from arm_cuda.program_file import OUTPUTS, SPEC, compile_program, require_compiler
from arm_cuda.scan import IMPLEMENTATIONS

PORTABLE, REGISTERED = "portable", "cpu"
"""Scans of a program: the one below, which has no gradients and is only used in programs, and the operators
of `arm_cuda.cpu_operators`."""


def _reorder(x: Tensor, order: Tensor) -> Tensor:
    """Tokens of (K, B, L, ...) in the order (K, L); unlike `take_along_dim` it leaves B open."""
    directions = torch.arange(order.shape[0])[:, None]
    return x[directions, :, order.long()].movedim(1, 2)  # indices apart: (K, L, B, ...)


def portable_conv(x: Tensor, weight: Tensor, bias: Tensor, order: Tensor) -> Tensor:
    """As `arm_cuda.scan.directional_conv`."""
    length, width = x.shape[1], weight.shape[2]
    steps = F.pad(x[:, order.long()], (0, 0, width - 1, 0)).transpose(0, 1)  # (K, B, W - 1 + L, D)
    taps = [steps[:, :, j : j + length] * weight[:, None, None, :, j] for j in range(width)]
    return _reorder(F.silu(torch.stack(taps).sum(0) + bias[:, None, None]), order.argsort(1))


def portable_scan(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor, z: Tensor,
    order: Tensor,
) -> Tensor:  # fmt: skip
    """As `arm_cuda.scan.selective_scan`, with torch's `scan` operator; the state is (K, B, N, D)."""

    def steps(x: Tensor) -> Tensor:  # (K, B, L, ...) by token -> (L, K, B, ...) in scan order
        return _reorder(x, order).movedim(2, 0)

    def step(h: Tensor, inputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        s, x, b, c = inputs
        h = torch.exp(s.unsqueeze(-2) * rate) * h + b.unsqueeze(-1) * x.unsqueeze(-2)
        return h, (c.unsqueeze(-2) @ h).squeeze(-2)

    dtype = u.dtype
    u, dt, A, B, C, D, dt_bias, z = (t.float() for t in (u, dt, A, B, C, D, dt_bias, z))
    dt = F.softplus(dt + dt_bias[:, None, None])
    rate = A.mT.contiguous()[:, None]  # (K, 1, N, D); scan wants equal strides of both states
    h = u.new_zeros(*u.shape[:2], A.shape[2], A.shape[1])
    ys = torch_scan(step, h, tuple(map(steps, (dt, dt * u, B, C))))[1]  # (L, K, B, D)
    y = _reorder(ys.movedim(0, 2), order.argsort(1)) + D[:, None, None] * u
    return (F.silu(z) * y.mean(0)).to(dtype)


@contextmanager
def _portable() -> Iterator[None]:
    IMPLEMENTATIONS[PORTABLE] = Implementation(directional_conv=portable_conv, selective_scan=portable_scan)
    try:
        yield
    finally:
        del IMPLEMENTATIONS[PORTABLE]


class _Outputs(nn.Module):
    """Images as torch users have them, (B, channels, H, W), to the outputs with the given names."""

    def __init__(self, model: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        outputs = self.model(pixel_values.permute(0, 2, 3, 1))
        return tuple(outputs[name] for name in self.names)


def write_program(
    spec: ModelSpec,
    parameters: Mapping[str, Array],
    path: Path,
    *,
    features: bool = False,
    dynamic_batch: bool = False,
    scan: str = PORTABLE,
    compiled: bool = False,
    force: bool = False,
) -> int:
    """Write a program that takes `pixel_values` (B, channels, H, W), normalised float32.

    The program returns a tuple: a classifier's logits, or with `features` its features; a pretraining model's
    decoder_input.
    scan: `PORTABLE` or `REGISTERED`.  compiled: write a package of AOTInductor, machine code for this kind of
        CPU, instead of a program.
    Returns the number of nodes, bodies of scans included.
    Raises ValueError for parameters that are not the spec's, a pretraining model without `features`, and
    an existing file unless `force`, an unknown scan, and if no C++ compiler is found for `compiled`.
    """
    if scan not in (PORTABLE, REGISTERED):
        raise ValueError(f"scan of a program: expected {PORTABLE} or {REGISTERED}, found {scan!r}")
    check_parameters(spec, parameters)
    if isinstance(spec, PretrainSpec) and not features:
        raise ValueError("a pretraining model has no classes; pass --features to export its encoder")
    if compiled:
        require_compiler()
    name = "decoder_input" if isinstance(spec, PretrainSpec) else "features" if features else "logits"
    with _portable(), torch.no_grad():
        model = build_model(spec, scan, torch.device("cpu"))
        model.load_state_dict({n: torch.from_numpy(np.asarray(a, np.float32)) for n, a in parameters.items()})
        height, width = spec.image_size
        # Two images: torch.export takes a batch of one for a size that is always 1.
        example = torch.zeros(2 if dynamic_batch else 1, spec.encoder.channels, height, width)
        sizes = {0: torch.export.Dim("batch", min=1)} if dynamic_batch else None
        module = _Outputs(model, (name,)).eval()
        program = torch.export.export(module, (example,), dynamic_shapes=(sizes,))
    strings = {SPEC: json.dumps(to_json(spec)), OUTPUTS: json.dumps([name])}
    with new_file(path, force=force) as draft, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own deprecations
        if compiled:
            compile_program(program, draft, strings)
        else:
            with draft.open("wb") as file:
                torch.export.save(program, file, extra_files=strings)
    return sum(len(graph.graph.nodes) for graph in program.graph_module.modules() if hasattr(graph, "graph"))
