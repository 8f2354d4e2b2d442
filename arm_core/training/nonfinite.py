"""The first tensor of a training step that is not finite."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from arm_core.engine.protocol import Array, Batch, Engine, TrainingState
from arm_core.engine.ranks import ALONE, Ranks, agree
from arm_core.model.parameters import parameter_table
from arm_core.model.spec import ModelSpec

FORWARD = (
    "tokens",
    "layers",
    "norm_f",
    "features",
    "logits",
    "taps_to_decoder",
    "decoder_input",
    "queries",
    "decoder",
    "prediction",
    "loss_per_token",
    "loss",
)
"""Names of the tensors of a forward pass, in the order of the computation."""
SHOWN = 5
"""Images of a failed step that the message lists."""


class NonFiniteError(ArithmeticError):
    """Training stopped at an infinity or NaN; the run keeps its last checkpoint.

    step: the first update that failed.  tensor: description of the first non-finite tensor, None if none was
    found.  images: names of the images of the step.  checkpoint: the newest one, None if there is none.
    """

    def __init__(
        self,
        step: int,
        what: str,
        tensor: str | None,
        images: Sequence[str],
        checkpoint: Path | None,
        resume: str,
    ) -> None:
        self.step, self.tensor, self.images, self.checkpoint = step, tensor, tuple(images), checkpoint
        first = f"the first non-finite tensor is {tensor}" if tensor else "a repetition gave finite tensors"
        more = f" and {len(images) - SHOWN} more" if len(images) > SHOWN else ""
        files = f" Images of the step: {', '.join(images[:SHOWN])}{more}." if images else ""
        advice = (
            f"Try a lower learning rate, clipping or float32: {resume} --set schedule.base_lr=... "
            "--set optimizer.clip=1 --set training.precision=float32"
        )
        if checkpoint is None:
            kept, advice = "There is no checkpoint.", advice.replace(resume, "in a new run")
        else:
            kept = f"The last checkpoint is {checkpoint}."
        super().__init__(f"step {step}: {what}; {first}.{files} {kept} {advice}")


def first_non_finite(engine: Engine, batches: Sequence[Batch], ranks: Ranks = ALONE) -> str | None:
    """The first non-finite tensor of a training step: weights, forward pass or gradients. Images are finite.

    Checks in the order of the computation, which is repeated with the engine's current weights. The order
    does not depend on the engine. Each rank checks its own batches; all get the first result of any rank.
    """
    rounds = max(ranks.gather(len(batches)))
    batches = [*batches, *[batches[-1]] * (rounds - len(batches))]  # all ranks take part in each pass
    for look in (_bad_weight, _bad_activation, _bad_gradient):
        if name := agree(ranks, look(engine, batches)):
            return name
    return None


def _bad_weight(engine: Engine, batches: Sequence[Batch]) -> str | None:
    parameters = engine.export_state().parameters  # on rank 0 only
    name = first_bad({name: parameters[name] for name in parameter_table(engine.spec) if parameters})
    return name and f"{name} (a weight)"


def _bad_activation(engine: Engine, batches: Sequence[Batch]) -> str | None:
    name = None
    for batch in batches:  # all of them, as the other ranks do
        outputs = engine.forward(batch.images, intermediates=True)
        found = first_bad(dict(sorted(outputs.items(), key=lambda item: _moment(item[0], engine.spec))))
        name = name or found
    return name and f"{name} (forward pass)"


def _bad_gradient(engine: Engine, batches: Sequence[Batch]) -> str | None:
    words = None
    for batch in batches:
        loss, gradients = engine.loss_and_gradients(batch)
        if not np.isfinite(loss):
            found: str | None = "the training loss (the forward pass without drop path is finite)"
        else:  # gradients are computed from the end of the table to its start
            name = first_bad(
                {
                    name: gradients[name]
                    for name in reversed(parameter_table(engine.spec))
                    if name in gradients
                }
            )
            found = name and f"{name} (gradient)"
        words = words or found
    return words


def _moment(name: str, spec: ModelSpec) -> tuple[int, int, int]:
    """Position of a tensor in the forward pass, for sorting (`arm_core.model.reference.model`)."""
    stem, _, rest = name.partition(".")
    number, _, part = rest.partition(".")
    stage = FORWARD.index(stem) if stem in FORWARD else len(FORWARD)
    return stage, int(number) if number.isdigit() else 0, 0 if part else 1


def first_bad_state(state: TrainingState) -> str | None:
    """Description of the first tensor of a training state that is not finite."""
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
    """Name of the first array that is not finite."""
    return next((name for name, array in arrays.items() if not np.isfinite(array).all()), None)
