"""`arm evaluate`: accuracy or prediction error of a model on images."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from arm_cli.convert.options import image_size_option
from arm_cli.options import (
    EngineChoice,
    batch_size_option,
    data_format_option,
    engine_options,
    json_option,
    weights_option,
)

if TYPE_CHECKING:
    from arm_cli.opening import Opened
    from arm_core.data.sources import ImageSource

DIGITS = "digits"


@click.command(short_help="Measure a model on images.")
@click.argument("model")
@click.option("--data", metavar="PATH", help="Images to evaluate on, or `digits` for its test split.")
@data_format_option
@click.option("--crop", type=float, metavar="X", help="Part of the resized image that is kept: 0.875, 1.0.")
@image_size_option
@click.option("--tta", type=click.Choice(("none", "flip")), default="none", help="Mean with mirrored images.")
@batch_size_option(64)
@click.option("--workers", type=click.IntRange(min=0), default=0, help="Threads that read images.")
@click.option("--html", "page", metavar="REPORT.HTML", help="Write confusions and mistakes to a page.")
@weights_option
@engine_options
@json_option
def evaluate(
    model: str,
    data: str | None,
    data_format: str | None,
    crop: float | None,
    image_size: tuple[int, int] | None,
    tta: str,
    batch_size: int,
    workers: int,
    page: str | None,
    weights: str,
    engine: EngineChoice,
    as_json: bool,
) -> None:
    """Top-1 and top-5 accuracy of a classifier, or the prediction error of a pretraining model.

    PATH holds labelled images (any images for a pretraining model): a folder of class folders, a CSV or JSONL
    file, parquet or tar files. Without --data, the images are the evaluation images of MODEL's run; after a
    run on the built-in digits they are the test split, which training never uses. Intervals are 95 %.
    --json adds the protocol, a table of classes, and the most frequent confusions. Several processes
    (torchrun) divide the images.
    """
    from arm_cli.evaluation_report import Measured, report
    from arm_cli.opening import open_model
    from arm_cli.progress import ProgressBar
    from arm_core.data.loader import EvalLoader
    from arm_core.engine.ranks import together
    from arm_core.model.spec import ClassifierSpec
    from arm_core.training.evaluation import evaluate as measure
    from arm_core.training.predictions import Collector

    with engine.join() as (backend, ranks):
        with together(ranks):
            opened = _changed(open_model(model, weights=weights), crop, image_size)
            classifier = isinstance(opened.spec, ClassifierSpec)
            if not classifier and (tta != "none" or page):
                raise ValueError(f"{model}: a pretraining model has no classes; drop --tta and --html")
            path = data or _data_of_run(opened)
            source = open_data(path, opened, data_format)
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
        collector, began = Collector(), time.monotonic()
        with ProgressBar("evaluate", len(source), "images") as counter:

            def seen(images: int) -> None:
                counter.advance(images * ranks.world)  # approximate: the last batch can be smaller

            found = measure(
                _Mirrored(runner) if tta == "flip" else runner,  # type: ignore[arg-type]
                loader,
                seen=seen,
                each=collector,
                ranks=ranks,
                rounds=loader.rounds,
            )
            seconds = time.monotonic() - began
        measured = Measured(
            opened=opened,
            source=source,
            evaluation=found,
            predictions=collector.gather(ranks) if classifier else None,
            images_per_s=found.images / max(seconds, 1e-9),
            protocol={
                "model": str(opened.folder),
                "data": path,
                "weights": weights,
                "tta": tta,
                "backend": f"{backend.name} {backend.version()}",
                "device": runner.device,
                "scan": runner.scan,
                "precision": engine.precision or "float32",
                "batch_size": batch_size,
                "processes": ranks.world,
            },
        )
        if ranks.rank == 0:
            report(measured, as_json=as_json, page=page)


class _Mirrored:
    """An engine whose logits are the mean of those of an image and of its mirror image."""

    def __init__(self, engine: object) -> None:
        self._engine = engine

    def __getattr__(self, name: str) -> object:
        return getattr(self._engine, name)

    def forward(self, images: object, **options: object) -> dict[str, object]:
        plain = self._engine.forward(images, **options)  # type: ignore[attr-defined]
        mirrored = self._engine.forward(images[:, :, ::-1].copy(), **options)  # type: ignore
        return {**plain, "logits": (plain["logits"] + mirrored["logits"]) / 2}


def _changed(opened: Opened, crop: float | None, image_size: tuple[int, int] | None) -> Opened:
    """The model with another evaluation crop, or for images of another size."""
    if crop is not None:
        opened = replace(opened, transform=replace(opened.transform, crop_fraction=crop))
    if image_size is not None and image_size != opened.spec.image_size:
        from arm_convert.adapt import resize
        from arm_core.files.safetensors import as_tensors

        spec, tensors = resize(opened.spec, as_tensors(opened.parameters), image_size)
        opened = replace(opened, spec=spec, parameters={name: t.read() for name, t in tensors.items()})
    return opened


def open_data(data: str, opened: Opened, data_format: str | None = None) -> ImageSource:
    """The images to evaluate on, their labels in the order of the model's classes."""
    from arm_core.data.digits import Digits, Split
    from arm_core.data.opening import Format, open_images
    from arm_core.model.spec import ClassifierSpec

    spec, form = opened.spec, Format(data_format or "auto")
    if data == DIGITS:
        source: ImageSource = Digits(Split.TEST, size=spec.image_size)
    elif isinstance(spec, ClassifierSpec):
        source = open_images(data, form=form, classes=opened.classes if opened.named else None)
    else:
        source = open_images(data, form=form, labels=False)
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
            f"{opened.folder}: does not belong to a run with evaluation images; pass --data PATH"
        )
    data = load_recipe(path).data
    if data.source == DIGITS:
        return DIGITS
    if data.source == "folder" and data.eval_path is not None:
        return data.eval_path
    raise ValueError(f"{path}: the recipe has no evaluation images; pass --data PATH")
