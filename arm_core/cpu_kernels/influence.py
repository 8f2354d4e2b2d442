"""Kernel of the influence maps; see `arm_core.cpu_kernels.influence` for its use.

One task is one direction and `CHANNELS` channels. Lanes are source tokens: a channel keeps the decay from
every earlier step to the current one, N values per step, in the first-level cache, and adds its part of one
row of the map at each step. Per-step inputs are in scan order, with the steps last and padded with zeros.
"""

# Compiled code has no Python types: Numba finds them from the arrays of the first call.
# mypy: disallow-untyped-defs=False, disallow-untyped-calls=False
# mypy: disable-error-code="call-arg,var-annotated"

from __future__ import annotations

import numba as nb

from arm_core.cpu_kernels.functions import F4, KERNEL, LOG2E, TASK, exp2, vectors
from arm_core.cpu_kernels.simd import LANES, at_least, fill, fma, load, store

HELPERS = "26083f01e77a"
"""Digest of `functions.py` and `simd.py`: Numba's cache checks this file only."""

CHANNELS = 64
"""Channels of a task; fixed, so that sums are added in the same order on any number of threads."""
FLOOR = F4(2.0**-60)
"""Smallest decay that is kept: products of two such numbers are not subnormal, which would be slow."""


@nb.njit(**TASK)
def _influence_task(k, first, last, length, x, dt, opening, weight, A, B, C, D, q, ramp, part):
    count, width = A.shape[2], weight.shape[2]
    blocks = (length + LANES - 1) // LANES
    size = blocks * LANES
    decay = vectors(count * blocks).reshape((count, size))  # of one step
    kept = vectors(count * blocks).reshape((count, size))  # from each earlier step to this one
    reach = vectors(width * blocks).reshape((width, size))  # from a token to the step `j` after it
    row = vectors(blocks + 1).reshape((size + LANES,))  # G(t, i) for all i
    for t in range(length):
        for s in range(0, size, LANES):
            store(part, (t, s), fill(F4(0.0)))
    for d in range(first, last):
        for n in range(count):
            rate = A[k, d, n] * LOG2E
            for s in range(0, size, LANES):
                store(decay, (n, s), at_least(exp2(load(dt, (k, d, s)) * rate), FLOOR))
                store(kept, (n, s), fill(F4(1.0)))
        for j in range(width):
            w = weight[k, d, width - 1 - j]
            for s in range(0, size, LANES):
                store(reach, (j, s), load(opening, (k, d, s + j)) * load(x, (k, d, s)) * w)
        for s in range(0, size + LANES, LANES):
            store(row, (s,), fill(F4(0.0)))
        skip = D[k, d]
        for t in range(length):
            present = t // LANES * LANES
            for s in range(0, present, LANES):
                total = fill(F4(0.0))
                for n in range(count):
                    left = at_least(load(kept, (n, s)) * decay[n, t], FLOOR)
                    store(kept, (n, s), left)
                    total = fma(left * C[k, t, n], load(B, (k, n, s)), total)
                store(row, (s,), total * load(dt, (k, d, s)))
            # The block of the current step: lanes before t decay, and lanes after t contribute nothing.
            before, until = load(ramp, (size - t + present,)), load(ramp, (size - t - 1 + present,))
            stay = fill(F4(1.0)) - before
            total = fill(F4(0.0))
            for n in range(count):
                factor = fma(before, decay[n, t], stay)
                left = at_least(load(kept, (n, present)) * factor, FLOOR)
                store(kept, (n, present), left)
                total = fma(left * C[k, t, n], load(B, (k, n, present)), total)
            total = total * load(dt, (k, d, present)) * until
            store(row, (present,), fma(until - before, skip, total))
            for s in range(0, present + 1, LANES):
                given = load(row, (s,)) * load(reach, (0, s))
                for j in range(1, width):
                    given = fma(load(row, (s + j,)), load(reach, (j, s)), given)
                store(part, (t, s), fma(given, q[k, d, t], load(part, (t, s))))


@nb.njit(**KERNEL)
def influence(length, x, dt, opening, weight, A, B, C, D, q, ramp, parts):
    """parts (K, tasks, L, padded L): [k, :, t, s] is to be summed over the tasks; steps in scan order."""
    directions, tasks = parts.shape[:2]
    channels = A.shape[1]
    for task in nb.prange(directions * tasks):
        k, block = task // tasks, task % tasks
        first = block * CHANNELS
        last = min(first + CHANNELS, channels)
        part = parts[k, block]
        _influence_task(k, first, last, length, x, dt, opening, weight, A, B, C, D, q, ramp, part)
