"""The scan and the whole mixer on a GPU: Triton against mamba-ssm, plain torch and lower bounds.

    python benchmarks/cuda_scan.py [--peers FOLDER] [--shapes finetuning pretraining]
    python benchmarks/cuda_scan.py --device cpu --tiny          (a trial without a GPU)

It measures the forward pass that saves for a backward pass, and the backward pass, in bfloat16. Peers, in the
same run:

- mamba-ssm, grouped: `--scan mamba-ssm`, all directions in one call, tokens put in order around it;
- mamba-ssm, grouped, layout given: only this call, on tensors that are already in its layout;
- mamba-ssm, official: a call per direction with flips and permutations, like the official code;
- torch loop: `--scan reference` on fewer images, its time scaled up.

Each result and its gradient are compared with the torch loop in float32 before they are timed. Times are the
GPU's own, summed over kernels: calls as short as these would be timed by Python's launches otherwise. Floors:
the bytes that must move, the exponentials of the states, the matrix products, each alone at the measured or
known ceiling.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from cuda_builds import build_peers
from cuda_peers import Official, official_mixer, peer_functions
from cuda_report import (
    Ceilings,
    Times,
    ceilings,
    check_device,
    circumstances,
    milliseconds,
    options,
    table,
    write,
)
from torch import Tensor

from arm_core.model.parameters import initial_parameters
from arm_core.model.spec import DIRECTIONS, ClassifierSpec, EncoderSpec
from arm_core.model.tokens import direction_orders
from arm_cuda import scan as scans
from arm_cuda.layers import Mixer

TOLERANCE = 4e-2
"""Relative to the largest value, against the torch loop in float32 on the same bfloat16 inputs."""


SCAN = ("u", "dt", "A", "B", "C", "D", "dt_bias", "z")
OURS = {"triton": "Triton", "cuda": "Triton, CUDA C++ backward", "mamba-ssm": "mamba-ssm, grouped"}


@dataclass(frozen=True, kw_only=True)
class Shape:
    batch: int
    grid: tuple[int, int]
    """Rows and columns of patches; there is one more token."""
    width: int
    directions: int
    loop_batch: int
    """Images that the torch loop has memory for."""

    @property
    def spec(self) -> ClassifierSpec:
        return ClassifierSpec(
            encoder=EncoderSpec(width=self.width, depth=1),
            classes=2,
            image_size=(16 * self.grid[0], 16 * self.grid[1]),
            scan_directions=DIRECTIONS[self.directions],
        )


SHAPES = {
    "finetuning": Shape(batch=128, grid=(14, 14), width=768, directions=4, loop_batch=4),
    "pretraining": Shape(batch=256, grid=(127, 1), width=768, directions=1, loop_batch=16),
}
TINY_SHAPES = {
    "finetuning": Shape(batch=2, grid=(2, 2), width=32, directions=4, loop_batch=1),
    "pretraining": Shape(batch=2, grid=(8, 1), width=32, directions=1, loop_batch=1),
}


def seeded(like: Tensor) -> Tensor:
    """A gradient of the result, the same for every variant."""
    r = torch.Generator().manual_seed(2)
    return torch.randn(like.shape, generator=r).to(like)


@dataclass(frozen=True)
class Variant:
    """One way to compute a result; images are the first axis of it."""

    name: str
    run: Callable[[], Tensor]
    batch: int
    grads: list[Tensor]
    """The tensors whose gradients are computed."""
    expected: Tensor
    """Of the torch loop in float32, for the first images."""
    expected_gradient: Tensor | None = None
    """Likewise, of the first of `grads` with `seeded` as the gradient of the result."""

    def measure(self, full: int, device: str) -> dict[str, Any]:
        """Times for `full` images, after a check of the result."""
        out = self.run()
        found = out.detach()[: len(self.expected)].float()
        error = ((found - self.expected).abs().max() / self.expected.abs().max()).item()
        assert error < TOLERANCE, f"{self.name}: wrong by {error:.1e} of the largest value"
        grad, scale = torch.randn_like(out), full / self.batch
        grad_error = self.gradient_error(out)
        forward = Times.of(milliseconds(self.run, device), scale)

        def backward() -> object:
            return torch.autograd.grad(out, self.grads, grad, retain_graph=True)

        return {
            "name": self.name if scale == 1 else f"{self.name} (x {scale:g})",
            "forward": asdict(forward),
            "backward": asdict(Times.of(milliseconds(backward, device), scale)),
            "error": error,
            "gradient_error": grad_error,
        }

    def gradient_error(self, out: Tensor) -> float | None:
        """Of the gradient of the first tensor, for the first images, against the torch loop in float32."""
        if self.expected_gradient is None:
            return None
        seed = torch.zeros_like(out)
        first = len(self.expected) if len(out) == self.batch else out.shape[0]
        seed[:first] = seeded(seed[:first])
        (found,) = torch.autograd.grad(out, self.grads[:1], seed, retain_graph=True)
        expected = self.expected_gradient
        found = found[tuple(slice(size) for size in expected.shape)].float()
        error = ((found - expected).abs().max() / expected.abs().max()).item()
        assert error < TOLERANCE, f"{self.name}: gradient wrong by {error:.1e} of the largest value"
        return error


def scan_inputs(shape: Shape, batch: int, device: str) -> dict[str, Tensor]:
    K, L, D, N = shape.directions, shape.spec.tokens, shape.width, shape.spec.encoder.state
    r = torch.Generator(device=device).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=r, device=device)

    low = normal(K, batch, L, 48 + 2 * N).bfloat16()
    values = {
        "u": normal(K, batch, L, D).bfloat16(),
        "dt": (normal(K, batch, L, D) - 4).bfloat16(),
        "A": -torch.arange(1, N + 1, device=device).float().expand(K, D, N).contiguous(),
        "B": low[..., 48 : 48 + N],
        "C": low[..., 48 + N :],
        "D": normal(K, D),
        "dt_bias": normal(K, D),
        "z": normal(batch, L, 2 * D).bfloat16()[..., D:],
    }
    order = torch.from_numpy(direction_orders(shape.spec)).to(device)
    return {**{name: value.requires_grad_() for name, value in values.items()}, "order": order}


def first_images(values: dict[str, Tensor], count: int) -> dict[str, Tensor]:
    """Leaves of their own; images are axis 1 of u, dt, B and C, axis 0 of z."""
    cut = {name: value.detach() for name, value in values.items()}
    cut |= {name: cut[name][:, :count] for name in ("u", "dt", "B", "C")} | {"z": cut["z"][:count]}
    cut |= {name: cut[name].contiguous() for name in ("u", "dt")}
    return {n: v.requires_grad_() if v.is_floating_point() else v for n, v in cut.items()}


def scan_variants(shape: Shape, device: str) -> list[Variant]:
    full = scan_inputs(shape, shape.batch, device)
    few = first_images(full, shape.loop_batch)
    exact = [few[name].detach().float() for name in SCAN]
    exact[0].requires_grad_()
    expected = scans.selective_scan(*exact, full["order"], impl="reference")
    (gradient,) = torch.autograd.grad(expected, exact[:1], seeded(expected))
    expected = expected.detach()

    def ours(values: dict[str, Tensor], impl: str, name: str) -> Variant:
        tensors = [values[n] for n in SCAN]
        run = partial(scans.selective_scan, *tensors, values["order"], impl=impl)
        return Variant(name, run, len(values["z"]), tensors, expected, gradient)

    found = [ours(few, "reference", "torch loop")]
    for impl, name in OURS.items():
        if scans.scans(device)[impl] is None:
            found.append(ours(full, impl, name))
    native = full if peer_functions(device)[2].startswith("mamba-ssm") else few
    return [*found, layout_given(shape, native, device)]


def layout_given(shape: Shape, values: dict[str, Tensor], device: str) -> Variant:
    """One grouped call on tensors in mamba-ssm's layout, without order, sum and gate."""
    scan, _, words = peer_functions(device)
    batch, K, D = len(values["z"]), shape.directions, shape.width
    native = {n: values[n].detach().permute(1, 0, 3, 2).contiguous() for n in ("u", "dt", "B", "C")}
    native |= {n: native[n].reshape(batch, K * D, -1) for n in ("u", "dt")}
    native |= {n: values[n].detach().flatten(0, 1) for n in ("A", "D", "dt_bias")}
    native = {name: value.requires_grad_() for name, value in native.items()}
    run = partial(
        scan, native["u"], native["dt"], native["A"], native["B"], native["C"], native["D"],
        delta_bias=native["dt_bias"], delta_softplus=True,
    )  # fmt: skip
    peer = "mamba-ssm" if words.startswith("mamba-ssm") else "torch loop"
    expected = native_expected(shape, values)
    return Variant(f"{peer}, grouped, layout given", run, batch, list(native.values()), expected)


