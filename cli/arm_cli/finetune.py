"""`arm finetune`: train a classifier, from a pretrained model or from scratch."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import click

from arm_cli.show import echo
from arm_cli.training import Request, fresh_parameters, run_training, training_options

if TYPE_CHECKING:
    from collections.abc import Mapping

    from arm_core.engine.protocol import Array
    from arm_core.model.spec import EncoderSpec, ModelSpec
    from arm_core.recipe.recipe import Recipe


@click.command(short_help="Train a classifier, from a pretrained model or from scratch.")
@training_options
@click.option("--from", "origin", metavar="MODEL", help="Pretrained model to start from; else from scratch.")
def finetune(request: Request, origin: str | None) -> None:
    """Train a classifier as RECIPE says, on a folder with one sub-folder of images per class.

    RECIPE is a shipped one (base, large, huge, tiny, digits) or a .toml file. With --from the trunk
    starts as that model's, else from random weights: supervised training. Examples:

    \b
      arm finetune digits --from runs/pretrain-digits
      arm finetune tiny --from RUN --data TRAIN --eval-data VAL --out RUN2
      arm finetune tiny --data TRAIN --eval-data VAL --out RUN2
      arm finetune --resume RUN2
    """
    if origin is None:
        run_training("finetune", request, fresh_parameters)
        return
    if request.resume is not None:
        raise ValueError("--resume goes on with a run's own weights; drop --from")
    run_training("finetune", request, partial(_grown, origin), origin=origin)


def _grown(origin: str, recipe: Recipe, spec: ModelSpec, classes: tuple[str, ...]) -> Mapping[str, Array]:
    """The classifier's weights grown from the model at `origin`."""
    from arm_cli.opening import class_names, find_model
    from arm_convert.adapt import OFFICIAL_HEAD_STD, to_classifier
    from arm_core.model.spec import ClassifierSpec
    from arm_core.recipe.sections import ClassifierModel

    assert isinstance(spec, ClassifierSpec)
    assert isinstance(recipe.model, ClassifierModel)
    model = find_model(origin).model
    if model.spec.encoder != spec.encoder:
        raise ValueError(
            f"{origin}: its trunk is {_words(model.spec.encoder)}, the recipe's {_words(spec.encoder)}; "
            "choose the recipe of that size, or change the recipe with --set model.preset=..."
        )
    # A classifier of the very same classes keeps its head, any other start gets a new one.
    keep_head = isinstance(model.spec, ClassifierSpec) and class_names(model, model.spec) == classes
    kind = "classifier" if isinstance(model.spec, ClassifierSpec) else "pretraining model"
    echo(f"from {model.path} ({kind}), {'its head kept' if keep_head else 'with a new head'}", err=True)
    grown = to_classifier(
        model.spec,
        model.arrays,
        spec,
        seed=recipe.training.seed,
        head_std=recipe.model.head_std or OFFICIAL_HEAD_STD,
        keep_head=keep_head,
    )
    return {name: tensor.read().astype("float32", copy=False) for name, tensor in grown.items()}


def _words(encoder: EncoderSpec) -> str:
    from arm_core.model.presets import PRESETS

    named = [
        name for name, size in PRESETS.items() if (size.width, size.depth) == (encoder.width, encoder.depth)
    ]
    size = f"{encoder.width} wide, {encoder.depth} deep, patches of {encoder.patch}"
    return f"{size} ({named[0]})" if named else size
