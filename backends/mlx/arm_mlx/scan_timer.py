"""Times the scans of the MLX engine: `arm_core.engine.scan_timing.ScanTimer`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import date
from importlib.metadata import version
from typing import Any

import mlx.core as mx

from arm_core.engine.scan_timing import BY_TOKEN, ScanShape, ScanTimes, repeat
from arm_core.engine.scans import choose_scan
from arm_mlx.devices import device_name, resolve_device
from arm_mlx.metal.operators import architecture, scan_function
from arm_mlx.metal.tuning import candidates
from arm_mlx.scan import scans, selective_scan

AT_ONCE = 8
"""Scans that are submitted to a GPU together, so that the start of one does not count."""
COPIED = 2**28
"""Bytes of the array that is copied to measure the rate."""

Scan = Callable[..., mx.array]


class MlxScanTimer:
    """device: `cpu` or `gpu`; `auto` is the Apple GPU, or the CPU without one."""

    def __init__(self, device: str) -> None:
        self._device = resolve_device(device)
        self._gpu = self._device.type == mx.gpu
        self.device = device_name(self._device)

    def copy_rate(self) -> float:
        with mx.stream(self._device):
            array = mx.zeros((COPIED // 4,))
            mx.eval(array)
            seconds = min(repeat(lambda: mx.eval(array + 1.0), 10))
        return 2 * COPIED / seconds

    def time(self, shape: ScanShape, scan: str, *, repeats: int) -> ScanTimes:
        scan = choose_scan(scans("gpu" if self._gpu else "cpu"), scan)
        return self.time_function(
            shape,
            lambda *inputs: selective_scan(*inputs, impl=scan, save_for_backward=False),
            lambda *inputs: selective_scan(*inputs, impl=scan),
            repeats=repeats,
        )

    def time_function(self, shape: ScanShape, inference: Scan, training: Scan, *, repeats: int) -> ScanTimes:
        """Times of two functions of the operands of `selective_scan`; the second includes its gradients."""
        at_once = AT_ONCE if self._gpu else 1
        with mx.stream(self._device):
            dtype = mx.bfloat16 if shape.bfloat16 else mx.float32
            operands = {name: mx.array(array) for name, array in shape.arrays().items()}
            operands |= {name: operands[name].astype(dtype) for name in BY_TOKEN}
            inputs, order = list(operands.values()), mx.array(shape.order())
            grad = mx.ones_like(operands["z"])
            mx.eval(inputs, order, grad)

            def forward() -> None:
                mx.eval([inference(*inputs, order) for _ in range(at_once)])

            def both() -> None:
                mx.eval([mx.vjp(lambda *a: training(*a, order), inputs, [grad]) for _ in range(at_once)])

            times = [[t / at_once for t in repeat(run, repeats)] for run in (forward, both)]
        return ScanTimes(forward=times[0], both=times[1])

    def tune(self, shape: ScanShape, *, repeats: int) -> Iterator[tuple[str, ScanTimes]]:
        choose_scan(scans("gpu" if self._gpu else "cpu"), "metal")
        chosen_by = f"{self.device}, mlx {version('mlx')}, {date.today().isoformat()}"
        for tuning in candidates(shape.sizes[-1]):
            function = scan_function(tuning)

            def scan(*inputs: Any, function: Any = function) -> mx.array:
                result: mx.array = function(*inputs)[0]
                return result

            times = self.time_function(shape, scan, scan, repeats=repeats)
            yield f'"{architecture()}": {{{tuning.states}: {replace(tuning, chosen_by=chosen_by)}}},', times
