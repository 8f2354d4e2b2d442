"""`arm convert import`: a checkpoint of any format as a model folder or a run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from arm_cli.convert.options import image_size_option, open_named, writing_options
from arm_cli.options import weights_option
from arm_cli.show import echo

if TYPE_CHECKING:
    from arm_convert.checkpoint_source import CheckpointSource
    from arm_convert.importing import Resolved


@click.command("import")
@click.argument("source")
@click.argument("out")
@weights_option
@click.option(
    "--kind", type=click.Choice(("auto", "pretrain", "classifier")), default="auto", show_default=True
)
@click.option(
    "--pooling",
    type=click.Choice(("mean", "cls")),
    help="Pooling of a classifier, if the file does not state it.",
)
@image_size_option
@click.option(
    "--with-optimizer", is_flag=True, help="Write a run that can be resumed: AdamW's state, step and recipe."
)
@click.option(
    "--allow-nonfinite", is_flag=True, help="Report NaN and infinite weights instead of refusing them."
)
@writing_options
def import_checkpoint(
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
    """Read SOURCE and write the model folder OUT.

    SOURCE is an official .pth (as torch.save writes it, in the old or new format) or .safetensors file, a
    file that `arm convert export` wrote, a run, a model folder, or hf://user/name. No pickle is executed
    and torch is not needed. Contents that do not belong to the model are listed.
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
    _report(opened, resolved, out)
    for report in reports:
        echo(f"  warning: {report}")


def _import_run(opened: CheckpointSource, resolved: Resolved, out: str, *, weights: str, force: bool) -> None:
    import shlex

    from arm_convert.official_run import import_run

    if weights != "raw" or force:
        raise ValueError("--with-optimizer cannot be combined with --weights ema or --force")
    recipe = import_run(opened, resolved, Path(out))
    _report(opened, resolved, out, but="optimizer")
    resume = f"arm {recipe.stage} --resume {shlex.quote(out)} --data IMAGES"
    echo(f"  recipe: {out}/recipe.toml; to resume the run: {resume}")


def _report(opened: CheckpointSource, resolved: Resolved, out: str, *, but: str = "") -> None:
    """Print what was read, decided, left out and written."""
    from arm_convert.describe import Description

    facts = Description(opened, resolved, None).facts()
    echo(f"{facts['file']}: {facts['format']}")
    echo(f"  model: {facts['model']}")
    for choice in resolved.choices:
        echo(f"  {choice}")
    for item in resolved.left_out:
        if not (but and item.startswith(repr(but))):
            echo(f"  left out: {item}")
    echo(f"  written: {out}")
