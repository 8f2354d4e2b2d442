"""`arm data pack`: images into tar shards, which read faster than many small files."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from arm_cli.options import data_format_option, json_option
from arm_cli.show import echo, scaled

if TYPE_CHECKING:
    from arm_core.data.sources import ListedSource

SAMPLES = 200
"""Images that are read from the source and from the shards to compare their speed."""


@click.command(short_help="Write images into tar shards that read fast.")
@click.argument("path")
@click.argument("out")
@click.option("--size", type=click.IntRange(min=1), help="Resize images whose short side is longer, pixels.")
@click.option(
    "--quality", type=click.IntRange(1, 100), default=95, show_default=True, help="JPEG, of resized images."
)
@click.option("--shards", type=click.IntRange(min=1), help="Number of files; by default one for 5000 images.")
@click.option("--no-labels", is_flag=True, help="Images without classes, for pretraining.")
@data_format_option
@click.option("--workers", type=click.IntRange(min=1), default=4, show_default=True, help="Threads.")
@json_option
def pack(
    path: str,
    out: str,
    size: int | None,
    quality: int,
    shards: int | None,
    no_labels: bool,
    data_format: str | None,
    workers: int,
    as_json: bool,
) -> None:
    """Write the images at PATH to the folder OUT, as WebDataset tar files with an index of their contents.

    Without --size the files are not changed, and training on OUT gives the same batches. To resume an
    interrupted call, repeat it. Every shard is read again and compared with the written data.
    """
    from arm_cli.progress import ProgressBar
    from arm_cli.show import print_json
    from arm_core.data.opening import Format, open_images
    from arm_core.data.pack import PackSettings
    from arm_core.data.pack import pack as write

    source = open_images(path, form=Format(data_format or "auto"), labels=not no_labels)
    settings = PackSettings(size=size, quality=quality, shards=shards)
    with ProgressBar("pack", len(source), "images") as bar:
        manifest = write(
            source, Path(out), settings, workers=workers, packed=lambda count: bar.advance(count)
        )
    packed = open_images(out, labels=not no_labels)
    before = sum(shard["source_bytes"] for shard in manifest["shards"])
    after = sum(shard["bytes"] for shard in manifest["shards"])
    rates = {"before": _rate(source), "after": _rate(packed)}
    if as_json:
        print_json(
            {
                "out": out,
                "images": len(packed),
                "shards": len(manifest["shards"]),
                "source_bytes": before,
                "bytes": after,
                "read_images_per_s": rates,
            }
        )
        return
    echo(
        f"{out}: {len(packed)} images in {len(manifest['shards'])} shards, {scaled(after, 'B')} "
        f"(before {scaled(before, 'B')})"
    )
    echo(
        f"read and decoded in random order, one thread: {rates['after']:.0f} images/s "
        f"(before {rates['before']:.0f})"
    )


def _rate(source: ListedSource) -> float:
    """Images per second, read in random order and decoded."""
    from arm_core.data.decode import decode
    from arm_core.model.rng import KeyedRng

    order = KeyedRng(0, "pack").permutation(len(source))[:SAMPLES].tolist()
    began = time.perf_counter()
    for index in order:
        decode(source.read(index), source.where(index))
    return len(order) / max(time.perf_counter() - began, 1e-9)
