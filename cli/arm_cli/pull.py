"""`arm pull`: download a checkpoint and convert it to a model folder."""

from __future__ import annotations

import click

from arm_cli.options import weights_option


@click.command(short_help="Download and convert a published checkpoint.")
@click.argument("name")
@click.argument("out", required=False)
@weights_option
@click.option("--force", is_flag=True, help="Download and convert again, replacing the folder.")
def pull(name: str, out: str | None, weights: str, force: bool) -> None:
    """Download NAME, convert it to the model folder OUT, and check the result.

    NAME is a published checkpoint (`arm models` lists them) or hf://user/name[@revision][/file]. Without OUT
    the model is kept in the cache ($ARM_VISION_CACHE, else ~/.cache/arm-vision). An interrupted download is
    resumed. Files in the cache are used without a network.
    """
    from arm_cli.show import echo
    from arm_convert.published import pull as download
    from arm_core.files.model_folder import read_model
    from arm_core.model.parameters import count_parameters

    folder = download(name, out, weights=weights, force=force)
    spec = read_model(folder).spec
    echo(f"{folder}: {count_parameters(spec):,} trainable parameters")
