"""The page that `arm demo` writes about its runs."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from arm_cli.demo.report.contents import Answer, Comparison, Demonstration, Floats, Parity
from arm_cli.demo.report.figures import Curve, accuracy_figure, loss_figure, plane_figure
from arm_cli.demo.report.page import Page
from arm_cli.demo.report.pictures import (
    animation,
    beside,
    data_uri,
    error_image,
    panel,
    with_prediction,
)
from arm_core.training.intervals import mean_interval, paired_difference

OWN_IMAGES = (
    "arm pretrain tiny --data TRAIN --out runs/pretrain\n"
    "arm finetune tiny --from runs/pretrain --data TRAIN --eval-data VAL --out runs/classifier\n"
    "arm evaluate runs/classifier --data VAL\n"
    "arm predict runs/classifier photo.jpg"
)

ROWS, MOVING, SHOWN = 6, 5, 12
"""Digits in the table of predictions, digits in the animation, answers of each kind in the gallery."""


def write_up(demo: Demonstration) -> Page:
    """The finished page."""
    page = Page(f"ARM in {_in_words(demo.seconds)}", summary(demo.comparisons[0]))
    _opening(page, demo)
    _predictions(page, demo)
    _comparison(page, demo)
    _answers(page, demo.answers)
    _planes(page, demo)
    _pretraining(page, demo)
    _parity(page, demo.parity)
    page.section("Try it", "Test digits are saved as PNG files. The classifier names them with:")
    page.code(demo.predict)
    page.section(
        "With your own images",
        "TRAIN and VAL are folders with one sub-folder of images per class.",
        demo.costs,
    )
    page.code(OWN_IMAGES)
    page.section("This run", "All numbers and pictures on this page come from the run that wrote it.")
    page.table(["", ""], demo.facts.items())
    return page


def summary(comparison: Comparison) -> str:
    """The result in one sentence."""
    (_, pretrained), (_, scratch) = comparison.arms.items()
    name, pixels = max(comparison.baselines.items(), key=lambda item: float(item[1].mean()))
    return (
        "A network that has learned to predict the next piece of an image, without labels, then learns from "
        f"{comparison.labels} labelled examples of each digit to read {pretrained[:, -1].mean():.0f} % of "
        f"new digits. Without this preparation it reads {scratch[:, -1].mean():.0f} % after the same "
        f"training; {name} on raw pixels reads {pixels.mean():.0f} %."
    )


def _in_words(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    words = [f"{minutes} minute{'s' * (minutes != 1)}"] if minutes else []
    return " ".join([*words, *([f"{rest} seconds"] if rest or not words else [])])


def _opening(page: Page, demo: Demonstration) -> None:
    spec, middle = demo.spec, demo.spec.clusters // 2
    clearest = int(demo.truth.std((1, 2)).argmax())
    truth, predicted = demo.truth[clearest], demo.predicted[clearest]
    shown = [
        panel(spec, truth, seen=middle, mark=middle, factor=9),
        panel(spec, with_prediction(spec, truth, predicted, middle), seen=middle + 1, mark=middle, factor=9),
        panel(spec, truth, mark=middle, factor=9),
    ]
    page.picture(
        data_uri(beside(shown, 16)),
        "what the model has seen of a digit; its prediction of the next piece; the digit",
        "Left: what the model has seen of a new digit. Middle: with its prediction of the next piece, in the "
        "orange frame. Right: the digit.",
    )


def _predictions(page: Page, demo: Demonstration) -> None:
    spec = demo.spec
    page.section(
        "What it predicts",
        f"Images of {spec.image_size[0]}x{spec.image_size[1]} pixels are cut into {spec.clusters} clusters "
        f"of {spec.cluster[0]}x{spec.cluster[1]} patches, numbered in the order in which one causal scan "
        "reads them. From the clusters so far, the model predicts the pixels of the next one.",
    )
    page.picture(
        animation(spec, list(demo.truth[:MOVING]), list(demo.predicted[:MOVING])),
        "clusters are predicted one after the other",
        "One cluster after the other: the prediction, in the orange frame, from the true clusters before it.",
    )
    rows = []
    for i in range(min(ROWS, len(demo.truth))):
        truth, predicted = demo.truth[i], demo.predicted[i]
        seen = 1 + (i + 3) % (spec.clusters - 1)
        rows.append(
            beside(
                [
                    panel(spec, truth, seen=seen, mark=seen),
                    panel(spec, predicted, mark=seen),
                    panel(spec, truth, mark=seen),
                    panel(spec, error_image(predicted, truth), mark=seen),
                ]
            )
        )
    page.pictures(
        [data_uri(row) for row in rows],
        "seen so far, predicted, truth, error",
        "Test digits. From left to right: seen so far, predicted, truth, error (darker is larger). "
        "The orange cluster is predicted from the clusters seen so far. Every other cluster in the second "
        "picture is also predicted from the true clusters before it; the first one is given. The mean and "
        "contrast of each patch are those of the truth, since the training target omits them. Colours are "
        "averaged.",
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
    figures, rows = [], []
    for comparison in demo.comparisons:
        curves = [Curve(label=n, steps=comparison.steps, runs=r) for n, r in comparison.arms.items()]
        lines = {name: float(values.mean()) for name, values in comparison.baselines.items()}
        figures.append(accuracy_figure(curves, lines, title=f"{comparison.labels} labels per class"))
        half = len(comparison.steps) // 2 - 1
        for name, runs in comparison.arms.items():
            rows.append([comparison.labels, name, spread(runs[:, half]), spread(runs[:, -1])])
        for name, values in comparison.baselines.items():
            rows.append([comparison.labels, f"{name}, raw pixels", "", spread(values)])
    page.figures(figures)
    steps = demo.comparisons[0].steps
    head = ["labels per class", "method", f"accuracy after {steps[len(steps) // 2 - 1]} steps, %"]
    caption = "Test accuracy: mean and 95 % interval over the seeds (Student's t)."
    page.table([*head, f"after {steps[-1]} steps, %"], rows, caption)
    page.section("What this shows", verdict(demo.comparisons))


def verdict(comparisons: Sequence[Comparison]) -> str:
    """A sentence for each number of labels; it claims no more than the seeds show."""
    sentences = []
    for comparison in comparisons:
        (first, a), (second, b) = comparison.arms.items()
        name, pixels = max(comparison.baselines.items(), key=lambda item: float(item[1].mean()))
        sentences.append(
            f"With {comparison.labels} labels per class, after {comparison.steps[-1]} steps, {first} is "
            f"{_against(a[:, -1], b[:, -1])} {second}, and {_against(a[:, -1], pixels)} {name} on raw pixels."
        )
    for fewer, more in pairwise(comparisons):
        name = next(iter(fewer.arms))
        gain = more.arms[name][:, -1].mean() - fewer.arms[name][:, -1].mean()
        sentences.append(
            f"From {fewer.labels} to {more.labels} labels per class, {name} "
            f"{'gains' if gain >= 0 else 'loses'} {abs(gain):.1f} points."
        )
    sentences.append(
        "Runs this short measure how fast a network learns from few labels, not its accuracy after many more "
        "steps; make reproduce compares converged runs."
    )
    return " ".join(sentences)


def _against(values: Floats, others: Floats) -> str:
    """`7.1 points ahead of`, with the interval of the difference by seed."""
    difference = paired_difference(dict(enumerate(values)), dict(enumerate(others)))
    assert difference is not None
    word = "ahead of" if difference.mean >= 0 else "behind"
    half = difference.half
    interval = "" if half is None else f" (95 % interval ± {half:.1f}"
    if half is not None:
        interval += ")" if difference.sign else "; undecided)"
    return f"{abs(difference.mean):.1f} points{interval} {word}"


def _answers(page: Page, answers: Sequence[Answer]) -> None:
    right = [answer for answer in answers if answer.label == answer.predicted]
    wrong = sorted(
        (answer for answer in answers if answer.label != answer.predicted), key=lambda a: -a.probability
    )
    page.section(
        "Right and wrong answers",
        f"The pretrained classifier names {len(right)} of {len(answers)} test digits correctly. Below, "
        "some of the right answers and the wrong answers of which it is most certain.",
    )
    every = max(1, len(right) // SHOWN)
    page.gallery([_labelled(answer) for answer in right[::every][:SHOWN]])
    page.gallery([_labelled(answer) for answer in wrong[:SHOWN]])


def _labelled(answer: Answer) -> tuple[str, str, bool]:
    from PIL import Image

    picture = Image.fromarray(answer.image).resize((72, 72), Image.Resampling.NEAREST)
    text = f"{answer.predicted}: {100 * answer.probability:.0f} %"
    right = answer.label == answer.predicted
    return (
        data_uri(picture),
        text if right else f"{text}; it is {answer.label}: {100 * answer.of_label:.0f} %",
        right,
    )


def _planes(page: Page, demo: Demonstration) -> None:
    page.section(
        "Features of the digits",
        "Each point is a test digit: the mean of the encoder's outputs over its patches, projected to the "
        "plane in which they vary most. Pretraining uses no labels; the colours show the digits. Finetuning "
        f"used {demo.comparisons[-1].labels} labels per class.",
    )
    page.figures(
        [
            plane_figure(plane.points, demo.labels, title=f"{plane.title} (k-NN {plane.accuracy:.0f} %)")
            for plane in demo.planes
        ],
        "k-NN: accuracy of the nearest neighbours among the training digits, with all features.",
    )


def _pretraining(page: Page, demo: Demonstration) -> None:
    page.section("Pretraining loss")
    caption = "Mean squared error of the predicted patches, each normalised to mean 0 and variance 1."
    page.figures([loss_figure(demo.loss_steps, demo.losses, title="Pretraining loss")], caption)


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
    """`74.6 ± 2.6`: mean and 95 % interval; only the mean for a single value."""
    found = mean_interval(np.asarray(values, np.float64).tolist())
    return f"{found.mean:.1f}" if found.half is None else f"{found.mean:.1f} ± {found.half:.1f}"
