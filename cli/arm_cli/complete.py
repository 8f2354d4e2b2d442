"""`arm complete`: the predictions of a pretraining model on images, cluster by cluster."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from arm_cli.options import EngineChoice, engine_options, weights_option

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from arm_core.model.spec import PretrainSpec

PAGE = "index.html"
MOST = 40
"""Images of a page."""


@click.command(short_help="Show what a pretraining model predicts.")
@click.argument("model")
@click.argument("images", metavar="IMAGE...", nargs=-1, required=True)
@click.option("--out", required=True, metavar="FOLDER", help="Folder for the page and the pictures.")
@click.option("--from", "given", metavar="N", type=click.IntRange(min=1), default=1, show_default=True,
              help="True clusters that the rollout starts from.")  # fmt: skip
@click.option(
    "--statistics",
    type=click.Choice(["nearest", "true"]),
    default="nearest",
    show_default=True,
    help="Source of each patch's mean and variance in a rollout of normalised targets.",
)
@weights_option
@engine_options
def complete(
    model: str,
    images: tuple[str, ...],
    out: str,
    given: int,
    statistics: str,
    weights: str,
    engine: EngineChoice,
) -> None:
    """Show how MODEL predicts each IMAGE, cluster by cluster.

    MODEL is a pretraining model. IMAGE is a file or a folder of images. Each cluster is predicted from the
    true clusters before it. In a rollout, it is predicted from the first N clusters and the predictions
    before it. FOLDER will contain an interactive page (index.html) and a PNG for each image, which shows the
    image, the prediction step by step, and the rollout.
    """
    import numpy as np

    from arm_cli.images import image_batches, image_files
    from arm_cli.opening import open_model
    from arm_cli.pages.pictures import ready_folder, save_row, stems
    from arm_cli.pages.shell import check_count, picture, render
    from arm_cli.progress import ProgressBar
    from arm_cli.show import echo
    from arm_core.data.transforms import denormalize
    from arm_core.explain.completion import complete as predict
    from arm_core.files.atomic import replace_text
    from arm_core.model.spec import PretrainSpec
    from arm_core.model.tokens import patch_order

    opened = open_model(model, weights=weights)
    spec = opened.spec
    if not isinstance(spec, PretrainSpec):
        raise ValueError(f"{model}: expected a pretraining model, found a classifier; it predicts no pixels")
    if given >= spec.clusters:
        raise ValueError(
            f"--from: expected 1 to {spec.clusters - 1} of {spec.clusters} clusters, found {given}"
        )
    files = image_files(images)
    check_count(files, MOST)
    folder = ready_folder(out)
    runner = engine.create(spec, opened.parameters)
    shown: list[dict[str, Any]] = []
    with ProgressBar("complete", len(files), "images") as counter:
        for file, name, batch in zip(files, stems(files), image_batches(files, opened, 1), strict=True):
            found = predict(runner, batch, given=given, statistics=statistics)
            pixels = [
                denormalize(x[0], opened.transform.mean, opened.transform.std)
                for x in (batch, found.step_by_step, found.rollout)
            ]
            save_row(folder / f"{name}.png", pixels)
            shown.append({
                "name": file.name,
                **dict(zip(("true", "steps", "rollout"), map(picture, pixels), strict=True)),
                "stepLoss": numbers(found.step_loss[0]),
                "stepPixels": numbers(found.step_pixels[0]),
                "rolloutLoss": numbers(found.rollout_loss[0]),
                "rolloutPixels": numbers(found.rollout_pixels[0]),
            })  # fmt: skip
            counter.advance(1)
    data = {
        "grid": spec.grid,
        "size": spec.image_size,
        "patch": spec.encoder.patch,
        "clusters": patch_order(spec).reshape(spec.clusters, -1).tolist(),
        "given": given,
        "images": shown,
    }
    page = render(
        "Predicted clusters",
        captions(spec, statistics),
        "completion.js",
        data,
        footer=f"Model: {opened.folder}",
    )
    replace_text(folder / PAGE, page)
    for image in shown:
        losses = [np.mean([v for v in image[k] if v is not None]) for k in ("stepLoss", "rolloutLoss")]
        echo(f"{image['name']}: loss {losses[0]:.4f} from true clusters, {losses[1]:.4f} in the rollout")
    echo(f"wrote {folder / PAGE}", err=True)


def captions(spec: PretrainSpec, statistics: str) -> list[str]:
    """The explanation on the page."""
    from arm_core.model.spec import Target

    lead = (
        f"The model reads an image in {spec.clusters} clusters of {spec.cluster[0]}x{spec.cluster[1]} "
        "patches and predicts each cluster from those before it. Step by step, the clusters before are "
        "the true ones; in the rollout, those after the given ones are its own predictions."
    )
    units = "pixels: root mean square error of normalised pixels."
    if spec.target is Target.RAW:
        return [
            lead,
            f"The model predicts raw pixels. loss: mean squared error as in training; {units}",
        ]
    source = {
        "nearest": "those of the nearest patch in the clusters before, so the true patch is not used",
        "true": "the true ones, so the rollout knows each patch's brightness and contrast",
    }[statistics]
    return [
        lead,
        "This model predicts each patch normalised to mean 0 and variance 1, so the pictures need a mean "
        f"and a variance for each patch. Step by step they are the true ones; in the rollout they are "
        f"{source}. loss: mean squared error of the normalised patches, as in training; {units}",
    ]


def numbers(values: npt.NDArray[np.floating]) -> list[float | None]:
    """For JSON: rounded, None where there is no value."""
    return [None if value != value else round(float(value), 4) for value in values]
