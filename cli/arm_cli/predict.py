"""`arm predict`: the most likely classes of images."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from arm_cli.options import EngineChoice, batch_size_option, engine_options, json_option, weights_option
from arm_cli.show import echo

if TYPE_CHECKING:
    from arm_cli.opening import Opened
    from arm_core.engine.protocol import Array


@click.command(short_help="Print the most likely classes of images.")
@click.argument("words", metavar="MODEL IMAGE...", nargs=-1, required=True)
@click.option("--model", hidden=True)  # the earlier form: arm predict IMAGE... --model MODEL
@click.option("--top", type=click.IntRange(min=1), default=5, show_default=True, help="Classes to show.")
@click.option("--csv", "as_csv", is_flag=True, help="Print CSV: image, rank, class, name, probability.")
@click.option("--html", "page", metavar="OUT.HTML", help="Also write a page of images and classes.")
@batch_size_option(32)
@weights_option
@engine_options
@json_option
def predict(
    words: tuple[str, ...],
    model: str | None,
    top: int,
    as_csv: bool,
    page: str | None,
    batch_size: int,
    weights: str,
    engine: EngineChoice,
    as_json: bool,
) -> None:
    """Print the most likely classes of each IMAGE.

    MODEL is a classifier: a model folder, a run or a checkpoint, an official file, or a name that
    `arm models` lists. IMAGE is a file, a folder of images, or a pattern such as 'photos/*.jpg'.
    """
    from arm_cli.images import image_files
    from arm_cli.opening import open_model
    from arm_cli.show import print_json
    from arm_core.model.spec import ClassifierSpec

    if as_json and as_csv:
        raise ValueError("pass either --json or --csv")
    model, images = _model_and_images(model, words)
    files = image_files(images)
    opened = open_model(model, weights=weights)
    if not isinstance(opened.spec, ClassifierSpec):
        raise ValueError(
            f"{model}: a pretraining model has no classes; finetune it: arm finetune --from {model}"
        )
    table = csv.writer(sys.stdout) if as_csv else None
    if table is not None:
        table.writerow(("image", "rank", "class", "name", "probability"))
    results = []
    for result in _results(files, opened, engine, batch_size, top):
        if as_json or page is not None:
            results.append(result)
        if table is not None:
            table.writerows(
                (result["image"], rank, one["class"], one["name"], f"{one['probability']:.6f}")
                for rank, one in enumerate(result["top"], 1)
            )
        elif not as_json:
            echo(f"{result['image']}: {in_words(result['top'])}")
    if as_json:
        print_json(results)
    if page is not None:
        from arm_cli.contact_sheet import write_contact_sheet

        write_contact_sheet(Path(page), f"Predictions of {model}", results)
        echo(page, err=True)


def _model_and_images(model: str | None, words: tuple[str, ...]) -> tuple[str, tuple[str, ...]]:
    if model is not None:
        return model, words
    if len(words) == 1:
        raise ValueError(f"expected MODEL IMAGE..., found only {words[0]!r}")
    return words[0], words[1:]


def _results(
    files: list[Path], opened: Opened, engine: EngineChoice, batch_size: int, top: int
) -> Iterator[dict[str, Any]]:
    """Yields the name and the most likely classes of each file, batch by batch."""
    from arm_cli.images import image_batches
    from arm_cli.progress import ProgressBar

    runner = engine.create(opened.spec, opened.parameters)
    names = iter(files)
    with ProgressBar("predict", len(files), "images") as progress:
        for batch in image_batches(files, opened, batch_size):
            for row in runner.forward(batch)["logits"]:
                yield {"image": str(next(names)), "top": best(row, opened, top)}
            progress.advance(len(batch))


def best(logits: Array, opened: Opened, top: int) -> list[dict[str, Any]]:
    """The `top` most likely classes of one image, most likely first."""
    import numpy as np

    exponentials = np.exp(logits.astype(np.float64) - logits.max())
    probabilities = exponentials / exponentials.sum()
    order = np.argsort(-probabilities, kind="stable")[:top]
    return [
        {
            "class": opened.classes[i],
            "name": opened.class_names[i],
            "index": int(i),
            "probability": float(probabilities[i]),
        }
        for i in order
    ]


def in_words(classes: list[dict[str, Any]]) -> str:
    """`cat 93.1 %  dog 5.0 %`."""
    return "  ".join(f"{one['name']} {100 * one['probability']:.1f} %" for one in classes)
