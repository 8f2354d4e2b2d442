"""Estimated time of a training step on machines that are not at hand, from the cost model.

Nothing here is measured. The time of a step is the sum of three estimates, and gradients are sent meanwhile:

    products      all matrix products, at `PRODUCTS` of the peak rate
    scan          scan, convolution and gate kernels, at `SCAN` times their lower bounds
    elementwise   norms, activations, casts and residuals, which move `ELEMENTWISE` bytes per token, channel
                  and block
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from arm_core.model.checks import near_match
from arm_core.model.cost import EMA_BYTES, OPTIMIZER_BYTES, StepMemory, cost_table, step_memory
from arm_core.model.spec import ModelSpec, PretrainSpec

PRODUCTS = 0.6
"""Fraction of the peak rate that matrix products reach."""
SCAN = 1.85
"""Time of a kernel relative to its lower bound."""
ELEMENTWISE = 400
"""Bytes per token, channel and block, with bfloat16 products and without compiled blocks; twice as many with
float32."""
GB = 10**9


@dataclass(frozen=True, kw_only=True)
class Machine:
    """One GPU of a kind, and its connections."""

    name: str
    products: float
    """Peak dense bfloat16 operations per second."""
    float32: float
    """The same for float32."""
    bandwidth: float
    """Bytes per second of its memory in a copy."""
    scan: Mapping[int, float]
    """Lower bound of scan, convolution and gate, forward and backward, in seconds per token, channel and
    direction; by the number of directions."""
    memory: int | None
    """Bytes; None for a Mac, which exists with several sizes."""
    links: Mapping[int, float]
    """Bytes per second around a ring, by the largest number of GPUs: inside a machine, then through the
    network cards of several machines."""


HOPPER_SCAN = {1: 28.9e-12, 4: 25.9e-12}
"""From the machine code, for 132 multiprocessors at 1.98 GHz (`python tests/cuda/cost.py`)."""
A100_SCAN = {k: seconds * (132 * 1.98) / (108 * 1.41) for k, seconds in HOPPER_SCAN.items()}
"""The same instructions on 108 multiprocessors at 1.41 GHz."""
APPLE_CYCLES = {1: 2000, 4: 1550}
"""Lane-cycles per token, channel and direction (lower bounds in docs/performance.md)."""


def _mac(name: str, cores: int, clock: float, bandwidth: float) -> Machine:
    """cores: of the GPU, each with 128 lanes.  clock: GHz.  bandwidth: GB/s."""
    lanes = cores * 128 * clock * 1e9
    return Machine(
        name=name,
        products=2 * lanes,
        float32=2 * lanes,
        bandwidth=bandwidth * GB,
        scan={k: cycles / lanes for k, cycles in APPLE_CYCLES.items()},
        memory=None,
        links={1: float("inf")},
    )


MACHINES = {
    machine.name: machine
    for machine in (
        Machine(
            name="h200", products=989e12, float32=67e12, bandwidth=4300 * GB, scan=HOPPER_SCAN,
            memory=141 * GB, links={8: 450e9, 512: 400e9},
        ),
        Machine(
            name="h100", products=989e12, float32=67e12, bandwidth=3000 * GB, scan=HOPPER_SCAN,
            memory=80 * GB, links={8: 450e9, 512: 400e9},
        ),
        Machine(
            name="a100", products=312e12, float32=19.5e12, bandwidth=1800 * GB, scan=A100_SCAN,
            memory=80 * GB, links={8: 300e9, 512: 200e9},
        ),
        _mac("m1", 8, 1.28, 68),
        _mac("m1-max", 32, 1.30, 400),
        _mac("m2", 10, 1.40, 100),
        _mac("m2-ultra", 76, 1.40, 800),
        _mac("m3", 10, 1.4, 100),
        _mac("m3-max", 40, 1.4, 400),
        _mac("m4", 10, 1.6, 120),
        _mac("m4-max", 40, 1.6, 546),
        _mac("m5", 10, 1.6, 153),
    )
}  # fmt: skip
"""Known machines. GPUs of NVIDIA are the SXM cards with 141, 80 and 80 GB, eight in a machine; bandwidths are
about 90 % of the data sheets'. Clocks of Macs from the M3 on are estimates."""


