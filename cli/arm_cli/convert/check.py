"""`arm convert verify`, `inspect` and `diff`: what is in a file, and whether two compute the same."""

from __future__ import annotations

import click

from arm_cli.convert.options import open_named, resolve_model
from arm_cli.options import json_option, weights_option
from arm_cli.show import print_json, print_table


@click.command()
@click.argument("models", metavar="A [B]", nargs=-1, required=True)
@click.option("--backends", help="Comma-separated: reference, mlx, torch. [default: all that can run here]")
@click.option("--device", default="auto", help="cpu, gpu (MLX), cuda or cuda:1 (torch).")
@click.option(
    "--batch", type=click.IntRange(min=1), default=2, show_default=True, help="Images in the batch."
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the images.")
@click.option(
    "--tolerance", type=float, default=1.0, show_default=True, help="Factor on the stated tolerances."
)
@click.option("--no-gradients", is_flag=True, help="Compare outputs and losses alone.")
@weights_option
@json_option
@click.pass_context
def verify(
    ctx: click.Context,
    models: tuple[str, ...],
    backends: str | None,
    device: str,
    batch: int,
    seed: int,
    tolerance: float,
    no_gradients: bool,
    weights: str,
    as_json: bool,
) -> None:
    """Compare what engines, or two models, compute.

    A fixed batch runs through A with each backend, or through A and B. Prints the largest absolute and
    relative difference of every output, the loss, and the gradients of each part of the model. Exit code 1
    where one is beyond its tolerance.
    """
    import numpy as np

    from arm_convert.verify import usable_backends
    from arm_convert.verify import verify as run

    if len(models) > 2:
        raise ValueError(f"expected one model or two, found {len(models)}")
    names = [name.strip() for name in backends.split(",")] if backends else usable_backends()
    opened = []
    for name in models:
        found = resolve_model(name, weights)
        parameters = {key: np.asarray(tensor.read(), np.float32) for key, tensor in found.tensors.items()}
        opened.append((name, found.spec, parameters))
    certificate = run(
        opened, names, batch_size=batch, seed=seed, device=device, gradients=not no_gradients, scale=tolerance
    )
    if as_json:
        print_json(certificate.as_json())
    else:
        for name, how in certificate.ran.items():
            click.echo(f"{name}: {how}")
        rows = [
            (
                line.quantity,
                f"{line.first} / {line.second}",
                f"{line.absolute:.1e}",
                f"{line.relative:.1e}",
                f"{line.tolerance:.0e}",
                "ok" if line.within else "BEYOND",
            )
            for line in certificate.lines
        ]
        print_table(("quantity", "between", "absolute", "relative", "tolerance", ""), rows, left=2)
        beyond = sum(not line.within for line in certificate.lines)
        click.echo(
            "agree" if certificate.holds else f"differ: {beyond} of {len(rows)} beyond their tolerance"
        )
    if not certificate.holds:
        ctx.exit(1)


@click.command()
@click.argument("model", metavar="FILE")
@click.option("--names", is_flag=True, help="List every tensor.")
@json_option
def inspect(model: str, names: bool, as_json: bool) -> None:
    """Show what FILE holds, without loading it.

    Kind, size, types, names, metadata, and what importing it would choose and leave out.
    """
    from arm_convert.describe import describe
    from arm_core.files.errors import printable

    description = describe(open_named(model))
    if as_json:
        print_json(description.as_json())
        return
    for key, text in description.facts().items():
        click.echo(printable(f"{key}: {text}"))
    if names:
        rows = [
            (name, tensor.dtype, "x".join(map(str, tensor.shape)) or "scalar")
            for name, tensor in description.source.tensors.items()
        ]
        print_table(("name", "type", "shape"), rows, left=2)


@click.command()
@click.argument("first", metavar="A")
@click.argument("second", metavar="B")
@click.option("--top", type=click.IntRange(min=1), default=20, show_default=True, help="Tensors shown.")
@weights_option
@json_option
@click.pass_context
def diff(ctx: click.Context, first: str, second: str, top: int, weights: str, as_json: bool) -> None:
    """Compare names, shapes and values of A and B.

    Two models are compared by our names, whatever their formats; other files by their own names. Exit
    code 1 where they differ.
    """
    from arm_convert.diff import diff as compare

    a, b = (_tensors(name, weights) for name in (first, second))
    if a[1] != b[1]:
        raise ValueError(f"{first} and {second} cannot be compared: one of them is no ARM model")
    found = compare(a[0], b[0])
    if as_json:
        print_json(found.as_json())
        ctx.exit(0 if found.same else 1)
    for name in found.only_first:
        click.echo(f"only in {first}: {name}")
    for name in found.only_second:
        click.echo(f"only in {second}: {name}")
    for name, shapes in found.shapes.items():
        click.echo(f"{name}: shapes {shapes[0]} and {shapes[1]}")
    if found.types:
        name, types = next(iter(found.types.items()))
        click.echo(
            f"{len(found.types)} tensors stored in another type, such as {name}: {types[0]} and {types[1]}"
        )
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
    click.echo(f"{found.equal} tensors equal, {len(found.changes)} changed")
    ctx.exit(0 if found.same else 1)


def _tensors(name: str, weights: str):  # type: ignore[no-untyped-def]
    """The tensors of a model by our names and True, or those of another file by its own and False."""
    from arm_convert.importing import resolve
    from arm_core.training.model_source import Weights

    source = open_named(name)
    try:
        return resolve(source, weights=Weights(weights)).tensors, True
    except ValueError:
        return source.tensors, False
