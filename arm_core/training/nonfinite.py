"""When a loss is no number: which tensor was the first that went wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from arm_core.engine.protocol import Array, Batch, Engine, TrainingState
from arm_core.engine.ranks import ALONE, Ranks, agree


class NonFiniteError(ArithmeticError):
    """Training met an infinity or NaN and stopped; its run keeps the last good checkpoint.

    step: the first update that failed.  tensor: the first bad tensor in words, None if none was found.
    """

    def __init__(self, step: int, what: str, tensor: str | None, checkpoint: Path, resume: str) -> None:
        self.step, self.tensor, self.checkpoint = step, tensor, checkpoint
        first = f"the first non-finite tensor is {tensor}" if tensor else "repeating it gave finite tensors"
        super().__init__(
            f"step {step}: {what}; {first}. The last good checkpoint is {checkpoint}. Try a lower learning "
            f"rate, clipping or float32: {resume} --set schedule.base_lr=... --set optimizer.clip=1 "
            "--set training.precision=float32"
        )


def first_non_finite(engine: Engine, batches: Sequence[Batch], ranks: Ranks = ALONE) -> str | None:
    """Where infinities or NaNs begin in a training step: images, weights, forward pass or gradients.

    Looks in the order of the computation and repeats it with the engine's present weights. Each rank
    looks at its own batches, and all learn of the first tensor that one of them found.
    """
    rounds = max(ranks.gather(len(batches)))
    batches = [*batches, *[batches[-1]] * (rounds - len(batches))]  # all ranks take part in each pass
    for look in (_bad_images, _bad_weight, _bad_activation, _bad_gradient):
        if name := agree(ranks, look(engine, batches)):
            return name
    return None


def _bad_images(engine: Engine, batches: Sequence[Batch]) -> str | None:
    return first_bad({f"images of micro-batch {i}": b.images for i, b in enumerate(batches)})


def _bad_weight(engine: Engine, batches: Sequence[Batch]) -> str | None:
    name = first_bad(engine.export_state().parameters)
    return name and f"{name} (a weight)"


def _bad_activation(engine: Engine, batches: Sequence[Batch]) -> str | None:
    name = None
    for batch in batches:  # to the last one: so do the other ranks
        found = first_bad(engine.forward(batch.images, intermediates=True))
        name = name or found
    return name and f"{name} (forward pass)"


def _bad_gradient(engine: Engine, batches: Sequence[Batch]) -> str | None:
    words = None
    for batch in batches:
        loss, gradients = engine.loss_and_gradients(batch)
        if not np.isfinite(loss):
            found: str | None = "the training loss (the forward pass without drop path is finite)"
        else:  # gradients flow from the end of the table to its start
            name = first_bad(dict(reversed(gradients.items())))
            found = name and f"{name} (gradient)"
        words = words or found
    return words


def first_bad_state(state: TrainingState) -> str | None:
    """The first tensor of a training state that holds an infinity or NaN, in words."""
    kinds = {
        "weight": state.parameters,
        "first moment": state.exp_avg,
        "second moment": state.exp_avg_sq,
        "average": state.ema,
    }
    for kind, arrays in kinds.items():
        if name := first_bad(arrays):
            return f"{name} ({kind})"
    return None


def first_bad(arrays: Mapping[str, Array]) -> str | None:
    """Name of the first array with an infinity or NaN."""
    return next((name for name, array in arrays.items() if not np.isfinite(array).all()), None)
