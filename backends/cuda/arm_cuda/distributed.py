"""Several processes that train one model: joining the job, and placing the tensors of the model.

`join` reads the job from the environment that `torchrun` sets. A `Placement` defines how the tensors of an
engine relate to those of the other ranks: one process, replicated (DistributedDataParallel) or sharded
(FSDP2, in `arm_cuda.sharded`). NCCL transfers tensors of GPUs, gloo those of CPUs and everything that
`Ranks.gather` exchanges.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from arm_core.engine.ranks import ALONE, Alone, PeerFailed, Ranks
from arm_cuda.devices import local_device

Forward = Callable[..., dict[str, Tensor]]

_KEPT: list[Any] = []
"""Keeps the process group until the interpreter exits. If DistributedDataParallel released it last, it
would join its threads while it holds the lock that they wait for."""


@dataclass(frozen=True)
class TorchRanks:
    """A job of several processes; see `arm_core.engine.ranks.Ranks`."""

    rank: int
    world: int
    restarts: int

    def gather(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self.world
        with raising_peer_failures(self):
            dist.all_gather_object(values, value)
        return values

    def close(self) -> None:
        # No rank leaves while another waits for an answer, nor while gloo's threads hold tensors of Python:
        # a thread that releases one while the interpreter ends aborts the process. A barrier has no tensors.
        # The pause lets the threads take the interpreter's lock for the release of earlier ones.
        dist.barrier()
        time.sleep(0.2)
        dist.destroy_process_group()


def join(device: str) -> Ranks:
    """The job that `torchrun` describes in the environment; ALONE without one."""
    names = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    given = {name: os.environ[name] for name in names if name in os.environ}
    restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    if given.get("WORLD_SIZE", "1") == "1":
        return Alone(restarts=restarts) if restarts else ALONE
    if missing := [name for name in names if name not in given]:
        raise ValueError(
            f"WORLD_SIZE is {given['WORLD_SIZE']}, but {', '.join(missing)} not set; start with torchrun"
        )
    rank, world = int(given["RANK"]), int(given["WORLD_SIZE"])
    chosen = local_device(device)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    try:
        store, _, _ = next(rendezvous("env://"))
        if os.environ.get("LOCAL_WORLD_SIZE") == given["WORLD_SIZE"]:
            # torchrun keeps the store across restarts, with the addresses of processes that have ended.
            # On several machines the restart counts differ: see docs/scaling.md.
            store = dist.PrefixStore(f"start {restarts}", store)  # type: ignore[attr-defined]
        talk = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
        dist.init_process_group(talk, store=store, rank=rank, world_size=world)
        _KEPT.append(dist.group.WORLD)
        restarts = max(TorchRanks(rank, world, restarts).gather(restarts))
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"{world} processes cannot connect to {given['MASTER_ADDR']}:{given['MASTER_PORT']} "
            f"({reason[:300]})"
        ) from error
    return TorchRanks(rank, world, restarts)


@contextmanager
def raising_peer_failures(ranks: Ranks) -> Iterator[None]:
    """Raise errors of the communication libraries about another process as PeerFailed."""
    try:
        yield
    except RuntimeError as error:
        if ranks.world == 1 or not _about_a_peer(error):
            raise
        reason = str(error).strip().splitlines()[0]
        raise PeerFailed(f"another process of this job has ended ({reason[:200]})") from error


def _about_a_peer(error: RuntimeError) -> bool:
    signs = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer")
    return isinstance(error, dist.DistError) or any(sign in str(error) for sign in signs)


class Placement:
    """One process, which holds every tensor."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks

    def wrap(self, model: nn.Module, forward: Forward, device: torch.device) -> Forward:
        """The function that runs a forward pass with gradients."""
        return forward

    def passes(self, own: int, total: int) -> int:
        """The number of passes that this rank makes; `own` of the `total` micro-batches are its own."""
        return own

    def accumulating(self, last: bool) -> AbstractContextManager[None]:
        """Context of one forward and backward pass; gradients are reduced over the ranks in the last one."""
        return nullcontext()

    def local(self, tensor: Tensor) -> Tensor:
        """This rank's part of a parameter or of its gradient, sharing memory."""
        return tensor

    def part(self, whole: Tensor, parameter: Tensor) -> Tensor:
        """This rank's part of a tensor shaped like a whole parameter."""
        return whole

    def whole(self, part: Tensor, parameter: Tensor) -> Tensor:
        """The whole tensor, from the parts of all ranks."""
        return part

    def totals(self, loss: Tensor, squares: Tensor) -> tuple[Tensor, Tensor]:
        """The loss over all ranks, from this rank's share, and the sum of squares over all parts."""
        return loss, squares


class Replicated(Placement):
    """Every rank holds the model; gradients are averaged during the backward pass."""

    def wrap(self, model: nn.Module, forward: Forward, device: torch.device) -> Forward:
        model.forward = forward
        # The token order tables are the same on all ranks; without this, each pass would broadcast them.
        tables = [name for name, _ in model.named_buffers()]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, tables)
        self._parallel = DistributedDataParallel(
            model,
            device_ids=None if device.type == "cpu" else [device],
            gradient_as_bucket_view=True,
            init_sync=False,  # all ranks load the same weights
        )
        return self._parallel

    def accumulating(self, last: bool) -> AbstractContextManager[None]:
        return nullcontext() if last else self._parallel.no_sync()

    def totals(self, loss: Tensor, squares: Tensor) -> tuple[Tensor, Tensor]:
        dist.all_reduce(loss)
        return loss, squares


def choose_placement(ranks: Ranks, *, shard: bool) -> Placement:
    """How the tensors of an engine relate to those of the other ranks."""
    if ranks.world == 1:
        if shard:
            raise ValueError("--shard needs several processes; start them with torchrun")
        return Placement(ranks)
    if not shard:
        return Replicated(ranks)
    from arm_cuda.sharded import Sharded  # FSDP2 takes a second to import

    return Sharded(ranks)
