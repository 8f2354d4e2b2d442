"""`arm convert inspect`: the content of a file, from its header."""

from __future__ import annotations

import click

from arm_cli.convert.options import open_named
from arm_cli.options import json_option
from arm_cli.show import echo, print_json, print_table


@click.command()
@click.argument("model", metavar="FILE")
@click.option("--names", is_flag=True, help="List all tensors.")
@json_option
def inspect(model: str, names: bool, as_json: bool) -> None:
    """Show the content of FILE without loading its tensors.

    Prints format, size, types, metadata, and what an import would choose and leave out.
    """
    from arm_convert.describe import describe

    description = describe(open_named(model))
    if as_json:
        print_json(description.as_json())
        return
    for key, text in description.facts().items():
        echo(f"{key}: {text}")
    if names:
        rows = [
            (name, tensor.dtype, "x".join(map(str, tensor.shape)) or "scalar")
            for name, tensor in description.source.tensors.items()
        ]
        print_table(("name", "type", "shape"), rows, left=2)
