"""`arm convert cast`: a model stored in another type."""

from __future__ import annotations

import click

from arm_cli.convert.options import changes_model, resolve_model, write_changed, writing_options
from arm_cli.options import weights_option

TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


@click.command()
@click.argument("model")
@click.argument("out")
@click.option("--dtype", type=click.Choice(tuple(TYPES)), required=True, help="Type of the stored weights.")
@weights_option
@writing_options
@changes_model
def cast(model: str, out: str, dtype: str, weights: str, force: bool, shard_size: int) -> None:
    """Store MODEL in another type as OUT.

    The scan's A_log, D and dt bias stay float32.
    """
    from arm_convert import adapt
    from arm_core.files.metadata import with_history

    found = resolve_model(model, weights)
    tensors = adapt.cast(found.tensors, TYPES[dtype])
    metadata = with_history(found.metadata, f"stored as {dtype}")
    write_changed(out, found.spec, tensors, metadata, force=force, shard_size=shard_size)
