"""The page that `arm demo` writes about its runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from arm_cli.demo.report.figures import Curve, accuracy_figure, loss_figure
from arm_cli.demo.report.page import Page
from arm_cli.demo.report.pictures import data_uri, dim_given, predicted_images
from arm_core.data.transforms import denormalize
from arm_core.engine.byte_images import Color
from arm_core.model.spec import PretrainSpec

Floats = npt.NDArray[np.floating]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Accuracy on the test images, in percent, at one number of labels per class."""

    labels: int
    """Labelled images per class."""
    steps: Sequence[int]
    """Finetuning steps at which the runs were evaluated."""
    arms: Mapping[str, Floats]
    """By name of the starting point: (seeds, steps)."""
    baselines: Mapping[str, Floats]
    """By name of the method: (seeds,)."""


@dataclass(frozen=True, kw_only=True)
class Parity:
    """The same weights and images in two engines."""

    engines: tuple[str, str]
    logits: float
    """Largest difference of a logit, relative to the largest logit."""
    gradient: float
    """Largest difference of a gradient, relative to the largest value of its tensor."""
    same_class: float
    """Part of the images that get the same class."""


@dataclass(frozen=True, kw_only=True)
class Demonstration:
    """Contents of the page."""

    spec: PretrainSpec
    loss_steps: Sequence[int]
    losses: Sequence[float]
    images: Floats
    """(B, H, W, 3), as the model reads them."""
    prediction: Floats
    """(B, tokens, patch values)."""
    mean: Color
    std: Color
    """Normalisation of the images, per channel."""
    comparisons: Sequence[Comparison]
    rates: Mapping[str, str]
    """By name of the starting point: its learning rate and layer decay, in words."""
    parity: Parity | None
    """None if only one engine is installed."""
    facts: Mapping[str, str]
    """Machine, versions, times."""


def write_up(demo: Demonstration) -> Page:
    """The finished page."""
    page = Page(
        "ARM in two minutes",
        "A small Vision Mamba learns to predict images cluster by cluster, then to classify them. "
        "All numbers and pictures on this page come from the run that wrote it.",
    )
    _pretraining(page, demo)
    _predictions(page, demo)
    _comparison(page, demo)
    _parity(page, demo.parity)
    page.section("With your own images", "The same two stages on a folder with one sub-folder per class:")
    page.code(
        "arm pretrain tiny --data path/to/images --out runs/pretrain\n"
        "arm finetune tiny --from runs/pretrain --data path/to/images --eval-data path/to/others "
        "--out runs/classifier\n"
        "arm predict runs/classifier photo.jpg"
    )
    page.section("This run")
    page.table(["", ""], demo.facts.items())
    return page


def _pretraining(page: Page, demo: Demonstration) -> None:
    spec = demo.spec
    page.section(
        "Pretraining: predict the next cluster",
        f"Images of {spec.image_size[0]}x{spec.image_size[1]} pixels are cut into {spec.clusters} clusters "
        f"of {spec.cluster[0]}x{spec.cluster[1]} patches. One causal scan reads the clusters in order; from "
        "each prefix the decoder predicts the pixels of the next cluster. No labels are used.",
    )
    caption = "Mean squared error of the predicted patches, each normalised to mean 0 and variance 1."
    page.figures([loss_figure(demo.loss_steps, demo.losses, title="Pretraining loss")], caption)


def _predictions(page: Page, demo: Demonstration) -> None:
    painted = predicted_images(demo.spec, demo.images, demo.prediction)
    left, predicted = (denormalize(images, demo.mean, demo.std) for images in (demo.images, painted))
    right = dim_given(demo.spec, predicted)
    pairs = [(data_uri(a), data_uri(b)) for a, b in zip(left, right, strict=True)]
    page.section("What it predicts")
    page.picture_pairs(
        pairs,
        "Test images, each with the predictions beside it. Given: the faded first cluster, for every "
        "other cluster the true clusters before it (not the model's own guesses), and each patch's true "
        "mean and contrast, which the training target omits. Predicted: everything else.",
    )


