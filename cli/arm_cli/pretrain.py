"""`arm pretrain`: learn to predict images cluster by cluster."""

from __future__ import annotations

import click

from arm_cli.training.options import Request, training_options


@click.command(short_help="Learn from images without labels, cluster by cluster.")
@training_options
def pretrain(request: Request) -> None:
    """Pretrain a model with RECIPE on images without labels.

    RECIPE is a shipped recipe (`arm recipe list`): digits, tiny, small, base, large or huge; or a .toml
    file. Examples:

    \b
      arm pretrain digits
      arm pretrain tiny --data IMAGES --out RUN --epochs 10
      arm pretrain tiny --data IMAGES --dry-run
      arm pretrain --resume RUN
    """
    from arm_cli.training.start import run_training

    run_training("pretrain", request)
