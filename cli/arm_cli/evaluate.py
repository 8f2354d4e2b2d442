"""`arm evaluate`: accuracy or prediction error of a model on a folder of images."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from arm_cli.options import EngineChoice, batch_size_option, engine_options, json_option, weights_option
from arm_cli.show import echo

if TYPE_CHECKING:
    from arm_cli.opening import Opened
    from arm_core.data.sources import ImageSource
    from arm_core.training.evaluation import Evaluation

DIGITS = "digits"


@click.command(short_help="Measure a model on a folder of images.")
@click.argument("model")
@click.option("--data", metavar="FOLDER", help="Images to evaluate on, or `digits` for its test split.")
@batch_size_option(64)
@click.option("--workers", type=click.IntRange(min=0), default=0, help="Threads that read images.")
@weights_option
@engine_options
@json_option
def evaluate(
    model: str,
    data: str | None,
    batch_size: int,
    workers: int,
    weights: str,
    engine: EngineChoice,
    as_json: bool,
) -> None:
    """Top-1 and top-5 accuracy of a classifier, or the prediction error of a pretraining model.

    FOLDER holds one sub-folder of images per class (any images for a pretraining model). Without
    --data, the images are the evaluation images of MODEL's run; after a run on the built-in digits they
    are the test split, which training never uses. Several processes (torchrun) divide the images.
    """
    from arm_cli.opening import open_model
    from arm_cli.progress import ProgressBar
    from arm_core.data.loader import EvalLoader
    from arm_core.engine.ranks import together
    from arm_core.training.evaluation import evaluate as measure

    with engine.join() as (_, ranks):
        with together(ranks):
            opened = open_model(model, weights=weights)
            source = open_data(data or _data_of_run(opened), opened)
            runner = engine.create(opened.spec, opened.parameters, ranks)
            loader = EvalLoader(
                source,
                opened.transform,
                size=opened.spec.image_size,
                batch_size=batch_size,
                rank=ranks.rank,
                world=ranks.world,
                workers=workers,
            )
        with ProgressBar("evaluate", len(source), "images") as counter:

            def seen(images: int) -> None:
                counter.advance(images * ranks.world)  # approximate: the last batch can be smaller

            found = measure(runner, loader, seen=seen, ranks=ranks, rounds=loader.rounds)
        _report(opened, found, as_json)


def _report(opened: Opened, found: Evaluation, as_json: bool) -> None:
    from arm_cli.show import print_json

    if as_json:
        result = {name: value for name, value in asdict(found).items() if value is not None}
        print_json({"model": str(opened.folder), **result})
        return
    top = (
        f"top-1 {100 * found.top1:.2f} %, top-5 {100 * (found.top5 or 0):.2f} %, "
        if found.top1 is not None
        else ""
    )
    echo(f"{top}loss {found.loss:.4f} ({found.images} images)")


def open_data(data: str, opened: Opened) -> ImageSource:
    """The images to evaluate on, their labels in the order of the model's classes."""
    from arm_core.data.digits import Digits, Split
    from arm_core.data.folder import ImageFolder
    from arm_core.model.spec import ClassifierSpec

    spec = opened.spec
    if data == DIGITS:
        source: ImageSource = Digits(Split.TEST, size=spec.image_size)
    elif isinstance(spec, ClassifierSpec):
        source = ImageFolder(data, classes=opened.classes if opened.named else None)
    else:
        source = ImageFolder(data, labels=False)
    if isinstance(spec, ClassifierSpec) and len(source.classes) != spec.classes:
        raise ValueError(f"{data}: {len(source.classes)} classes, the model has {spec.classes}")
    return source


def _data_of_run(opened: Opened) -> str:
    """The evaluation images in the recipe of the run that the model belongs to."""
    from arm_core.recipe.recipe import load_recipe
    from arm_core.training.run_folder import RECIPE

    path = Path(opened.folder).absolute().parent.parent / RECIPE  # RUN/checkpoints/step-00001000
    if not path.exists():
        raise ValueError(
            f"{opened.folder}: does not belong to a run with evaluation images; pass --data FOLDER"
        )
    data = load_recipe(path).data
    if data.source == DIGITS:
        return DIGITS
    if data.source == "folder" and data.eval_path is not None:
        return data.eval_path
    raise ValueError(f"{path}: the recipe has no evaluation images; pass --data FOLDER")
