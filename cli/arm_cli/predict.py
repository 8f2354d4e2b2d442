"""`arm predict`: the classes that a classifier sees in images."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from arm_cli.options import EngineChoice, ema_option, engine_options, json_option

if TYPE_CHECKING:
    from arm_core.engine.protocol import Array


@click.command(short_help="Name the likeliest classes of images.")
@click.argument("images", metavar="IMAGE...", nargs=-1, required=True)
@click.option("--model", required=True, help="A classifier: model folder, run or checkpoint.")
@click.option("--top", type=click.IntRange(min=1), default=5, show_default=True, help="Classes to show.")
@click.option("--batch-size", type=click.IntRange(min=1), default=32, show_default=True)
@ema_option
@engine_options
@json_option
def predict(
    images: tuple[str, ...],
    model: str,
    top: int,
    batch_size: int,
    ema: bool,
    engine: EngineChoice,
    as_json: bool,
) -> None:
    """Name the likeliest classes of each IMAGE, a file or a folder of them."""
    from arm_cli.images import image_batches, image_files
    from arm_cli.models import open_model
    from arm_cli.progress import ProgressBar
    from arm_cli.show import print_json
    from arm_core.model.spec import ClassifierSpec

    opened = open_model(model, ema=ema)
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
        click.echo(f"{result['image']}: {shown}")


def best(logits: Array, classes: tuple[str, ...], top: int) -> list[dict[str, Any]]:
    """The `top` likeliest classes of one image, likeliest first."""
    import numpy as np

    exponentials = np.exp(logits.astype(np.float64) - logits.max())
    probabilities = exponentials / exponentials.sum()
    order = np.argsort(-probabilities, kind="stable")[:top]
    return [{"class": classes[i], "index": int(i), "probability": float(probabilities[i])} for i in order]
