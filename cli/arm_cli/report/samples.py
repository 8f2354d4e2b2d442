"""Predictions of a run's saved models on some of its images, as pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from arm_cli.options import EngineChoice
    from arm_core.data.sources import ImageSource
    from arm_core.engine.protocol import Array, Engine
    from arm_core.training.history import RunHistory

EXAMINED = 256
"""Images whose answers are examined, at even distances in the data."""
STEPS = 4
"""Saved steps whose predictions are shown."""
BATCH = 32


@dataclass(frozen=True, kw_only=True)
class Group:
    """Pictures under a title: data URI and caption of each."""

    title: str
    pictures: Sequence[tuple[str, str]]
    small: bool
    """Whether pixels are enlarged."""


@dataclass(frozen=True, kw_only=True)
class Samples:
    """The sample predictions of a page."""

    note: str
    """What the pictures show, or why there are none."""
    groups: Sequence[Group] = ()


def take_samples(history: RunHistory, count: int, choice: EngineChoice) -> Samples:
    """Predictions on images of the run: those to evaluate on, else those to train on.

    Raises ValueError or OSError if the images, an intact checkpoint or the engine are not available.
    """
    from arm_core.model.spec import PretrainSpec
    from arm_core.recipe.images import open_sources

    spec = history.spec
    if spec is None or not history.checkpoints:
        raise ValueError(f"{history.path} has no saved model")
    train, evaluation = open_sources(history.recipe)
    source = train if evaluation is None else evaluation
    kind = "training images" if evaluation is None else "evaluation images"
    if isinstance(spec, PretrainSpec):
        return _clusters(history, source, kind, count, choice)
    return _answers(history, source, kind, count, choice)


def evenly(total: int, count: int) -> list[int]:
    """At most `count` indices below `total` at even distances, from the first on."""
    count = min(total, count)
    return [i * total // count for i in range(count)]


def chosen_steps(steps: Sequence[int], most: int = STEPS) -> list[int]:
    """At most `most` of the saved steps: the first, the last, and those at even distances between them."""
    if len(steps) <= most:
        return list(steps)
    places = np.linspace(0, len(steps) - 1, most).round().astype(int)
    return [steps[i] for i in places]


def _read(history: RunHistory, source: ImageSource, indices: Sequence[int]) -> Array:
    """(B, H, W, 3), normalised as in evaluation."""
    assert history.spec is not None
    transform, size = history.recipe.eval_transform, history.spec.image_size
    return np.stack([transform(source.item(index), size) for index in indices])


def _pixels(history: RunHistory, images: Array) -> list[np.ndarray[tuple[int, ...], np.dtype[np.uint8]]]:
    from arm_core.data.transforms import denormalize

    transform = history.recipe.eval_transform
    return [denormalize(image, transform.mean, transform.std) for image in images]


def _engines(history: RunHistory, steps: Sequence[int], choice: EngineChoice):  # type: ignore[no-untyped-def]
    """The engine with the weights of each step in turn, corrupt checkpoints omitted."""
    from arm_cli.show import echo
    from arm_core.engine.protocol import TrainingState
    from arm_core.training.checkpoint import FOLDER, load_checkpoint, step_name

    engine: Engine | None = None
    for step in steps:
        try:
            checkpoint = load_checkpoint(history.path / FOLDER / step_name(step))
        except (ValueError, OSError) as error:
            echo(f"Warning: step {step} is not shown: {error}", err=True)
            continue
        parameters = checkpoint.state.parameters
        if engine is None:
            engine = choice.create(checkpoint.spec, parameters)
        else:
            engine.load_state(TrainingState(parameters=parameters))
        yield step, engine
    if engine is None:
        raise ValueError(f"none of the checkpoints of {history.path} can be read")


def _clusters(
    history: RunHistory, source: ImageSource, kind: str, count: int, choice: EngineChoice
) -> Samples:
    """Each image, and its clusters as predicted at several steps."""
    from arm_cli.demo.report.pictures import predicted_images
    from arm_cli.pages.shell import LOSSLESS, picture
    from arm_core.model.reference.model import prediction_target, unfold_patches
    from arm_core.model.spec import PretrainSpec, Target

    spec = history.spec
    assert isinstance(spec, PretrainSpec)
    images = _read(history, source, evenly(len(source), count))
    rows = [[(picture(pixels), "image")] for pixels in _pixels(history, images)]
    for step, engine in _engines(history, chosen_steps(history.checkpoints), choice):
        for start in range(0, len(images), BATCH):
            part = images[start : start + BATCH]
            prediction = engine.forward(part)["prediction"]
            target = prediction_target(spec, unfold_patches(part, spec.encoder.patch))
            losses = ((prediction - target) ** 2).mean((1, 2))
            painted = _pixels(history, predicted_images(spec, part, prediction))
            for row, pixels, loss in zip(rows[start:], painted, losses, strict=False):
                row.append((picture(pixels), f"step {step}: loss {loss:.3f}"))
    means = (
        " The true mean and contrast of each patch are restored, since the model does not predict them."
        if spec.target is Target.NORMALIZED
        else ""
    )
    note = (
        f"{len(images)} {kind}, each beside the clusters of {spec.cluster[0]}x{spec.cluster[1]} patches that "
        "the model predicts at the saved steps. Each cluster is predicted from the true clusters before it; "
        f"the first is given.{means}"
    )
    return Samples(
        note=note,
        groups=[Group(title="", pictures=row, small=max(spec.image_size) <= LOSSLESS) for row in rows],
    )


def _answers(
    history: RunHistory, source: ImageSource, kind: str, count: int, choice: EngineChoice
) -> Samples:
    """Wrong answers, the most confident first, and right answers of every confidence."""
    from arm_cli.pages.shell import LOSSLESS, picture

    assert history.spec is not None
    indices = evenly(len(source), EXAMINED)
    step, engine = next(iter(_engines(history, history.checkpoints[::-1], choice)))
    logits = np.concatenate(
        [
            engine.forward(_read(history, source, indices[i : i + BATCH]))["logits"].astype(np.float64)
            for i in range(0, len(indices), BATCH)
        ]
    )
    odds = np.exp(logits - logits.max(-1, keepdims=True))
    odds /= odds.sum(-1, keepdims=True)
    items = [source.item(index) for index in indices]
    labels = np.array([item.label for item in items])
    predicted, confidence = odds.argmax(-1), odds.max(-1)
    order = np.argsort(-confidence, kind="stable")
    wrong, right = (order[(predicted[order] == labels[order]) == same] for same in (False, True))
    names = source.classes

    def described(at: int) -> str:
        words = f"{names[predicted[at]]} ({100 * confidence[at]:.0f} %)"
        if predicted[at] != labels[at]:
            words += f"; true: {names[labels[at]]} ({100 * odds[at, labels[at]]:.0f} %)"
        return f"{words}: {Path(items[at].name).name}"

    small = max(history.spec.image_size) <= LOSSLESS

    def group(title: str, places: Sequence[int]) -> Group:
        images = [_pixels(history, _read(history, source, [indices[at]]))[0] for at in places]
        shown = [(picture(image), described(at)) for image, at in zip(images, places, strict=True)]
        return Group(title=title, pictures=shown, small=small)

    note = (
        f"Answers of step {step} on {len(indices)} {kind} at even distances in the data: "
        f"{len(right)} right ({100 * len(right) / len(indices):.1f} %), {len(wrong)} wrong. "
        "Percentages are probabilities of the model."
    )
    spread = [int(right[i]) for i in evenly(len(right), count)]
    return Samples(
        note=note,
        groups=[
            group("Wrong answers, the most confident first", wrong[:count].tolist()),
            group("Right answers, from the most to the least confident", spread),
        ],
    )
