"""Shows the result of `arm evaluate` as a line, as JSON or as a page."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arm_cli.show import echo, print_json, print_table

if TYPE_CHECKING:
    from arm_cli.evaluation_job import DataSet
    from arm_cli.opening import Opened
    from arm_core.data.sources import ImageSource
    from arm_core.training.evaluation import Evaluation
    from arm_core.training.predictions import Predictions

MISTAKES = 24
"""Number of the most confident mistakes on the page."""
PICTURE = 640
"""Side of the confusion picture, pixels."""
FEW_CLASSES = 20
"""Most classes whose table is printed in the terminal."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """An evaluation, with its model, images and settings."""

    opened: Opened
    source: ImageSource
    evaluation: Evaluation
    predictions: Predictions | None
    """None for a pretraining model."""
    images_per_s: float
    protocol: dict[str, Any]
    real_correct: list[bool] | None = None
    """By image with labels of ImageNet-ReaL, whether the prediction is one of them."""

    def name(self, label: int) -> str:
        """Human-readable name of a class."""
        names = self.opened.class_names or self.source.classes
        return names[label] if len(names) == len(self.source.classes) else self.source.classes[label]


Corruptions = Mapping[str, Sequence[Measured]]
"""Evaluations by corruption, one for each severity."""


def report(measured: Measured, *, as_json: bool, page: str | None) -> None:
    """Print the result, and write the page if requested."""
    if page is not None:
        from arm_core.files.atomic import new_file, write_text

        text = _page(measured)
        with new_file(Path(page), force=True) as draft:
            write_text(draft, text)
    if as_json:
        print_json(_as_data(measured))
        return
    found, predictions = measured.evaluation, measured.predictions
    speed = f"{found.images} images, {measured.images_per_s:.3g} images/s"
    if predictions is None:
        echo(f"loss {found.loss:.4f} ({speed})")
        return
    from arm_core.training.predictions import calibration_error, interval, worst_confusions

    assert found.top1 is not None
    low, high = interval(found.top1, found.images)
    echo(
        f"top-1 {100 * found.top1:.2f} % ({100 * low:.2f} to {100 * high:.2f}), "
        f"top-5 {100 * (found.top5 or 0):.2f} %, loss {found.loss:.4f}, "
        f"calibration error {calibration_error(predictions):.4f} ({speed})"
    )
    if (real := measured.real_correct) is not None:
        part = sum(real) / len(real)
        low, high = interval(part, len(real))
        echo(f"ReaL {100 * part:.2f} % ({100 * low:.2f} to {100 * high:.2f}), {len(real)} images with labels")
    worst = worst_confusions(predictions, len(measured.source.classes), 3)
    words = [f"{measured.name(true)} as {measured.name(other)} ({count})" for true, other, count in worst]
    if words:
        echo(f"most frequent confusions: {', '.join(words)}")
    if len(measured.source.classes) <= FEW_CLASSES:
        print_table(("class", "images", "top-1"), _class_rows(measured))


def _class_rows(measured: Measured) -> list[tuple[str, str, str]]:
    """Name, images and accuracy of each class with images, in the order of the classes."""
    from arm_core.training.predictions import per_class

    assert measured.predictions is not None
    counts = per_class(measured.predictions, len(measured.source.classes))
    return [
        (measured.name(label), str(images), f"{100 * correct / images:.1f} %")
        for label, (images, correct) in enumerate(counts)
        if images
    ]


def _as_data(measured: Measured) -> dict[str, Any]:
    from arm_core.training.predictions import calibration_error, interval, per_class, worst_confusions

    found, predictions, opened = measured.evaluation, measured.predictions, measured.opened
    transform = opened.transform
    result: dict[str, Any] = {"model": str(opened.folder)}
    result |= {name: value for name, value in asdict(found).items() if value is not None}
    result |= {"images_per_s": round(measured.images_per_s, 2)}
    result["protocol"] = {
        **measured.protocol,
        "image_size": list(opened.spec.image_size),
        "crop_fraction": transform.fraction(opened.spec.image_size),
        "interpolation": "bicubic",
        "mean": list(transform.mean),
        "std": list(transform.std),
        "classes": len(measured.source.classes),
    }
    if predictions is not None and found.top1 is not None and found.top5 is not None:
        names = measured.source.classes
        result["top1_interval"] = list(interval(found.top1, found.images))
        result["top5_interval"] = list(interval(found.top5, found.images))
        if (real := measured.real_correct) is not None:
            result["real_top1"] = sum(real) / len(real)
            result["real_top1_interval"] = list(interval(sum(real) / len(real), len(real)))
            result["real_images"] = len(real)
        result["calibration_error"] = calibration_error(predictions)
        result["per_class"] = [
            {"class": name, "images": images, "top1": correct / images if images else None}
            for name, (images, correct) in zip(names, per_class(predictions, len(names)), strict=True)
        ]
        result["confusions"] = [
            {"class": names[true], "predicted": names[other], "images": count}
            for true, other, count in worst_confusions(predictions, len(names))
        ]
    return result


def report_corruptions(found: Corruptions, *, as_json: bool) -> None:
    """Print the errors by corruption and severity, and their mean relative to AlexNet's."""
    from arm_core.training.robustness import ALEXNET_ERRORS, SEVERITIES, mean_corruption_error

    if as_json:
        print_json(_corruptions_as_data(found))
        return
    errors = _errors(found)
    mean = mean_corruption_error(errors)
    complete = set(errors) == set(ALEXNET_ERRORS)
    rows = [
        (name, *(f"{100 * error:.1f}" for error in row), f"{100 * mean_corruption_error({name: row}):.1f}")
        for name, row in errors.items()
    ]
    print_table(("error, %", *SEVERITIES, "relative to AlexNet"), rows)
    of = (
        ""
        if complete
        else f" of {len(errors)} corruptions; the published measure takes {len(ALEXNET_ERRORS)}"
    )
    echo(f"mean corruption error {100 * mean:.2f} %{of}")