def parse_machines(text: str) -> tuple[Machine, int]:
    """`h200:8` is eight H200, `m4-max` one M4 Max. Raises ValueError for unknown ones and invalid numbers."""
    name, _, number = text.partition(":")
    if name not in MACHINES:
        raise ValueError(f"unknown machine {name!r}{near_match(name, MACHINES)}")
    machine, most = MACHINES[name], max(MACHINES[name].links)
    if not (number or "1").isdecimal() or not 1 <= int(number or 1) <= most:
        raise ValueError(f"{text}: expected {name} or {name}:N with N from 1 to {most}")
    return machine, int(number or 1)


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """An update on `count` GPUs; times in seconds."""

    accumulation: int
    """Micro-batches per update; at least one for each GPU."""
    micro_batch: int
    products: float
    scan: float
    elementwise: float
    sending: float
    """Gradients, during the backward pass."""
    sent: float
    """Bytes that each GPU sends."""
    memory: StepMemory

    @property
    def computing(self) -> float:
        return self.products + self.scan + self.elementwise

    @property
    def seconds(self) -> float:
        return max(self.computing, self.sending)


def estimate(
    spec: ModelSpec,
    machine: Machine,
    count: int,
    *,
    batch_size: int,
    accumulation: int,
    average: bool,
    bfloat16: bool = True,
    recompute: bool = False,
    shard: bool = False,
) -> Estimate:
    """The time and memory of an update of `batch_size` images.

    Raises ValueError if the images cannot be shared equally by `count` GPUs.
    """
    ways = range(max(accumulation, count), batch_size + 1)
    if not (accumulation := next((n for n in ways if batch_size % n == 0), 0)):
        raise ValueError(f"an update has {batch_size} images, too few for {count} GPUs; use fewer")
    parameters = sum(part.parameters for part in cost_table(spec))
    sent = 2 * 4 * parameters * (count - 1) / count  # float32, reduced and distributed in a ring
    products, scan, elementwise = (
        batch_size / count * seconds for seconds in image_seconds(spec, machine, bfloat16=bfloat16)
    )
    return Estimate(
        accumulation=accumulation,
        micro_batch=batch_size // accumulation,
        products=products,
        scan=scan,
        elementwise=elementwise,
        sending=sent / next(speed for most, speed in machine.links.items() if count <= most),
        sent=sent,
        memory=step_memory(
            spec,
            value_bytes=2 if bfloat16 else 4,
            average=average,
            recompute=recompute,
            shards=count if shard else 1,
        ),
    )


def state_bytes(spec: ModelSpec, *, average: bool) -> int:
    """Weights, gradients, moments and average of the trainable values."""
    each = OPTIMIZER_BYTES + (EMA_BYTES if average else 0)
    return each * sum(part.parameters for part in cost_table(spec))


def image_seconds(spec: ModelSpec, machine: Machine, *, bfloat16: bool = True) -> tuple[float, float, float]:
    """Seconds of one GPU per image in a training step: products, scan, elementwise."""
    parts = {part.name: part.multiply_adds for part in cost_table(spec)}
    scanned = ("mixer scan", "mixer convolution")
    operations = 6 * sum(n for name, n in parts.items() if name not in scanned)  # twice as many backward
    peak = machine.products if bfloat16 else machine.float32
    values = spec.tokens * spec.encoder.width * spec.encoder.depth
    floor = machine.scan.get(spec.directions, machine.scan[4])
    scan = SCAN * floor * spec.directions * values
    if isinstance(spec, PretrainSpec):
        values += spec.tokens * spec.decoder_width * spec.decoder_depth
    moved = (1 if bfloat16 else 2) * ELEMENTWISE * values
    return operations / (PRODUCTS * peak), scan, moved / machine.bandwidth