def native_expected(shape: Shape, full: dict[str, Tensor]) -> Tensor:
    """y before order, mean and gate: a scan in memory order with a gate of 1, direction by direction."""
    few, parts = shape.loop_batch, []
    identity = torch.arange(shape.spec.tokens, dtype=torch.int32, device=full["u"].device)[None]
    for k in range(shape.directions):
        tokens = {n: full[n].detach()[k : k + 1, :few].float() for n in ("u", "dt", "B", "C")}
        vectors = {n: full[n].detach()[k : k + 1] for n in ("A", "D", "dt_bias")}
        one = torch.full_like(tokens["u"][0], 1.2784645427610738)  # its silu is 1
        parts.append(
            scans.selective_scan(
                tokens["u"], tokens["dt"], vectors["A"], tokens["B"], tokens["C"], vectors["D"],
                vectors["dt_bias"], one, identity, impl="reference",
            ).transpose(1, 2)
        )  # fmt: skip
    return torch.cat(parts, dim=1)


def mixer_variants(shape: Shape, device: str) -> list[Variant]:
    """Ways to run the whole mixer, in_proj to out_proj, under bfloat16 autocast."""
    values = initial_parameters(shape.spec, seed=0)
    prefix = "layers.0.mixer."
    state = {n[len(prefix) :]: torch.from_numpy(v) for n, v in values.items() if n.startswith(prefix)}
    order = torch.from_numpy(direction_orders(shape.spec)).to(device)
    x = torch.randn(shape.batch, shape.spec.tokens, shape.width, device=device)

    def mixer(impl: str) -> Mixer:
        made = Mixer(shape.spec.encoder, shape.directions, impl)
        made.load_state_dict(state)
        return made.to(device)

    loop = mixer("reference")
    few = x[: shape.loop_batch].clone().requires_grad_()
    expected = loop(few, order)
    (gradient,) = torch.autograd.grad(expected, few, seeded(expected))
    expected = expected.detach()

    def variant(name: str, module: Mixer, batch: int, forward: Callable[..., Tensor]) -> Variant:
        some = x[:batch].clone().requires_grad_()

        def run() -> Tensor:
            with torch.autocast(device, torch.bfloat16):
                return forward(some, order)

        return Variant(name, run, batch, [some, *module.parameters()], expected, gradient)

    found = [variant("torch loop", loop, shape.loop_batch, loop)]
    for impl, name in OURS.items():
        if scans.scans(device)[impl] is None:
            module = mixer(impl)
            found.append(variant(name, module, shape.batch, module))
    words = peer_functions(device)[2]
    chosen = Official.on(device)

    def official(x: Tensor, order: Tensor) -> Tensor:
        return official_mixer(loop, x, shape.spec.grid, official=chosen)

    if words.startswith("mamba-ssm"):
        return [*found, variant("mamba-ssm, official", loop, shape.batch, official)]
    return [*found, variant("torch loops, official", loop, shape.loop_batch, official)]