def _errors(found: Corruptions) -> dict[str, list[float]]:
    return {name: [1 - (one.evaluation.top1 or 0.0) for one in row] for name, row in found.items()}


def _corruptions_as_data(found: Corruptions) -> dict[str, Any]:
    from arm_core.training.robustness import mean_corruption_error

    errors, first = _errors(found), next(iter(found.values()))[0]
    return {
        "model": str(first.opened.folder),
        "mean_corruption_error": mean_corruption_error(errors),
        "corruptions": len(errors),
        "errors": errors,
        "protocol": _as_data(first)["protocol"],
    }


def report_sets(results: Sequence[tuple[DataSet, Measured | Corruptions]], *, as_json: bool) -> None:
    """Print a table with one row per set."""
    if as_json:
        sets = []
        for one, found in results:
            row = _as_data(found) if isinstance(found, Measured) else _corruptions_as_data(found)
            sets.append({"set": one.name, **row})
        print_json({"model": sets[0]["model"], "sets": sets})
        return
    head = ("set", "images", "measure", "value", "95 % interval", "top-5")
    print_table(head, [(one.name, *_summary(found)) for one, found in results])


def _summary(found: Measured | Corruptions) -> tuple[str, ...]:
    """Images, measure, value, interval and top-5 accuracy of a set."""
    from arm_core.training.predictions import interval
    from arm_core.training.robustness import ALEXNET_ERRORS, mean_corruption_error

    if not isinstance(found, Measured):
        images = sum(part.evaluation.images for row in found.values() for part in row)
        error = mean_corruption_error(_errors(found))
        part_of = "" if len(found) == len(ALEXNET_ERRORS) else f" {len(found)}/{len(ALEXNET_ERRORS)}"
        return str(images), f"mCE{part_of}", f"{100 * error:.2f} %", "", ""
    result = found.evaluation
    if result.top1 is None or result.top5 is None:
        return str(result.images), "loss", f"{result.loss:.4f}", "", ""
    part, images, measure, five = result.top1, result.images, "top-1", f"{100 * result.top5:.2f} %"
    if (real := found.real_correct) is not None:
        part, images, measure, five = sum(real) / len(real), len(real), "ReaL", ""
    low, high = interval(part, images)
    return str(images), measure, f"{100 * part:.2f} %", f"{100 * low:.2f} to {100 * high:.2f}", five


