"""The fused kernels of mlx-vision-mamba beside ours: results against float64, bytes, lane-cycles.

    pip install --no-deps mlx-vision-mamba
    python tests/metal/peer.py

Emulated, from the source that the installed package gives to MLX. Its scan takes one direction, softplus
outside and no gate; both are compared without these. "Reductions" are the sums over partial gradients that it
leaves to MLX: each (B, L, D, N) array is read once, and the product for dC is written and read.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from typing import Any

import mlx.core as mx
import numpy as np
import problems
from cost import CYCLES, SHAPES, Work, compiled, work
from emulator import Emulator, KernelError, Launch, Schedule, missing
from problems import Case

STATES = 16
NAMES = ("x", "dt", "A", "B", "C", "D")


class Recorder:
    """Takes the place of `mx.fast.metal_kernel`: calls run in the emulator and are recorded."""

    def __init__(self) -> None:
        self.emulator = Emulator()
        self.calls: list[tuple[Launch, int]] = []
        self._make = mx.fast.metal_kernel

    def __call__(self, **options: Any) -> Callable[..., tuple[mx.array, ...]]:
        kernel = self._make(**options)

        def call(**arguments: Any) -> tuple[mx.array, ...]:
            outputs = self.emulator.execute(kernel, **arguments)
            size = sum(array.nbytes for array in (*arguments["inputs"], *outputs))
            self.calls.append((self.emulator.launches[-1], size))
            return outputs

        return call


def scan_with_gradients(
    function: Callable[..., mx.array], values: dict[str, np.ndarray], grad: np.ndarray
) -> list[np.ndarray]:
    """Result and gradients of x, dt, A, B, C, D of a scan in the given order of tokens."""
    arrays = [mx.array(values[name]) for name in NAMES]
    (y,), grads = mx.vjp(lambda *a: function(*a), arrays, [mx.array(grad)])
    return [np.asarray(array) for array in (y, *grads)]


def exact(values: dict[str, np.ndarray], grad: np.ndarray) -> list[np.ndarray]:
    """The same in float64, by the loop and its adjoint."""
    x, dt, A, B, C, D = (values[name].astype(np.float64) for name in NAMES)
    h, states, y = np.zeros((*x.shape[::2], A.shape[1])), [], np.empty_like(x)
    for t in range(x.shape[1]):
        states.append(h)
        h = np.exp(dt[:, t, :, None] * A) * h + (dt * x)[:, t, :, None] * B[:, t, None]
        y[:, t] = (h * C[:, t, None]).sum(-1) + D * x[:, t]
    states.append(h)
    g = np.zeros_like(h)
    found = {name: np.zeros(values[name].shape) for name in NAMES}
    for t in reversed(range(x.shape[1])):
        decay = np.exp(dt[:, t, :, None] * A)
        g = g + grad[:, t, :, None] * C[:, t, None]
        found["C"][:, t] = (grad[:, t, :, None] * states[t + 1]).sum(1)
        found["B"][:, t] = (g * (dt * x)[:, t, :, None]).sum(1)
        drive, carried = (g * B[:, t, None]).sum(-1), g * decay
        found["x"][:, t] = drive * dt[:, t] + D * grad[:, t]
        found["dt"][:, t] = drive * x[:, t] + (carried * states[t] * A).sum(-1)
        found["A"] += (carried * states[t] * dt[:, t, :, None]).sum(0)
        g = carried
    found["D"] = (grad * x).sum((0, 1))
    return [y, *found.values()]


def inputs(case: Case) -> tuple[dict[str, np.ndarray], np.ndarray]:
    values = problems.inputs(case)
    step = problems.softplus(values["dt"][0].astype(np.float64) + values["dt_bias"][0])
    one = {"x": values["u"][0], "dt": step.astype(np.float32)}
    one |= {name: values[name][0] for name in ("A", "B", "C", "D")}
    grad = np.random.default_rng(1).standard_normal(one["x"].shape).astype(np.float32)
    return {name: array.astype(np.float32) for name, array in one.items()}, grad


def print_results(function: Callable[..., mx.array], recorder: Recorder) -> bool:
    """Whether the kernels ran in any order of threads."""
    values, grad = inputs(Case(batch=2, length=37, channels=40))
    expected, runs = exact(values, grad), []
    for schedule in Schedule:
        recorder.emulator.schedule = schedule
        try:
            runs.append(scan_with_gradients(function, values, grad))
        except KernelError as error:
            print(f"{schedule.name.lower()}: {error}")
    if not runs:
        return False
    for name, want, *found in zip(("y", *NAMES), expected, *runs, strict=True):
        errors = [np.abs(f - want).max() / np.abs(want).max() for f in found]
        same = all(np.array_equal(f, found[0]) for f in found)
        print(
            f"{name:3s} off by {max(errors):.1e} of the largest value"
            + ("" if same else "; depends on the order of threads: a race")
        )
    return True


def per_token(launch: Launch) -> Counter[str]:
    """Instructions in the loop over tokens, with the loops over states unrolled, as on a GPU."""
    loop = "for (int n = 0; n < n_state; n++)"
    source = launch.source.replace(loop, f'_Pragma("clang loop unroll(full)") {loop}')
    counts = compiled(replace(launch, source=source)).in_loops()
    assert set(counts) <= set(CYCLES), counts
    return counts


def print_costs(function: Callable[..., mx.array], recorder: Recorder, ours: dict[str, Work]) -> None:
    print("| scan | stage | bytes | exponentials | lane-cycles |\n|---|---|---|---|---|")
    stage, (_, shape) = "finetuning", SHAPES["finetuning"]
    values, grad = inputs(Case(length=shape.length, channels=64))
    recorder.calls.clear()
    scan_with_gradients(function, values, grad)
    elements, totals = shape.length * 64, Counter[str]()
    (_, forward), *_ = recorder.calls
    for launch, size in recorder.calls:
        counts = per_token(launch)
        assert counts["exp"] == STATES, f"{counts}: the loop over states is not unrolled"
        totals["bytes"] += size
        totals["cycles"] += sum(CYCLES[name] * count for name, count in counts.items())
        totals["exp"] += counts["exp"]
    first = per_token(recorder.calls[0][0])
    cycles = sum(CYCLES[name] * count for name, count in first.items())
    reductions = 4 * STATES * (2 + 3)
    rows = [
        ("forward", forward / elements, first["exp"], cycles),
        (
            "backward",
            (totals["bytes"] - forward) / elements + reductions,
            totals["exp"] - first["exp"],
            totals["cycles"] - cycles,
        ),
    ]
    for name, *cells in rows:
        print(f"| mlx-vision-mamba | {name} | " + " | ".join(f"{cell:.0f}" for cell in cells) + " |")
    for name, kernel in (("forward", "scan_forward_saving"), ("backward", "scan_backward")):
        cost = ours[kernel]
        print(f"| ours | {name} | {cost.bytes:.0f} | {cost.exponentials:.0f} | {cost.lane_cycles:.0f} |")
    print(f"\n{stage}, float32, per token, channel and direction; {reductions} of the bytes are reductions")


def main() -> None:
    try:
        from mlx_vision_mamba import mamba_metal_fused
    except ImportError:
        sys.exit("needs mlx-vision-mamba: pip install --no-deps mlx-vision-mamba")
    if reason := missing():
        sys.exit(reason)
    ours = work(SHAPES["finetuning"][1])
    recorder = Recorder()
    mx.fast.metal_kernel = recorder
    print(f"mlx-vision-mamba {version('mlx-vision-mamba')}, emulated\n")
    function = mamba_metal_fused.selective_scan_metal_fused
    if print_results(function, recorder):
        print()
        print_costs(function, recorder, ours)


if __name__ == "__main__":
    main()
