"""`arm convert export`: a model as a file for other programs."""

from __future__ import annotations

from pathlib import Path

import click

from arm_cli.convert.options import force_option, resolve_model
from arm_cli.options import weights_option
from arm_cli.show import echo


@click.command()
@click.argument("model")
@click.argument("out")
@click.option(
    "--to",
    type=click.Choice(("official", "torch", "mlx")),
    required=True,
    help="The official code, or plain torch.nn or mlx.nn modules.",
)
@weights_option
@force_option
def export(model: str, out: str, to: str, weights: str, force: bool) -> None:
    """Write MODEL for other programs.

    OUT is a file name that ends in .safetensors or (except for mlx) in .pth.

    `official` writes the names, shapes and layout that the official load_state_dict(strict=True) expects; a
    .pth holds them under "model". `torch` and `mlx` use the names of this package and the convolution
    layouts of each framework; docs/convert.md shows how to load them.
    """
    from arm_convert.export import Format, export_model

    resolved = resolve_model(model, weights)
    export_model(resolved.spec, resolved.tensors, resolved.metadata, Path(out), Format(to), force=force)
    echo(f"{out}: written for {to}")
