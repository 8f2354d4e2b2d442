"""`arm convert diff`: how two models or files differ."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from arm_cli.convert.options import open_named
from arm_cli.options import json_option, weights_option
from arm_cli.show import echo, print_json, print_table

if TYPE_CHECKING:
    from arm_core.files.safetensors import Tensor


@click.command()
@click.argument("first", metavar="A")
@click.argument("second", metavar="B")
@click.option("--top", type=click.IntRange(min=1), default=20, show_default=True, help="Tensors to show.")
@weights_option
@json_option
@click.pass_context
def diff(ctx: click.Context, first: str, second: str, top: int, weights: str, as_json: bool) -> None:
    """Compare names, shapes and values of A and B.

    Two models are compared under the names of this package, whatever their formats; other files under
    their own names. The exit code is 1 if they differ.
    """
    from arm_convert.diff import diff as compare

    (a, a_is_model), (b, b_is_model) = (_tensors(name, weights) for name in (first, second))
    if a_is_model != b_is_model:
        other = second if a_is_model else first
        raise ValueError(f"{first} and {second} cannot be compared: {other} is not an ARM model")
    found = compare(a, b)
    if as_json:
        print_json(found.as_json())
        ctx.exit(0 if found.same else 1)
    for name in found.only_first:
        echo(f"only in {first}: {name}")
    for name in found.only_second:
        echo(f"only in {second}: {name}")
    for name, shapes in found.shapes.items():
        echo(f"{name}: shapes {shapes[0]} and {shapes[1]}")
    if found.types:
        name, types = next(iter(found.types.items()))
        echo(f"{len(found.types)} tensors differ in their type, such as {name}: {types[0]} and {types[1]}")
    if found.changes:
        rows = [
            (
                change.name,
                f"{change.largest:.1e}",
                f"{change.relative:.1e}",
                f"{change.changed}/{change.values}",
            )
            for change in found.changes[:top]
        ]
        print_table(("tensor", "largest difference", "relative", "values changed"), rows)
    echo(f"{found.equal} tensors equal, {len(found.changes)} changed")
    ctx.exit(0 if found.same else 1)


def _tensors(name: str, weights: str) -> tuple[dict[str, Tensor], bool]:
    """The tensors and whether this is a model: a model's under our names, another file's under its own."""
    from arm_convert.importing import resolve
    from arm_core.training.model_source import Weights

    source = open_named(name)
    try:
        return resolve(source, weights=Weights(weights)).tensors, True
    except ValueError:
        return source.tensors, False
