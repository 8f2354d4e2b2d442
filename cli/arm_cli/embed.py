"""`arm embed`: the outputs of a model on images, as arrays in a file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from arm_cli.options import EngineChoice, batch_size_option, engine_options, weights_option
from arm_cli.show import echo

if TYPE_CHECKING:
    from arm_cli.opening import Opened
    from arm_core.engine.protocol import Array


@click.command(short_help="Write features and other outputs to a file.")
@click.argument("model")
@click.argument("images", metavar="[IMAGE]...", nargs=-1)
@click.option("--array", metavar="X.NPY", help="Normalized float32 images (B, 3, H, W) instead of files.")
@click.option("--out", required=True, metavar="FILE", help="File to write: .npz or .parquet.")
@click.option("--only", metavar="NAMES", help="Only write these outputs, separated by commas.")
@click.option(
    "--pool",
    type=click.Choice(("default", "mean", "cls", "none")),
    help="Only write `features`, with tokens reduced this way; none keeps every patch.",
)
@click.option("--block", type=int, help="Write `features` of this block; 0 is the first, -1 the last.")
@click.option("--labels", is_flag=True, help="Also write `labels`: the name of each image's folder.")
@batch_size_option(32)
@weights_option
@engine_options
def embed(
    model: str,
    images: tuple[str, ...],
    array: str | None,
    out: str,
    only: str | None,
    pool: str | None,
    block: int | None,
    labels: bool,
    batch_size: int,
    weights: str,
    engine: EngineChoice,
) -> None:
    """Write the outputs of MODEL on images to FILE, batch by batch.

    IMAGE is an image file, or a folder of them. A classifier gives `features` (B, width), the vector
    before the head, and `logits` (B, classes). A pretraining model gives `decoder_input` (B, tokens,
    decoder width, decoder depth), also under its earlier name `encoder`, `prediction` (B, tokens, patch
    values), `loss_per_token` (tokens,) and `loss`. Names of image files are stored as `images`.
    """
    from arm_cli.arrays import read_array
    from arm_cli.feature_file import feature_file
    from arm_cli.images import image_batches, image_files
    from arm_cli.opening import open_model
    from arm_cli.progress import ProgressBar

    if bool(images) == (array is not None):
        raise ValueError("pass either IMAGE... or --array X.NPY")
    if array is not None and labels:
        raise ValueError("--labels: an array has no folders; leave it out")
    opened = open_model(model, weights=weights)
    columns: dict[str, list[str]] = {}
    if array is not None:
        pixels = read_array(array, opened.spec.image_size, opened.spec.encoder.channels)
        total = len(pixels)
        batches: Iterable[Array] = (pixels[i : i + batch_size] for i in range(0, total, batch_size))
    else:
        files = image_files(images)
        total, batches = len(files), image_batches(files, opened, batch_size)
        columns["images"] = [str(file) for file in files]
        if labels:
            columns["labels"] = [file.absolute().parent.name for file in files]
    compute = _outputs(opened, engine, pool, block)
    with feature_file(Path(out), total, columns) as file, ProgressBar("embed", total, "images") as progress:
        for batch in batches:
            file.add(_chosen(compute(batch), only))
            progress.advance(len(batch))
    echo(f"{out}: {', '.join(f'{name} {shape}' for name, shape in file.shapes().items())}", err=True)


def _outputs(
    opened: Opened, engine: EngineChoice, pool: str | None, block: int | None
) -> Callable[[Array], Mapping[str, Any]]:
    """The function from a batch to the outputs that are written."""
    if pool is None and block is None:
        runner = engine.create(opened.spec, opened.parameters)

        def outputs(batch: Array) -> Mapping[str, Any]:
            found = runner.forward(batch)
            return {**found, "encoder": found["decoder_input"]} if "decoder_input" in found else found

        return outputs
    module = engine.create_module(opened.spec, opened.parameters)
    return lambda batch: {"features": module.extract(batch, block=block, pool=pool or "default")}


def _chosen(outputs: Mapping[str, Any], only: str | None) -> Mapping[str, Any]:
    if only is None:
        return outputs
    names = [name.strip() for name in only.split(",")]
    if unknown := [name for name in names if name not in outputs]:
        raise ValueError(f"--only: unknown output {unknown[0]!r}; this model has {', '.join(outputs)}")
    return {name: outputs[name] for name in names}
