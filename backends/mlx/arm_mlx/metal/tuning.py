"""How the scan's kernels divide their work: one table, by GPU and number of states.

`arm bench scan --tune` measures the alternatives on a machine and prints the entry to add here.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

MAX_THREADS = 256
"""Per threadgroup; every Apple GPU allows this for kernels with this many registers."""
MAX_THREADGROUP_BYTES = 32768
MAX_OWN_VALUES = 96
"""States and decays that the backward pass may keep in a lane's 128 or so registers."""
SIMD = 32
CONV_TURNS = 8
"""A thread of the convolution computes this many times W steps; the backward pass repeats W - 1 of them."""
STATES = (1, 2, 4, 8, 16, 32, 64)
"""State sizes that the reductions take: powers of two."""


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """Constants of the scan's kernels. Raises ValueError if inconsistent or beyond a GPU's limits."""

    states: int
    lanes: int
    """Neighbouring lanes that share a channel's states: 1, 2 or 4."""
    simdgroups: int
    """SIMD groups of 32 lanes in a threadgroup, at most; narrow models take fewer."""
    chunk: int
    """Tokens between saved states, which the backward pass recomputes; a multiple of lanes."""
    keep_decays: bool = False
    """Whether the backward pass keeps a chunk's exponentials in registers or computes them twice."""
    chosen_by: str = "arithmetic"
    """Machine, MLX version and date of the measurement, or the basis of an estimate."""

    def __post_init__(self) -> None:
        if self.states not in STATES:
            raise ValueError(
                f"scan 'metal': expected a state size of {', '.join(map(str, STATES[:-1]))} or {STATES[-1]}, "
                f"found {self.states}; choose another, or --scan reference"
            )
        if self.lanes not in (1, 2, 4) or self.states % self.lanes or self.chunk % self.lanes:
            raise ValueError(
                f"scan 'metal': expected 1, 2 or 4 lanes that divide {self.states} states and chunks of "
                f"{self.chunk} tokens, found {self.lanes}"
            )
        if min(self.chunk, self.simdgroups) < 1:
            raise ValueError(f"scan 'metal': expected tuning constants of 1 or more, found {self}")
        if (threads := SIMD * self.simdgroups) > MAX_THREADS:
            raise ValueError(
                f"scan 'metal': expected at most {MAX_THREADS} threads in a threadgroup, found {threads}; "
                f"take at most {MAX_THREADS // SIMD} SIMD groups"
            )
        if self.threadgroup_bytes > MAX_THREADGROUP_BYTES:
            raise ValueError(
                f"scan 'metal': expected at most {MAX_THREADGROUP_BYTES} bytes of threadgroup memory, found "
                f"{self.threadgroup_bytes}; take fewer SIMD groups or a shorter chunk"
            )

    @property
    def threadgroup_bytes(self) -> int:
        """Bytes in the backward kernel: sums of dB and dC by SIMD group and token."""
        return self.simdgroups * self.chunk * 2 * self.states * 4


UNMEASURED = "instruction counts; not yet measured on a Mac"

TABLE: dict[str, dict[int, Tuning]] = {
    "any": {
        **{n: Tuning(states=n, lanes=n, simdgroups=8, chunk=8, chosen_by=UNMEASURED) for n in (1, 2, 4)},
        8: Tuning(states=8, lanes=4, simdgroups=8, chunk=8, chosen_by=UNMEASURED),
        16: Tuning(states=16, lanes=4, simdgroups=8, chunk=8, chosen_by=UNMEASURED),
        # Four states per lane and eight kept tokens fit the registers; with more states, keep fewer tokens.
        32: Tuning(states=32, lanes=4, simdgroups=8, chunk=4, chosen_by=UNMEASURED),
        64: Tuning(states=64, lanes=4, simdgroups=4, chunk=4, chosen_by=UNMEASURED),
    },
}
"""By `mx.device_info(mx.gpu)["architecture"]`, such as applegpu_g13g; `any` for GPUs without an entry."""


def tuning_for(states: int, architecture: str) -> Tuning:
    """The entry for this GPU, or the entry `any`. Raises ValueError on a state size without an entry."""
    for name in (architecture, "any"):
        if states in TABLE.get(name, {}):
            return TABLE[name][states]
    return Tuning(states=states, lanes=4, simdgroups=8, chunk=8)  # raises an error that lists the choices


def candidates(states: int) -> Iterator[Tuning]:
    """All constants for this number of states that are within the limits."""
    choices = itertools.product((1, 2, 4), (1, 2, 4, 8), (4, 8, 16), (False, True))
    for lanes, simdgroups, chunk, keep_decays in choices:
        # A lane cannot keep more values in registers, so compiling is not worth the time.
        own = states // lanes * (chunk + 1) * (1 + keep_decays)
        if states % lanes == 0 and own <= MAX_OWN_VALUES:
            try:
                yield Tuning(
                    states=states, lanes=lanes, simdgroups=simdgroups, chunk=chunk, keep_decays=keep_decays
                )
            except ValueError:
                continue  # beyond a limit
