"""Several processes that train one model: `mx.distributed` as the core's ranks.

    mlx.launch -n 2 --backend ring -- $(which arm) pretrain tiny --backend mlx

Each process holds the whole model and computes its own micro-batches; the gradients are summed in a few
large messages, and every process then makes the same update.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import mlx.core as mx
import numpy as np

from arm_core.engine.ranks import ALONE, PeerFailed, Ranks
from arm_mlx.watch import Watch, wait_limit

PIECE = 8 << 20
"""Values that are sent together: larger messages are fewer, but need copies of this size."""
MAX_TEXT = 1 << 24
"""Bytes of one value that is gathered."""
LAUNCHED = ("MLX_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
"""Environment variables of launchers: mlx.launch, and those of common MPI implementations."""


class MlxRanks:
    """Implements `arm_core.engine.ranks.Ranks` on an MLX group."""

    restarts = 0
    """`mlx.launch` does not restart jobs."""

    def __init__(self, group: mx.distributed.Group) -> None:
        self._group = group
        self.rank, self.world = int(group.rank()), int(group.size())
        self._failure: str | None = None
        self._exchanges = 0
        self._watch = Watch(wait_limit())

    def gather(self, value: Any) -> list[Any]:
        # After a lost connection MLX may return arbitrary bytes without an error. Messages are checked: the
        # header has the number of the exchange, the size and a checksum of the text.
        self._exchanges += 1
        text = json.dumps(value).encode()
        header = np.array([self._exchanges, len(text), zlib.crc32(text)], np.int64)
        headers = self._gather(header)
        sizes = headers[:, 1]
        if (headers[:, 0] != self._exchanges).any() or not ((sizes >= 0) & (sizes <= MAX_TEXT)).all():
            self._fail("an exchange of another process is invalid")
        padded = np.zeros(max(1, int(sizes.max())), np.uint8)
        padded[: len(text)] = np.frombuffer(text, np.uint8)
        texts = [row[:size].tobytes() for row, size in zip(self._gather(padded), sizes, strict=True)]
        if [zlib.crc32(found) for found in texts] != headers[:, 2].tolist():
            self._fail("a message of another process is invalid")
        return [json.loads(found) for found in texts]

    def _gather(self, row: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        with mx.stream(mx.cpu), self.raising_peer_failures():
            sent = mx.array(np.frombuffer(row.tobytes(), np.uint8))[None]
            found = mx.distributed.all_gather(sent, group=self._group)
            rows: np.ndarray[Any, Any] = np.array(found).view(row.dtype)
            return rows

    def _fail(self, reason: str) -> NoReturn:
        self._failure = self._failure or reason
        raise PeerFailed(f"another process of the job has ended ({self._failure})")

    def sum(self, arrays: Mapping[str, mx.array]) -> dict[str, mx.array]:
        """The float32 arrays summed over all ranks, with the same bits on each; not evaluated yet."""
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
        """Context for everything that may wait for other ranks: raises MLX's connection errors as PeerFailed.

        The first failure is remembered, since MLX would wait forever at the next message. The wait itself
        has a limit, see `Watch`.
        """
        if self._failure is None:
            try:
                with self._watch.waiting():
                    yield
                return
            except RuntimeError as error:
                if "[ring]" not in str(error):
                    raise
                self._failure = str(error)
        self._fail("")

    def close(self) -> None:
        self.gather(None)  # the ring ends with the first process that leaves it
        self._watch.close()


def pieces(sizes: Mapping[str, int], limit: int) -> Iterator[Sequence[str]]:
    """Names in their order, in groups of at most `limit` values; a larger array is a group by itself."""
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
    """The job to which a launcher assigned this process, otherwise `ALONE`.

    Waits until all processes have joined. Raises ValueError if the launcher's environment is invalid.
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
    """Refuse a rank outside the ring: MLX would wait for it forever."""
    if "MLX_HOSTFILE" not in os.environ or "MLX_RANK" not in os.environ:
        return
    rank, path = os.environ["MLX_RANK"], os.environ["MLX_HOSTFILE"]
    try:
        with open(path, encoding="utf-8") as file:  # noqa: PTH123 (a path from the environment)
            hosts = json.load(file)
    except (OSError, ValueError) as error:
        raise ValueError(f"MLX_HOSTFILE: expected a JSON file of addresses, found {path}: {error}") from None
    if not rank.isdigit() or int(rank) >= len(hosts):
        raise ValueError(f"MLX_RANK: expected a number below {len(hosts)}, found {rank!r}")
