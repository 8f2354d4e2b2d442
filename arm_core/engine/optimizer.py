"""AdamW settings and parameter groups: which tensor gets which learning-rate scale and decay."""

from __future__ import annotations

from dataclasses import dataclass

from arm_core.model.checks import NOT_NEGATIVE, PART, POSITIVE, Range, check_ranges
from arm_core.model.parameters import parameter_table
from arm_core.model.spec import ModelSpec

CLIP_EPS = 1e-6
"""Added to the gradient norm before dividing, as torch's `clip_grad_norm_` does."""


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """AdamW (arXiv:1711.05101) with decoupled decay, bias correction, clipping and EMA.

    With g clipped, m and v the running moments and t the step from 1:

        p <- p (1 - lr s wd);   p <- p - lr s / (1 - b1^t) * m / (sqrt(v / (1 - b2^t)) + eps)

    s is the layer's scale, wd is 0 for tensors without decay.
    """

    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the first and second moments, b1 and b2."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.05
    """Decoupled weight decay, wd."""
    clip: float | None = None
    """Largest gradient norm; None for no clipping."""
    layer_decay: float = 1.0
    """Learning rate of layer i is scaled by layer_decay^(depth + 1 - i); 0 trains only last norm and head."""
    ema_decay: float | None = None
    """Decay of the exponential moving average of the weights; None keeps none."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", tuple(self.betas))
        if len(self.betas) != 2:
            raise ValueError(f"optimizer.betas: expected two numbers, found {self.betas}")
        check_ranges(
            "optimizer",
            self,
            betas=Range(low=0, below=1),
            eps=POSITIVE,
            weight_decay=NOT_NEGATIVE,
            clip=POSITIVE,
            layer_decay=PART,
            ema_decay=Range(above=0, below=1),
        )


def required(settings: OptimizerSettings | None) -> OptimizerSettings:
    """The settings of an engine that trains; ValueError if it has none."""
    if settings is None:
        raise ValueError("this engine is for inference; pass optimizer to create_engine to train")
    return settings


@dataclass(frozen=True, kw_only=True)
class ParameterGroup:
    """Trainable tensors that share a learning-rate scale and a weight decay."""

    lr_scale: float
    weight_decay: float
    names: tuple[str, ...]


def parameter_groups(spec: ModelSpec, settings: OptimizerSettings) -> list[ParameterGroup]:
    """All trainable tensors, each in one group, groups and names in the order of the table."""
    last = spec.encoder.depth + 1
    groups: dict[tuple[float, float], list[str]] = {}
    for name, row in parameter_table(spec).items():
        if row.trainable:
            scale = settings.layer_decay ** (last - row.layer)
            groups.setdefault((scale, settings.weight_decay if row.decay else 0.0), []).append(name)
    return [ParameterGroup(lr_scale=s, weight_decay=w, names=tuple(n)) for (s, w), n in groups.items()]
