"""`arm pretrain`: learn to predict images cluster by cluster."""

from __future__ import annotations

import click

from arm_cli.training import Request, fresh_parameters, run_training, training_options


@click.command(short_help="Learn from images without labels, cluster by cluster.")
@training_options
def pretrain(request: Request) -> None:
    """Pretrain a model as RECIPE says, without labels.

    RECIPE is a shipped one (base, large, huge, tiny, digits) or a .toml file. Examples:

    \b
      arm pretrain digits
      arm pretrain tiny --data IMAGES --out RUN --set training.length="10 epochs"
      arm pretrain --resume RUN
    """
    run_training("pretrain", request, fresh_parameters)
