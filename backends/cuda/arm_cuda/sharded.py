"""The placement of a model whose tensors are sharded over the ranks, by FSDP2."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from arm_cuda.distributed import Forward, Placement


class Sharded(Placement):
    """Every rank holds a shard of each tensor; a block is gathered while it computes."""

    def wrap(self, model: nn.Module, forward: Forward, device: torch.device) -> Forward:
        mesh = init_device_mesh(device.type, (self.ranks.world,))
        blocks = [block for name in ("layers", "decoder") for block in getattr(model, name, ())]
        for module in (*blocks, model):
            # The root reshards after its forward pass too: weights can change before the next one.
            fully_shard(module, mesh=mesh, reshard_after_forward=True, shard_placement_fn=self._axis)
        assert isinstance(model, FSDPModule)
        self._model = model
        return model

    def _axis(self, parameter: nn.Parameter) -> Shard:
        """The first axis that divides evenly: a leading direction axis has only 1 to 4 entries."""
        sizes = [size for size in parameter.shape if size % self.ranks.world == 0]
        return Shard(list(parameter.shape).index(sizes[0]) if sizes else 0)

    def passes(self, own: int, total: int) -> int:
        return -(-total // self.ranks.world)  # all ranks take part in gathering the weights

    @contextmanager
    def accumulating(self, last: bool) -> Iterator[None]:
        self._model.set_requires_gradient_sync(last)
        yield

    def local(self, tensor: Tensor) -> Tensor:
        assert isinstance(tensor, DTensor)
        return tensor.to_local()

    def part(self, whole: Tensor, parameter: Tensor) -> Tensor:
        assert isinstance(parameter, DTensor)
        mesh, placements = parameter.device_mesh, parameter.placements
        # No rank broadcasts: each takes its shard from its own copy.
        return distribute_tensor(whole, mesh, placements, src_data_rank=None).to_local()

    def whole(self, part: Tensor, parameter: Tensor) -> Tensor:
        assert isinstance(parameter, DTensor)
        mesh, placements = parameter.device_mesh, parameter.placements
        shape, stride = parameter.shape, parameter.stride()
        return DTensor.from_local(part, mesh, placements, shape=shape, stride=stride).full_tensor()

    def totals(self, loss: Tensor, squares: Tensor) -> tuple[Tensor, Tensor]:
        both = torch.stack([loss, squares])
        dist.all_reduce(both)
        return both[0], both[1]