STYLE = """
body { font: 14px/1.4 system-ui, sans-serif; margin: 2em; background: #fff; color: #222 }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(12em, 1fr)); gap: 1em }
figure { margin: 0 } img { max-width: 100%; border: 1px solid #ccc } .map { image-rendering: pixelated }
figcaption { font-size: 12px; overflow-wrap: anywhere } td, th { padding: 0 1em 0 0; text-align: left }
"""


def _page(measured: Measured) -> str:
    from arm_core.training.predictions import confident_mistakes, interval, per_class, worst_confusions

    found, predictions = measured.evaluation, measured.predictions
    assert predictions is not None
    assert found.top1 is not None
    names, (low, high) = measured.source.classes, interval(found.top1, found.images)
    rows = sorted(
        (correct / images, measured.name(label), images)
        for label, (images, correct) in enumerate(per_class(predictions, len(names)))
        if images
    )
    table = [(name, str(images), f"{100 * part:.1f} %") for part, name, images in rows]
    worst = [
        (measured.name(true), measured.name(other), str(count))
        for true, other, count in worst_confusions(predictions, len(names))
    ]
    mistakes = [
        _mistake(measured, predictions, at) for at in confident_mistakes(predictions, MISTAKES).tolist()
    ]
    title = html.escape(f"{measured.opened.folder} on {measured.protocol['data']}")
    summary = (
        f"top-1 {100 * found.top1:.2f} % ({100 * low:.2f} to {100 * high:.2f}), top-5 "
        f"{100 * (found.top5 or 0):.2f} %, {found.images} images"
    )
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title><style>{STYLE}</style>"
        f"<h1>{title}</h1><p>{summary}</p>"
        f"<h2>Confusion</h2><p>Rows are true classes, columns predicted ones; darker is more frequent.</p>"
        f'<img class=map alt="confusion matrix" width={PICTURE} src="{_confusion(measured)}">'
        f"<h2>Most frequent confusions</h2>{_table(('class', 'predicted', 'images'), worst)}"
        f"<h2>Most confident mistakes</h2><div class=grid>{''.join(mistakes)}</div>"
        f"<h2>Classes</h2>{_table(('class', 'images', 'top-1'), table)}</html>\n"
    )


def _table(head: tuple[str, ...], rows: list[tuple[str, str, str]]) -> str:
    cells = ["".join(f"<th>{word}</th>" for word in head)]
    cells += ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows]
    return f"<table>{''.join(f'<tr>{row}</tr>' for row in cells)}</table>"


def _confusion(measured: Measured) -> str:
    """Fraction of each true class, from white (none) to dark (all), on a scale that shows single images."""
    import numpy as np

    from arm_core.training.predictions import confusion

    assert measured.predictions is not None
    counts = confusion(measured.predictions, len(measured.source.classes)).astype(np.float64)
    part = np.sqrt(counts / np.maximum(counts.sum(1, keepdims=True), 1))
    return _picture(np.repeat((255 * (1 - part)).astype(np.uint8)[..., None], 3, -1))


def _mistake(measured: Measured, predictions: Predictions, at: int) -> str:
    from arm_core.data.transforms import denormalize

    transform, size = measured.opened.transform, measured.opened.spec.image_size
    item = measured.source.item(int(predictions.indices[at]))
    pixels = denormalize(transform(item, size), transform.mean, transform.std)
    predicted, true = (measured.name(int(p[at])) for p in (predictions.predicted, predictions.labels))
    words = f"{predicted} ({100 * predictions.confidence[at]:.1f} %), is {true}: {Path(item.name).name}"
    return (
        f'<figure><img alt="" src="{_picture(pixels)}"><figcaption>{html.escape(words)}</figcaption></figure>'
    )


def _picture(pixels: Any) -> str:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