def floors(shape: Shape, most: Ceilings) -> dict[str, dict[str, float | None]]:
    """Milliseconds of the scan's bytes and exponentials, and of the mixer's matrix products, alone.

    Forward: u, dt, B, C and z are read, out is written. Backward: those and the gradient of out are read,
    their gradients written; each exponential is needed once.
    """
    K, L, D, N = shape.directions, shape.spec.tokens, shape.width, shape.spec.encoder.state
    tokens = shape.batch * L
    forward = 2 * tokens * (K * (2 * D + 2 * N) + 2 * D)
    exponentials = tokens * K * D * N
    rank = shape.spec.encoder.dt_rank
    products = 2 * tokens * (3 * D * D + K * D * (rank + 2 * N) + K * rank * D)
    rate = most.exponentials_per_second
    return {
        "bytes of the scan": {
            "forward": 1e3 * forward / most.bytes_per_second,
            "backward": 2e3 * forward / most.bytes_per_second,
        },
        "exponentials of the scan": {
            "forward": 1e3 * exponentials / rate if rate else None,
            "backward": 1e3 * exponentials / rate if rate else None,
        },
        "matrix products of the mixer": {
            "forward": 1e3 * products / most.product_flops,
            "backward": 2e3 * products / most.product_flops,
        },
    }


