"""`arm convert import`, `export` and `push`: models from and to other programs."""

from __future__ import annotations

from pathlib import Path

import click

from arm_cli.convert.options import (
    force_option,
    image_size_option,
    open_named,
    resolve_model,
    shard_option,
    writing_options,
)
from arm_cli.options import weights_option


@click.command("import")
@click.argument("source")
@click.argument("out")
@weights_option
@click.option(
    "--kind", type=click.Choice(("auto", "pretrain", "classifier")), default="auto", show_default=True
)
@click.option(
    "--pooling", type=click.Choice(("mean", "cls")), help="How a classifier pools, if the file is silent."
)
@image_size_option
@click.option(
    "--with-optimizer", is_flag=True, help="Write a run that goes on: AdamW's state, step and recipe."
)
@click.option(
    "--allow-nonfinite", is_flag=True, help="Report NaN and infinite weights instead of refusing them."
)
@writing_options
def import_command(
    source: str,
    out: str,
    weights: str,
    kind: str,
    pooling: str | None,
    image_size: tuple[int, int] | None,
    with_optimizer: bool,
    allow_nonfinite: bool,
    force: bool,
    shard_size: int,
) -> None:
    """Read SOURCE into the model folder OUT.

    SOURCE is an official .pth (as torch.save writes it, old or new format) or .safetensors, a file that
    `arm convert export` wrote, a run, a model folder, or hf://user/name. No pickle is executed and torch is
    not needed. Whatever the file holds beyond the model is listed.
    """
    from arm_convert.importing import import_model, resolve
    from arm_core.model.spec import Pooling
    from arm_core.training.model_source import Weights

    opened = open_named(source)
    resolved = resolve(
        opened,
        weights=Weights(weights),
        kind=kind,
        pooling=None if pooling is None else Pooling(pooling),
        image_size=image_size,
    )
    if with_optimizer:
        _import_run(opened, resolved, out, weights=weights, force=force)
        return
    reports = import_model(
        opened,
        resolved,
        Path(out),
        force=force,
        shard_size=shard_size,
        allow_nonfinite=allow_nonfinite,
    )
    _tell(opened, resolved, out)
    for report in reports:
        click.echo(f"  warning: {report}")


def _import_run(opened, resolved, out: str, *, weights: str, force: bool) -> None:  # type: ignore[no-untyped-def]
    from arm_convert.official_run import import_run

    if weights != "raw" or force:
        raise ValueError(
            "--with-optimizer takes neither --weights ema nor --force: a run has its own weights"
        )
    recipe = import_run(opened, resolved, Path(out))
    _tell(opened, resolved, out, but="optimizer")
    click.echo(f"  recipe: {out}/recipe.toml; go on with: arm {recipe.stage} --resume {out} --data IMAGES")


def _tell(opened, resolved, out: str, *, but: str = "") -> None:  # type: ignore[no-untyped-def]
    """What was read, what was decided, what was left out, what was written."""
    from arm_convert.describe import Description

    facts = Description(opened, resolved, None).facts()
    click.echo(f"{facts['file']}: {facts['format']}")
    click.echo(f"  model: {facts['model']}")
    for choice in resolved.choices:
        click.echo(f"  {choice}")
    for item in resolved.left_out:
        if not (but and item.startswith(repr(but))):
            click.echo(f"  left out: {item}")
    click.echo(f"  written: {out}")


@click.command("export")
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
def export_command(model: str, out: str, to: str, weights: str, force: bool) -> None:
    """Write MODEL for other programs.

    OUT is a file name that ends in .safetensors or (not for mlx) in .pth.

    `official` has the names, shapes and layout that the official load_state_dict(strict=True) takes; a
    .pth holds them under "model". `torch` and `mlx` have our names and each framework's own convolution
    layouts; docs/convert.md shows how to load them.
    """
    from arm_convert.export import Format, export_model

    resolved = resolve_model(model, weights)
    export_model(resolved.spec, resolved.tensors, resolved.metadata, Path(out), Format(to), force=force)
    click.echo(f"{out}: written for {to}")


@click.command()
@click.argument("model")
@click.argument("target", metavar="hf://USER/NAME[@BRANCH]")
@weights_option
@click.option("--private", is_flag=True, help="Make the repository private if it is created.")
@click.option("--message", default="Upload an ARM model", show_default=True, help="Commit message.")
@shard_option
def push(model: str, target: str, weights: str, private: bool, message: str, shard_size: int) -> None:
    """Upload MODEL to the Hugging Face hub.

    A model card is made from what is known about it. Needs `pip install 'arm-vision[hub]'` and a login
    (`hf auth login`).
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
        click.echo(upload(folder, target, private=private, message=message))
