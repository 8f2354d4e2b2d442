"""`arm convert push`: a model to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

import click

from arm_cli.convert.options import open_named, shard_option
from arm_cli.options import weights_option
from arm_cli.show import echo


@click.command()
@click.argument("model")
@click.argument("target", metavar="hf://USER/NAME[@BRANCH]")
@weights_option
@click.option("--private", is_flag=True, help="Make the repository private if it is created.")
@click.option("--message", default="Upload an ARM model", show_default=True, help="Commit message.")
@shard_option
def push(model: str, target: str, weights: str, private: bool, message: str, shard_size: int) -> None:
    """Upload MODEL to the Hugging Face hub.

    A model card is written from the metadata of the model. Needs `pip install 'arm-vision[hub]'` and a
    login (`hf auth login`).
    """
    import tempfile

    from arm_convert.card import model_card, run_recipe
    from arm_convert.hub import parse_address
    from arm_convert.hub import push as upload
    from arm_convert.importing import resolve
    from arm_core.files.model_folder import write_model
    from arm_core.training.model_source import Weights

    parse_address(target)
    source = open_named(model)
    resolved = resolve(source, weights=Weights(weights))
    card = model_card(resolved.spec, resolved.metadata, recipe=run_recipe(source))
    with tempfile.TemporaryDirectory() as scratch:
        folder = write_model(
            Path(scratch) / "model",
            resolved.spec,
            resolved.tensors,
            metadata=resolved.metadata,
            shard_size=shard_size,
            card=card,
        )
        echo(upload(folder, target, private=private, message=message))
