"""Times the scans of the torch engine: `arm_core.engine.scan_timing.ScanTimer`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from arm_core.engine.scan_timing import BY_TOKEN, ScanShape, ScanTimes, repeat
from arm_core.engine.scans import choose_scan
from arm_cuda.devices import device_name, resolve_device
from arm_cuda.scan import scans, selective_scan

COPIED = 2**28
"""Bytes of the array that is copied to measure the rate."""


class TorchScanTimer:
    """device: `cpu`, `cuda` or `cuda:N`; `auto` is the first GPU, or the CPU without one."""

    def __init__(self, device: str) -> None:
        self._device = resolve_device(device)
        self.device = device_name(self._device)

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def copy_rate(self) -> float:
        array = torch.zeros(COPIED // 4, device=self._device)
        other = torch.empty_like(array)

        def copy() -> None:
            other.copy_(array)
            self._wait()

        return 2 * COPIED / min(repeat(copy, 10))

    def time(self, shape: ScanShape, scan: str, *, repeats: int) -> ScanTimes:
        scan = choose_scan(scans(str(self._device)), scan)
        inputs = {name: torch.from_numpy(a).to(self._device) for name, a in shape.arrays().items()}
        if shape.bfloat16:
            inputs |= {name: inputs[name].bfloat16() for name in BY_TOKEN}
        order = torch.from_numpy(shape.order()).to(self._device)
        run: Callable[..., Tensor] = partial(selective_scan, impl=scan)
        leaves = [a.requires_grad_() for a in inputs.values()]
        grad = torch.ones_like(inputs["z"])

        def forward() -> None:
            with torch.no_grad():
                run(*leaves, order)
            self._wait()

        def both() -> None:
            torch.autograd.grad(run(*leaves, order), leaves, grad)
            self._wait()

        return ScanTimes(forward=repeat(forward, repeats), both=repeat(both, repeats))

    def tune(self, shape: ScanShape, *, repeats: int) -> Iterator[tuple[str, ScanTimes]]:
        raise ValueError("backend 'torch' has no constants to search; --tune is for the scan 'metal' of MLX")
