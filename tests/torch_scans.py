"""Inputs for the torch scans, their results with every gradient, and the tolerances."""

from __future__ import annotations

import torch
from torch import Tensor

from arm_cuda import scan as scans

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}
"""Relative to each tensor's largest value; results of half-precision inputs are rounded to 8 or 11 bits."""

CONV = ("x", "weight", "bias")
SCAN = ("u", "dt", "A", "B", "C", "D", "dt_bias", "z")
REGIMES = ["mild", "large steps", "vanishing steps"]


def label(case: tuple[int, ...]) -> str:
    return "-".join(f"{name}{size}" for name, size in zip("KBLDNW", case, strict=True))


def inputs(
    case: tuple[int, ...],
    regime: str = "mild",
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> dict[str, Tensor]:
    """Inputs of both operators as leaves; the float32 values are the same whatever the dtype and device."""
    directions, batch, length, channels, states, width = case
    r = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=r)

    dt = normal(directions, batch, length, channels)
    if regime == "large steps":
        dt = torch.linspace(-50, 20, dt.numel())[torch.randperm(dt.numel(), generator=r)].view(dt.shape)
    if regime == "vanishing steps":
        dt = dt - 50
    dt = (8 * dt).round() / 8  # and dt_bias likewise: their sum is exact, so that softplus is what is judged
    values = {
        "x": normal(batch, length, channels),
        "weight": normal(directions, channels, width),
        "bias": normal(directions, channels),
        "u": normal(directions, batch, length, channels),
        "dt": dt,
        "A": -torch.exp(normal(directions, channels, states)),
        "B": normal(directions, batch, length, states),
        "C": normal(directions, batch, length, states),
        "D": normal(directions, channels),
        "dt_bias": (8 * normal(directions, channels)).round() / 8,
        "z": normal(batch, length, channels),
    }
    leaves = {name: value.to(device, dtype).requires_grad_() for name, value in values.items()}
    order = [torch.randperm(length, generator=r) for _ in range(directions)]
    return {**leaves, "order": torch.stack(order).to(device, torch.int32)}


def run(impl: str, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Results of both operators and every gradient, by name."""
    results = {}
    for operator, names in ((scans.directional_conv, CONV), (scans.selective_scan, SCAN)):
        leaves = [values[name] for name in names]
        out = operator(*leaves, values["order"], impl=impl)
        seed = torch.randn(out.shape, generator=torch.Generator().manual_seed(4)).to(out)
        gradients = torch.autograd.grad(out, leaves, seed)
        results[operator.__name__] = out.detach()
        results |= {f"gradient of {name}": g for name, g in zip(names, gradients, strict=True)}
    return results


def in_float64(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same values as float64 leaves."""
    return {n: v.detach().double().requires_grad_() if n != "order" else v for n, v in values.items()}


def assert_close(found: Tensor, expected: Tensor, name: str, tolerance: float) -> None:
    assert found.shape == expected.shape, name
    assert torch.isfinite(found).all(), name
    error = (found.double() - expected.double()).abs().max() / expected.double().abs().max().clamp_min(1e-30)
    assert error < tolerance, f"{name}: {error:.1e} of the largest value"
