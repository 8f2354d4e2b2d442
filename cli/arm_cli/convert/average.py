"""`arm convert average`: the mean of several models."""

from __future__ import annotations

import click

from arm_cli.convert.options import changes_model, resolve_model, write_changed, writing_options
from arm_cli.options import weights_option


@click.command()
@click.argument("models", nargs=-1, required=True)
@click.argument("out")
@weights_option
@writing_options
@changes_model
def average(models: tuple[str, ...], out: str, weights: str, force: bool, shard_size: int) -> None:
    """Average the weights of two or more MODELS into OUT.

    The models must have the same specification.
    """
    from pathlib import Path

    from arm_convert import adapt
    from arm_convert.describe import differing_fields
    from arm_core.files.metadata import with_history

    if len(models) < 2:
        raise ValueError("expected two or more models, followed by OUT")
    found = [resolve_model(name, weights) for name in models]
    for name, other in zip(models[1:], found[1:], strict=True):
        if different := differing_fields(found[0].spec, other.spec):
            raise ValueError(f"{models[0]} and {name} are different models: {different}")
    tensors = adapt.average([model.tensors for model in found])
    names = ", ".join(Path(name).name for name in models)
    metadata = with_history(found[0].metadata, f"averaged over {names}")
    write_changed(out, found[0].spec, tensors, metadata, force=force, shard_size=shard_size)
