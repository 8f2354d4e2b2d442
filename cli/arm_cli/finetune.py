"""`arm finetune`: train a classifier, from a pretrained model or from scratch."""

from __future__ import annotations

import click

from arm_cli.training.options import Request, training_options


@click.command(short_help="Train a classifier, from a pretrained model or from scratch.")
@training_options
@click.option("--from", "origin", metavar="MODEL", help="Pretrained model to start from; else from scratch.")
def finetune(request: Request, origin: str | None) -> None:
    """Train a classifier with RECIPE on a folder with one sub-folder of images per class.

    RECIPE is a shipped recipe (`arm recipe list`): digits, tiny, small, base, large or huge; or a .toml
    file. With --from, the classifier starts from the trunk of that model and has its size. Otherwise it
    starts from random weights. Examples:

    \b
      arm finetune digits --from runs/pretrain-digits
      arm finetune tiny --from RUN --data TRAIN --eval-data VAL --out RUN2
      arm finetune tiny --data TRAIN --eval-data VAL --out RUN2
      arm finetune --resume RUN2
    """
    from arm_cli.training.start import run_training

    if origin is not None and request.resume is not None:
        raise ValueError("--resume continues with the run's own weights; drop --from")
    run_training("finetune", request, origin)
