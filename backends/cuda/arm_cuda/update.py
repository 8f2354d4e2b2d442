"""Clipping, AdamW and the moving average in torch: the formula of `OptimizerSettings`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from arm_core.engine.optimizer import CLIP_EPS, OptimizerSettings


@dataclass(frozen=True)
class Group:
    """The tensors of one parameter group, in lists of the same order for the fused update."""

    lr_scale: float
    weight_decay: float
    owners: list[Tensor]
    """The parameters that hold the gradients."""
    parameters: list[Tensor]
    """This rank's parts of them, without empty ones."""
    exp_avg: list[Tensor]
    exp_avg_sq: list[Tensor]


@torch.no_grad()
def update(
    groups: Sequence[Group],
    weights: Mapping[str, Tensor],
    ema: Mapping[str, Tensor],
    gradients: Sequence[list[Tensor]],
    *,
    loss: Tensor,
    norm: Tensor,
    step: int,
    lr: float,
    settings: OptimizerSettings,
) -> None:
    """One update in place, without waiting for the device; nothing changes if loss or norm is not finite.

    gradients: of each group's parameters, before clipping.  ema: averages of `weights`, by name.
    The fused update divides gradients by `grad_scale` and does nothing if `found_inf` is 1.
    """
    found_inf = (~torch.isfinite(loss + norm)).float()
    scale = torch.ones_like(norm)
    if settings.clip is not None:
        scale = torch.clamp((norm + CLIP_EPS) / settings.clip, min=1.0)
    for group, own in zip(groups, gradients, strict=True):
        if not group.parameters:
            continue
        # The update counts the step itself, hence step - 1.
        steps = torch.full((len(own),), step - 1.0, device=norm.device).unbind()
        adamw(
            group.parameters,
            own,
            group.exp_avg,
            group.exp_avg_sq,
            [],
            list(steps),
            fused=True,
            grad_scale=scale,
            found_inf=found_inf,
            amsgrad=False,
            beta1=settings.betas[0],
            beta2=settings.betas[1],
            lr=lr * group.lr_scale,
            weight_decay=group.weight_decay,
            eps=settings.eps,
            maximize=False,
        )
    if settings.ema_decay is not None:
        averages = list(ema.values())
        change = torch._foreach_sub([weights[name] for name in ema], averages)
        torch._foreach_mul_(change, (1.0 - settings.ema_decay) * (1.0 - found_inf))
        torch._foreach_add_(averages, change)


def sum_of_squares(gradients: Sequence[Tensor]) -> Tensor:
    """Over all elements; on a CPU by dot products, which use all threads and lose fewer digits."""
    if gradients[0].device.type != "cpu":
        return torch.stack(torch._foreach_norm(list(gradients))).square().sum()
    flat = [gradient.reshape(-1) for gradient in gradients]
    return torch.stack([torch.dot(g, g) for g in flat]).sum()