def section(title: str, rows: list[dict[str, Any]], limits: dict[str, dict[str, float | None]]) -> str:
    ours = next((row for row in rows if row["name"] == "Triton"), rows[0])
    lines = []
    for row in rows:
        cells = [row["name"]]
        for way in ("forward", "backward"):
            times = row[way]
            ratio = times["median"] / ours[way]["median"]
            cells += [f"{times['median']:.3f} ({times['low']:.3f} to {times['high']:.3f})", f"{ratio:.2f}"]
        lines.append(cells)
    for name, limit in limits.items():
        cells = [f"floor: {name}"]
        for way in ("forward", "backward"):
            value = limit[way]
            cells += (
                ["unknown", ""] if value is None else [f"{value:.3f}", f"{value / ours[way]['median']:.2f}"]
            )
        lines.append(cells)
    header = ["", "forward, ms", f"/ {ours['name']}", "backward, ms", f"/ {ours['name']}"]
    return f"## {title}\n\n{table(header, lines)}"


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--shapes", nargs="*", choices=list(SHAPES), default=list(SHAPES))
    arguments: argparse.Namespace = parser.parse_args()
    check_device(arguments.device)
    built = build_peers(arguments.peers) if arguments.device == "cuda" else "not built on a CPU"
    most = ceilings(arguments.device)
    facts = circumstances(arguments, f"{peer_functions(arguments.device)[2]} ({built})")
    results: dict[str, Any] = {"circumstances": facts, "ceilings": asdict(most), "shapes": {}}
    sections: list[str] = []
    for name in arguments.shapes:
        shape = (TINY_SHAPES if arguments.tiny else SHAPES)[name]
        limits = floors(shape, most)
        words = f"{name}: B={shape.batch} L={shape.spec.tokens} D={shape.width} K={shape.directions}"
        measured: dict[str, Any] = {"shape": asdict(shape), "floors": limits}
        for what, variants in (("scan", scan_variants), ("mixer", mixer_variants)):
            ways = variants(shape, arguments.device)
            measured[what] = [way.measure(shape.batch, arguments.device) for way in ways]
            shown = {n: v for n, v in limits.items() if what == "mixer" or "mixer" not in n}
            sections.append(section(f"{words}: {what}", measured[what], shown))
            results["shapes"][name] = measured
            write("cuda_scan", results, sections, arguments)


if __name__ == "__main__":
    main()
