"""`arm convert verify`: compares the results of backends, or of two models."""

from __future__ import annotations

import click

from arm_cli.convert.options import resolve_model
from arm_cli.options import json_option, weights_option
from arm_cli.show import echo, print_json, print_table


@click.command()
@click.argument("models", metavar="A [B]", nargs=-1, required=True)
@click.option("--backends", help="Comma-separated: reference, mlx, torch. [default: all that can run here]")
@click.option("--device", default="auto", help="cpu, gpu (MLX), cuda or cuda:1 (torch).")
@click.option(
    "--batch", type=click.IntRange(min=1), default=2, show_default=True, help="Images in the batch."
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of the images.")
@click.option(
    "--tolerance",
    type=click.FloatRange(min=0, min_open=True),
    default=1.0,
    show_default=True,
    help="Factor on the tolerances.",
)
@click.option("--no-gradients", is_flag=True, help="Compare outputs and losses only.")
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
    """Compare the results of backends, or of two models.

    The same batch runs through A with each backend, or through A and B. Prints the largest absolute and
    relative difference of each output, the loss, and the gradients of each part of the model. The exit
    code is 1 if a difference exceeds its tolerance.
    """
    import numpy as np

    from arm_convert.verify import usable_backends
    from arm_convert.verify import verify as run

    if len(models) > 2:
        raise ValueError(f"expected one or two models, found {len(models)}")
    names = [name.strip() for name in backends.split(",")] if backends else usable_backends()
    opened = []
    for name in models:
        found = resolve_model(name, weights)
        parameters = {key: np.asarray(tensor.read(), np.float32) for key, tensor in found.tensors.items()}
        opened.append((name, found.spec, parameters))
    report = run(
        opened, names, batch_size=batch, seed=seed, device=device, gradients=not no_gradients, scale=tolerance
    )
    if as_json:
        print_json(report.as_json())
    else:
        for name, how in report.ran.items():
            echo(f"{name}: {how}")
        rows = [
            (
                line.quantity,
                f"{line.first} / {line.second}",
                f"{line.absolute:.1e}",
                f"{line.relative:.1e}",
                f"{line.tolerance:.0e}",
                "ok" if line.within else "EXCEEDED",
            )
            for line in report.lines
        ]
        print_table(("quantity", "between", "absolute", "relative", "tolerance", ""), rows, left=2)
        exceeded = sum(not line.within for line in report.lines)
        echo("agree" if report.holds else f"differ: {exceeded} of {len(rows)} exceed their tolerance")
    if not report.holds:
        ctx.exit(1)
