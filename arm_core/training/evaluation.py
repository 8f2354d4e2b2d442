"""Exact evaluation: every image once, the last batch as small as it comes, sums in float64."""

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
"""The k of `top5`; with fewer classes all of them count."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Means over `images` images."""

    images: int
    loss: float
    """Cross-entropy in nats, or the prediction error of a pretraining model."""
    top1: float | None = None
    """Part of the images whose class is the likeliest; None in pretraining."""
    top5: float | None = None
    """Part of the images whose class is among the five likeliest."""

    @property
    def score(self) -> float:
        """What the best checkpoint has most of: top-1 accuracy, or minus the loss in pretraining."""
        return -self.loss if self.top1 is None else self.top1


def evaluate(
    engine: Engine,
    batches: Iterable[EvalBatch],
    *,
    seen: Callable[[int], None] | None = None,
    ranks: Ranks = ALONE,
    rounds: int = 0,
) -> Evaluation:
    """Run the engine's model over `batches` (an `EvalLoader`); `seen` is told the images of each batch.

    ranks: each gives its own batches, and gets the result of all.  rounds: `EvalLoader.rounds`; a rank with
    fewer batches computes something idle in the last one, since all take part in a pass.
    Raises ValueError for no images, and for an image without a label where the model is a classifier.
    """
    classifier = isinstance(engine.spec, ClassifierSpec)
    own: list[tuple[int, int, int, float]] = []
    for batch in batches:
        count = len(batch.images)
        outputs = engine.forward(batch.images)
        if classifier:
            _check_labels(batch, outputs["logits"].shape[1])
            loss = float(cross_entropy(outputs["logits"], batch.labels).sum())
            before = classes_before(outputs["logits"], batch.labels)
            own.append((count, int((before < 1).sum()), int((before < TOP).sum()), loss))
        else:
            own.append((count, 0, 0, float(outputs["loss"]) * count))
        if seen is not None:
            seen(count)
    for _ in range(rounds - len(own)):
        engine.forward(np.zeros((1, *engine.spec.image_size, 3), np.float32))
    # Added up in the order of the batches: the same bits from any number of ranks.
    turns = zip_longest(*ranks.gather(own))
    sums = [batch for turn in turns for batch in turn if batch is not None]
    images, first, five, loss = (
        (sum(column) for column in zip(*sums, strict=True)) if sums else (0, 0, 0, 0.0)
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
    """Classes that stand before the true one, `(B,)`: 0 where it is the likeliest.

    Ties go to the class with the smaller number; a value that is no number beats the true class.
    """
    own = logits[np.arange(len(labels)), labels][:, None]
    earlier = np.arange(logits.shape[1]) < labels[:, None]
    return np.asarray((~(logits <= own) | ((logits == own) & earlier)).sum(-1))


@contextmanager
def with_ema_weights(engine: Engine) -> Iterator[None]:
    """Inside the block the engine computes with the moving average of its weights."""
    engine.swap_ema()
    try:
        yield
    finally:
        engine.swap_ema()


def _check_labels(batch: EvalBatch, classes: int) -> None:
    for label, index in zip(batch.labels.tolist(), batch.indices.tolist(), strict=True):
        if not 0 <= label < classes:
            raise ValueError(f"evaluation: image {index} has label {label}, expected 0 to {classes - 1}")
