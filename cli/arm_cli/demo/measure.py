"""What the demonstration measures on finished runs: accuracy, answers, features, engines."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from arm_cli.demo.baselines import nearest_class_mean, nearest_neighbour
from arm_cli.demo.report.contents import Answer, Grey, Parity, Plane

if TYPE_CHECKING:
    from arm_core.data.digits import Digits
    from arm_core.data.sources import ImageSource
    from arm_core.engine.protocol import Array, Backend, Engine
    from arm_core.recipe.recipe import Recipe

Labels = npt.NDArray[np.int64]

BATCH = 100
"""Images at a time."""


def images_of(
    source: ImageSource, recipe: Recipe, indices: Sequence[int] | None = None, epochs: int = 1
) -> tuple[Array, Labels]:
    """Images as the evaluation prepares them, (B, H, W, 3), and their labels; `epochs` visits of each."""
    size = recipe.spec(len(source.classes)).image_size
    every = range(len(source)) if indices is None else indices
    items = [source.item(index, epoch) for epoch in range(epochs) for index in every]
    pixels = np.stack([recipe.eval_transform.crop(item, size) for item in items])
    return recipe.eval_transform.batch(pixels).normalised(), np.array([item.label for item in items])


def training_digits(recipe: Recipe) -> Digits:
    """The training digits of a recipe, with its number of labels per class, chosen by its seed."""
    from arm_core.data.digits import Digits

    size = recipe.spec(10).image_size
    seed, labels = recipe.training.seed, recipe.data.labels_per_class
    return Digits("train", size=size, seed=seed, labels_per_class=labels, name=recipe.data.source)


def test_digits(recipe: Recipe) -> Digits:
    """The test digits for a recipe."""
    from arm_core.data.digits import Digits

    return Digits("test", size=recipe.spec(10).image_size, name=recipe.data.source)


def baselines(train: ImageSource, test: ImageSource, recipe: Recipe, visits: int) -> dict[str, float]:
    """Accuracy in percent of methods on raw pixels, with `visits` random variants of every training image."""
    images, labels = images_of(train, recipe, epochs=visits)
    queries, truth = images_of(test, recipe)
    return {
        "nearest neighbour": 100 * float((nearest_neighbour(images, labels, queries) == truth).mean()),
        "nearest class mean": 100 * float((nearest_class_mean(images, labels, queries) == truth).mean()),
    }


def answers_of(engine: Engine, images: Array, labels: Labels, pictures: Grey) -> list[Answer]:
    """The classifier's answer for each image; pictures: (B, H, W)."""
    logits = np.concatenate(
        [engine.forward(images[i : i + BATCH])["logits"] for i in range(0, len(images), BATCH)]
    ).astype(np.float64)
    odds = np.exp(logits - logits.max(-1, keepdims=True))
    odds /= odds.sum(-1, keepdims=True)
    return [
        Answer(
            image=picture,
            label=int(label),
            predicted=int(row.argmax()),
            probability=float(row.max()),
            of_label=float(row[label]),
        )
        for picture, label, row in zip(pictures, labels, odds, strict=True)
    ]


def features_of(engine: Engine, images: Array) -> Array:
    """(B, D): the mean of the encoder's outputs over the patches."""
    from arm_core.explain.features import patch_features

    parts = [patch_features(engine, images[i : i + BATCH]) for i in range(0, len(images), BATCH)]
    return np.asarray(np.concatenate(parts).mean(1))


def plane_of(title: str, train: tuple[Array, Labels], test: tuple[Array, Labels]) -> Plane:
    """Features (B, D) and labels of training and test digits in the plane of the largest variance."""
    from arm_core.training.probe import knn_probe

    mean = train[0].mean(0)
    _, _, axes = np.linalg.svd(train[0] - mean, full_matrices=False)
    return Plane(
        title=title,
        points=(test[0] - mean) @ axes[:2].T,
        accuracy=100 * knn_probe(train[0] - mean, train[1], test[0] - mean, test[1]).accuracy,
    )


def parity_of(engine: Engine, backend: Backend, other: Backend, images: Array, labels: Labels) -> Parity:
    """Compare a classifier with itself in another engine: logits, gradients, classes."""
    from arm_core.engine.protocol import Batch

    batch = Batch(images=images, targets=np.eye(10, dtype=np.float32)[labels])
    second = other.create_engine(engine.spec, engine.export_state())
    logits, other_logits = engine.forward(images)["logits"], second.forward(images)["logits"]
    gradients, other_gradients = engine.loss_and_gradients(batch)[1], second.loss_and_gradients(batch)[1]
    return Parity(
        engines=(backend.version(), other.version()),
        logits=_difference(logits, other_logits),
        gradient=max(_difference(g, other_gradients[name]) for name, g in gradients.items()),
        same_class=float((logits.argmax(1) == other_logits.argmax(1)).mean()),
    )


def _difference(a: Array, b: Array) -> float:
    """Largest difference, relative to the largest value."""
    return float(abs(a - b).max() / max(abs(a).max(), 1e-30))


def cost_of_tiny(device: str) -> str:
    """A sentence on the time that `tiny` takes for 1000 images on this machine's CPU."""
    from arm_cli.training.summary import CPU_OPERATIONS
    from arm_core.model.cost import cost_table
    from arm_core.recipe.recipe import load_recipe

    if device.lower() != "cpu":
        return "Add --dry-run to either training command to measure its time on this machine."
    minutes = []
    for name in ("pretrain-tiny", "finetune-tiny"):
        recipe = load_recipe(name)
        operations = 3 * 2 * sum(part.multiply_adds for part in cost_table(recipe.spec(10)))
        minutes.append(1000 * operations / (CPU_OPERATIONS * (os.cpu_count() or 1)) / 60)
    return (
        f"On {os.cpu_count()} CPU cores like these, 1000 images take about {minutes[0]:.1f} minutes per "
        f"epoch of pretraining and {minutes[1]:.1f} minutes per epoch of finetuning, by the cost model; "
        "--epochs sets the number of epochs. Add --dry-run to either training command to measure its time."
    )
