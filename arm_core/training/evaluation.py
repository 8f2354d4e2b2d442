"""Exact evaluation: every image once, a smaller last batch if needed, sums in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np
import numpy.typing as npt

from arm_core.data.loader import EvalBatch
from arm_core.engine.protocol import Array, Engine
from arm_core.engine.ranks import ALONE, Ranks
from arm_core.model.spec import ClassifierSpec

TOP = 5
"""The k of `top5`; with fewer classes, all of them."""


BatchSums = tuple[int, int, int, float]
"""Of one batch: images, correct ones, correct ones among the first five, sum of the losses."""


class EvaluationStopped(Exception):  # noqa: N818
    """An evaluation ended early because `stop` requested it."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Means over `images` images."""

    images: int
    loss: float
    """Cross-entropy in nats, or the prediction error of a pretraining model."""
    top1: float | None = None
    """Fraction of images whose class has the highest probability; None in pretraining."""
    top5: float | None = None
    """Fraction of images whose class is among the five with the highest probability."""

    @property
    def score(self) -> float:
        """Score of a checkpoint, higher is better: top-1 accuracy, or minus the loss in pretraining."""
        return -self.loss if self.top1 is None else self.top1


def evaluate(
    engine: Engine,
    batches: Iterable[EvalBatch],
    *,
    seen: Callable[[int], None] | None = None,
    each: Callable[[EvalBatch, Array], None] | None = None,
    stop: Callable[[], bool] | None = None,
    ranks: Ranks = ALONE,
    rounds: int = 0,
    sums: list[BatchSums] | None = None,
) -> Evaluation:
    """Run the engine's model over `batches` (an `EvalLoader`).

    seen: called with the number of images of each batch.  each: called with each batch of a classifier and
    its logits, (B, classes).  stop: called before each batch, at the same points
    on all ranks; True ends the evaluation with EvaluationStopped.
    ranks: each passes its own batches and gets the result of all.  rounds: `EvalLoader.rounds`; a rank with
    fewer batches computes a dummy batch in the last round, since all ranks take part in a pass.
    sums: the batches of this rank that an earlier call has finished; `batches` begin after them. Receives an
    entry per batch.
    Raises ValueError if there are no images, or if an image of a classifier has no label.
    """
    classifier = isinstance(engine.spec, ClassifierSpec)
    own = [] if sums is None else sums
    for batch in batches:
        if stop is not None and stop():
            raise EvaluationStopped
        count = len(batch.images)
        outputs = engine.forward(batch.images)
        if classifier:
            _check_labels(batch, outputs["logits"].shape[1])
            loss = float(cross_entropy(outputs["logits"], batch.labels).sum())
            before = classes_before(outputs["logits"], batch.labels)
            own.append((count, int((before < 1).sum()), int((before < TOP).sum()), loss))
            if each is not None:
                each(batch, outputs["logits"])
        else:
            own.append((count, 0, 0, float(outputs["loss"]) * count))
        if seen is not None:
            seen(count)
    for _ in range(rounds - len(own)):
        if stop is not None and stop():
            raise EvaluationStopped
        engine.forward(np.zeros((1, *engine.spec.image_size, 3), np.float32))
    # Summed in the order of the batches, so that any number of ranks gives the same bits.
    turns = zip_longest(*ranks.gather(own))
    every = [batch for turn in turns for batch in turn if batch is not None]
    images, first, five, loss = (
        (sum(column) for column in zip(*every, strict=True)) if every else (0, 0, 0, 0.0)
    )
    if not images:
        raise ValueError("evaluation: the data has no images")
    accuracy = {"top1": first / images, "top5": five / images} if classifier else {}
    return Evaluation(images=int(images), loss=loss / images, **accuracy)


def cross_entropy(logits: Array, labels: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """(B, classes) logits and (B,) labels to (B,) losses."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(-1, keepdims=True)
    return np.asarray(np.log(np.exp(shifted).sum(-1)) - shifted[np.arange(len(labels)), labels])


def classes_before(logits: Array, labels: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Number of classes ranked before the true one, `(B,)`: 0 if the true class is the most probable.

    Of equal logits the class with the smaller index is ranked first; NaN is ranked before the true class.
    """
    own = logits[np.arange(len(labels)), labels][:, None]
    earlier = np.arange(logits.shape[1]) < labels[:, None]
    return np.asarray((~(logits <= own) | ((logits == own) & earlier)).sum(-1))


@contextmanager
def with_ema_weights(engine: Engine) -> Iterator[None]:
    """Inside the block the engine uses the moving average of its weights."""
    engine.swap_ema()
    try:
        yield
    finally:
        engine.swap_ema()


def _check_labels(batch: EvalBatch, classes: int) -> None:
    for label, index in zip(batch.labels.tolist(), batch.indices.tolist(), strict=True):
        if not 0 <= label < classes:
            raise ValueError(f"evaluation: image {index} has label {label}, expected 0 to {classes - 1}")
