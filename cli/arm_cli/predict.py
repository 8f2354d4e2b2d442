"""`arm predict`: the most likely classes of images."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from arm_cli.options import EngineChoice, batch_size_option, engine_options, json_option, weights_option
from arm_cli.show import echo

if TYPE_CHECKING:
    from arm_core.engine.protocol import Array


@click.command(short_help="Print the most likely classes of images.")
@click.argument("words", metavar="MODEL IMAGE...", nargs=-1, required=True)
@click.option("--model", hidden=True)  # the earlier form: arm predict IMAGE... --model MODEL
@click.option("--top", type=click.IntRange(min=1), default=5, show_default=True, help="Classes to show.")
@batch_size_option(32)
@weights_option
@engine_options
@json_option
def predict(
    words: tuple[str, ...],
    model: str | None,
    top: int,
    batch_size: int,
    weights: str,
    engine: EngineChoice,
    as_json: bool,
) -> None:
    """Print the most likely classes of each IMAGE.

    MODEL is a classifier: a model folder, a run or a checkpoint. IMAGE is a file or a folder of images.
    """
    from arm_cli.images import image_batches, image_files
    from arm_cli.opening import open_model
    from arm_cli.progress import ProgressBar
    from arm_cli.show import print_json
    from arm_core.model.spec import ClassifierSpec

    model, images = _model_and_images(model, words)
    opened = open_model(model, weights=weights)
    if not isinstance(opened.spec, ClassifierSpec):
        raise ValueError(
            f"{model}: a pretraining model has no classes; finetune it first: arm finetune --from"
        )
    files = image_files(images)
    runner = engine.create(opened.spec, opened.parameters)
    results: list[dict[str, Any]] = []
    with ProgressBar("predict", len(files), "images") as counter:
        for batch in image_batches(files, opened, batch_size):
            logits = runner.forward(batch)["logits"]
            for row in logits:
                results.append({"image": str(files[len(results)]), "top": best(row, opened.classes, top)})
            counter.advance(len(batch))
    if as_json:
        print_json(results)
        return
    for result in results:
        shown = "  ".join(f"{found['class']} {100 * found['probability']:.1f} %" for found in result["top"])
        echo(f"{result['image']}: {shown}")


def _model_and_images(model: str | None, words: tuple[str, ...]) -> tuple[str, tuple[str, ...]]:
    if model is not None:
        return model, words
    if len(words) == 1:
        raise ValueError(f"expected MODEL IMAGE..., found only {words[0]!r}")
    return words[0], words[1:]


def best(logits: Array, classes: tuple[str, ...], top: int) -> list[dict[str, Any]]:
    """The `top` most likely classes of one image, most likely first."""
    import numpy as np

    exponentials = np.exp(logits.astype(np.float64) - logits.max())
    probabilities = exponentials / exponentials.sum()
    order = np.argsort(-probabilities, kind="stable")[:top]
    return [{"class": classes[i], "index": int(i), "probability": float(probabilities[i])} for i in order]
