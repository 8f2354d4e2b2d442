"""`arm embed`: outputs of a model for images, as arrays in a file."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from arm_cli.options import EngineChoice, batch_size_option, engine_options, weights_option
from arm_cli.show import echo

if TYPE_CHECKING:
    from arm_core.engine.protocol import Array


@click.command(short_help="Write features and other outputs to a file.")
@click.argument("model")
@click.argument("images", metavar="[IMAGE]...", nargs=-1)
@click.option("--array", metavar="X.NPY", help="Normalised float32 images (B, 3, H, W) instead of files.")
@click.option("--out", required=True, metavar="OUT.NPZ", help="File to write.")
@batch_size_option(32)
@weights_option
@engine_options
def embed(
    model: str,
    images: tuple[str, ...],
    array: str | None,
    out: str,
    batch_size: int,
    weights: str,
    engine: EngineChoice,
) -> None:
    """Write the outputs of MODEL for images to OUT.NPZ.

    IMAGE is an image file or a folder of images. A classifier gives `features` (B, width), the pooled
    vector before the head, and `logits` (B, classes). A pretraining model gives `decoder_input` (B, tokens,
    decoder width, taps), `prediction` (B, tokens, patch pixels), `loss_per_token` (tokens,) and `loss`.
    `encoder` is the earlier name of `decoder_input`. Names of image files are stored as `images`.
    """
    import numpy as np

    from arm_cli.arrays import join, read_array, write_npz
    from arm_cli.images import image_batches, image_files
    from arm_cli.opening import open_model
    from arm_cli.progress import ProgressBar

    if bool(images) == (array is not None):
        raise ValueError("pass either IMAGE... or --array X.NPY")
    if not Path(out).absolute().parent.is_dir():
        raise ValueError(f"{out}: the folder {Path(out).parent} does not exist")
    opened = open_model(model, weights=weights)
    size = opened.spec.image_size
    if array is not None:
        pixels = read_array(array, size, opened.spec.encoder.channels)
        total, names = len(pixels), None
        batches: Iterable[Array] = (pixels[i : i + batch_size] for i in range(0, total, batch_size))
    else:
        files = image_files(images)
        total, names = len(files), np.array([str(file) for file in files])
        batches = image_batches(files, opened, batch_size)
    runner = engine.create(opened.spec, opened.parameters)
    results = []
    with ProgressBar("embed", total, "images") as counter:
        for batch in batches:
            results.append((len(batch), runner.forward(batch)))
            counter.advance(len(batch))
    arrays = join(results)
    if names is not None:
        arrays["images"] = names
    if "decoder_input" in arrays:
        arrays["encoder"] = arrays["decoder_input"]  # its earlier name
    write_npz(Path(out), arrays)
    shapes = ", ".join(f"{name} {value.shape}" for name, value in arrays.items())
    echo(f"{out}: {shapes}", err=True)
