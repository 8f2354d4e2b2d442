"""`arm convert resize`: a model for another image size."""

from __future__ import annotations

import click

from arm_cli.convert.options import (
    changes_model,
    image_size_option,
    resolve_model,
    write_changed,
    writing_options,
)
from arm_cli.options import weights_option


@click.command()
@click.argument("model")
@click.argument("out")
@image_size_option
@weights_option
@writing_options
@changes_model
def resize(
    model: str, out: str, image_size: tuple[int, int] | None, weights: str, force: bool, shard_size: int
) -> None:
    """Write MODEL for another image size as OUT.

    The position table of a classifier is resized (bicubic), except for the row of its class token. The
    tables of a pretraining model are computed for the new size.
    """
    from arm_convert import adapt
    from arm_core.files.metadata import with_history

    if image_size is None:
        raise ValueError("pass the new size with --image-size")
    found = resolve_model(model, weights)
    spec, tensors = adapt.resize(found.spec, found.tensors, image_size)
    metadata = with_history(found.metadata, f"resized to {image_size[0]}x{image_size[1]} pixels")
    write_changed(out, spec, tensors, metadata, force=force, shard_size=shard_size)
