"""Several processes that train one model: `mx.distributed` as the core's ranks.

    mlx.launch -n 2 --backend ring -- $(which arm) pretrain tiny --backend mlx

Each process holds the whole model and computes its own micro-batches; their gradients are added up in a few
large pieces, and every process then makes the same update.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import numpy as np

from arm_core.engine.ranks import ALONE, PeerFailed, Ranks

PIECE = 8 << 20
"""Numbers that are sent together: fewer, larger messages, at the price of copies of this size."""
LAUNCHED = ("MLX_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
"""What launchers leave in the environment: mlx.launch, and the usual ones of MPI."""


class MlxRanks:
    """Implements `arm_core.engine.ranks.Ranks` on an MLX group."""

    restarts = 0
    """`mlx.launch` starts no job again."""

    def __init__(self, group: mx.distributed.Group) -> None:
        self._group = group
        self.rank, self.world = int(group.rank()), int(group.size())
        self._failure: str | None = None

    def gather(self, value: Any) -> list[Any]:
        words = np.frombuffer(json.dumps(value).encode(), np.uint8)
        sizes = self._gather(np.array([words.size], np.int32))[:, 0]
        padded = np.zeros(sizes.max(), np.uint8)
        padded[: words.size] = words
        rows = self._gather(padded)
        return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]

    def _gather(self, row: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        with mx.stream(mx.cpu), self.raising_peer_failures():
            return np.array(mx.distributed.all_gather(mx.array(row)[None], group=self._group))

    def sum(self, arrays: Mapping[str, mx.array]) -> dict[str, mx.array]:
        """The float32 arrays added up over all ranks, bit for bit alike on each; nothing is evaluated."""
        found: dict[str, mx.array] = {}
        for names in pieces({name: array.size for name, array in arrays.items()}, PIECE):
            flat = mx.concatenate([arrays[name].reshape(-1) for name in names])
            flat = mx.distributed.all_sum(flat, group=self._group)
            ends = np.cumsum([arrays[name].size for name in names])
            parts = mx.split(flat, ends[:-1].tolist())
            found |= {n: part.reshape(arrays[n].shape) for n, part in zip(names, parts, strict=True)}
        return found

    @contextmanager
    def raising_peer_failures(self) -> Iterator[None]:
        """Around everything that may wait for other ranks: MLX's error about a connection as PeerFailed.

        The first loss is remembered, since MLX would wait for ever at the next message.
        """
        if self._failure is None:
            try:
                yield
                return
            except RuntimeError as error:
                if "[ring]" not in str(error):
                    raise
                self._failure = str(error)
        raise PeerFailed(f"another process of the job has ended ({self._failure})")

    def close(self) -> None:
        self.gather(None)  # the ring ends with the first process that leaves it


def pieces(sizes: Mapping[str, int], limit: int) -> Iterator[Sequence[str]]:
    """Names in their order, in groups of at most `limit` numbers; a larger array stands alone."""
    group: list[str] = []
    total = 0
    for name, size in sizes.items():
        if group and total + size > limit:
            yield group
            group, total = [], 0
        group.append(name)
        total += size
    if group:
        yield group


def join() -> Ranks:
    """The job that a launcher made this process a part of, else `ALONE`.

    Waits until all processes are there. Raises ValueError where the launcher's description is broken.
    """
    if not any(name in os.environ for name in LAUNCHED):
        return ALONE
    _check_environment()
    try:
        group = mx.distributed.init(strict=True)
    except RuntimeError as error:
        raise ValueError(
            f"the launcher's environment names a job, but MLX cannot join it: {error}"
        ) from error
    return MlxRanks(group) if group.size() > 1 else ALONE


def _check_environment() -> None:
    """What would make MLX wait for ever: a rank that the ring has no place for."""
    if "MLX_HOSTFILE" not in os.environ or "MLX_RANK" not in os.environ:
        return
    rank, path = os.environ["MLX_RANK"], os.environ["MLX_HOSTFILE"]
    try:
        with open(path, encoding="utf-8") as file:  # noqa: PTH123 (a path of the environment's)
            hosts = json.load(file)
    except (OSError, ValueError) as error:
        raise ValueError(f"MLX_HOSTFILE: expected a JSON file of addresses, found {path}: {error}") from None
    if not rank.isdigit() or int(rank) >= len(hosts):
        raise ValueError(f"MLX_RANK: expected a number below {len(hosts)}, found {rank!r}")