def _comparison(page: Page, demo: Demonstration) -> None:
    seeds = len(next(iter(demo.comparisons[0].arms.values())))
    page.section(
        "Effect of pretraining",
        "The same network is finetuned with few labels, once from the pretrained weights and once from "
        f"scratch, {seeds} seeds each; lines are means, bands extend from the lowest to the highest seed. "
        "Each starting point has its own learning rate and layer decay, chosen beforehand on validation "
        "images: "
        + "; ".join(f"{name}: {text}" for name, text in demo.rates.items())
        + ". Dashed and dotted lines are simple methods on the raw pixels of the same labelled images, "
        "with as many random variants of each image as a finetuning run sees.",
    )
    figures = []
    for comparison in demo.comparisons:
        curves = [Curve(label=n, steps=comparison.steps, runs=r) for n, r in comparison.arms.items()]
        lines = {name: float(values.mean()) for name, values in comparison.baselines.items()}
        figures.append(accuracy_figure(curves, lines, title=f"{comparison.labels} labels per class"))
    page.figures(figures)
    rows = []
    for comparison in demo.comparisons:
        for name, runs in comparison.arms.items():
            half = len(comparison.steps) // 2 - 1
            rows.append([comparison.labels, name, spread(runs[:, half]), spread(runs[:, -1])])
        for name, values in comparison.baselines.items():
            rows.append([comparison.labels, f"{name}, raw pixels", "", spread(values)])
    steps = demo.comparisons[0].steps
    head = ["labels per class", "method", f"accuracy after {steps[len(steps) // 2 - 1]} steps, %"]
    page.table([*head, f"after {steps[-1]} steps, %"], rows, "Test accuracy: mean, and standard deviation.")
    page.section("What this shows", verdict(demo.comparisons))


def verdict(comparisons: Sequence[Comparison]) -> str:
    """A sentence for each number of labels; it claims no more than the seeds show."""
    sentences = []
    for comparison in comparisons:
        (first, a), (second, b) = comparison.arms.items()
        gap = float(a[:, -1].mean() - b[:, -1].mean())
        apart = a[:, -1].min() > b[:, -1].max() or b[:, -1].min() > a[:, -1].max()
        better, worse = (first, second) if gap > 0 else (second, first)
        reach = (
            "and each of its seeds is better than every seed of the other"
            if apart
            else "but the seeds overlap"
        )
        nearest, pixels = max(comparison.baselines.items(), key=lambda item: float(item[1].mean()))
        against = float(max(a[:, -1].mean(), b[:, -1].mean()) - pixels.mean())
        sentences.append(
            f"With {comparison.labels} labels per class, after {comparison.steps[-1]} steps, {better} is "
            f"{abs(gap):.1f} points ahead of {worse}, {reach}; against {nearest} on raw pixels it is "
            f"{abs(against):.1f} points {'ahead' if against > 0 else 'behind'}."
        )
    sentences.append(
        "A run this short measures how fast a network learns from few labels, not the accuracy after many "
        "more steps."
    )
    return " ".join(sentences)


def _parity(page: Page, parity: Parity | None) -> None:
    if parity is None:
        page.section("Two engines", "Only one engine is installed here, so there is nothing to compare.")
        return
    first, second = parity.engines
    page.section(
        "Two engines, one model",
        f"The finetuned classifier, trained by {first}, was loaded into {second} without conversion.",
    )
    rows = [
        ["largest difference of a logit (relative to the largest logit)", f"{parity.logits:.1e}"],
        [
            "largest difference of a gradient (relative to its tensor's largest value)",
            f"{parity.gradient:.1e}",
        ],
        ["test images given the same class", f"{100 * parity.same_class:.1f} %"],
    ]
    page.table(["", ""], rows)


def spread(values: Floats) -> str:
    """`74.6 ± 2.6`: mean and sample standard deviation; only the mean for a single value."""
    deviation = f" ± {values.std(ddof=1):.1f}" if len(values) > 1 else ""
    return f"{values.mean():.1f}{deviation}"
