"""`arm evaluate`: accuracy or prediction error of a model on images."""

from __future__ import annotations

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
    from arm_cli.evaluation_job import DataSet
    from arm_cli.evaluation_report import Corruptions
    from arm_cli.opening import Opened

LABEL_SETS = (
    "imagenet-a",
    "imagenet-r",
    "imagenet-sketch",
    "imagenet-v2",
    "imagenet-real",
    "imagenet-c",
    "objectnet",
)
"""Values of `arm_core.training.robustness.LabelSet`."""


@click.command(short_help="Measure a model on images.")
@click.argument("model")
@click.option(
    "--data",
    multiple=True,
    metavar="[SET=]PATH",
    help="Images to evaluate on, or `digits` for its test split. Repeat it for a table of several sets.",
)
@data_format_option
@click.option("--crop", type=float, metavar="X", help="Part of the resized image that is kept: 0.875, 1.0.")
@image_size_option
@click.option(
    "--tta",
    type=click.Choice(("none", "flip")),
    default="none",
    help="Average the outputs with those of the mirrored images.",
)
@batch_size_option(64)
@click.option("--workers", type=click.IntRange(min=0), default=0, help="Threads that read images.")
@click.option("--labels", type=click.Choice(LABEL_SETS), help="Protocol of a robustness set of ImageNet.")
@click.option("--real-labels", metavar="REAL.JSON", help="Other labels for imagenet-real than the shipped.")
@click.option("--html", "page", metavar="REPORT.HTML", help="Write an HTML page of confusions and mistakes.")
@weights_option
@engine_options
@json_option
def evaluate(
    model: str,
    data: tuple[str, ...],
    data_format: str | None,
    crop: float | None,
    image_size: tuple[int, int] | None,
    tta: str,
    batch_size: int,
    workers: int,
    labels: str | None,
    real_labels: str | None,
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

    --labels follows the protocol of a robustness set: imagenet-a and -r ignore ImageNet's other classes,
    imagenet-v2 takes folder names for class numbers, imagenet-real takes any of an image's ReaL labels for
    right, imagenet-c reads corruption/severity/class and adds the mean corruption error, objectnet reads the
    download. --data imagenet-a=PATH is the same for one of several sets.

    An interrupted call continues where it was when it is repeated.
    """
    from functools import lru_cache

    from arm_cli.evaluation_job import Job, Mirrored
    from arm_cli.evaluation_report import Measured, report, report_corruptions, report_sets
    from arm_cli.opening import open_model
    from arm_core.engine.ranks import together
    from arm_core.model.spec import ClassifierSpec
    from arm_core.training.evaluation_state import model_key
    from arm_core.training.robustness import LabelSet, corrupted_folders

    with engine.join() as (backend, ranks):
        with together(ranks):
            opened = _changed(open_model(model, weights=weights), crop, image_size)
            sets = _data_sets(data or (_data_of_run(opened),), labels)
            used = {one.label_set for one in sets}
            if real_labels is not None and LabelSet.IMAGENET_REAL not in used:
                raise ValueError("--real-labels REAL.JSON belongs to --labels imagenet-real")
            if page and len(sets) > 1:
                raise ValueError("--html is for one set of images")
            if not isinstance(opened.spec, ClassifierSpec) and (tta != "none" or page or used != {None}):
                raise ValueError(f"{model}: a pretraining model has no classes; drop --tta, --html, --labels")
            folders = {
                one.path: corrupted_folders(Path(one.path))
                for one in sets
                if one.label_set is LabelSet.IMAGENET_C
            }
            runner = engine.create(opened.spec, opened.parameters, ranks)
        job = Job(
            opened=opened,
            runner=Mirrored(runner) if tta == "flip" else runner,  # type: ignore[arg-type]
            ranks=ranks,
            real_labels=real_labels,
            data_format=data_format,
            batch_size=batch_size,
            workers=workers,
            protocol={
                "weights": weights,
                "tta": tta,
                "backend": f"{backend.name} {backend.version()}",
                "device": runner.device,
                "scan": runner.scan,
                "precision": engine.precision or "float32",
                "batch_size": batch_size,
                "processes": ranks.world,
            },
            model_key=lru_cache(lambda: model_key(opened.parameters)),
        )
        results: list[tuple[DataSet, Measured | Corruptions]] = []
        for one in sets:
            if one.label_set is LabelSet.IMAGENET_C:
                parts = {
                    name: [job.measure(one._replace(path=str(path))) for path in paths]
                    for name, paths in folders[one.path].items()
                }
                results.append((one, parts))
            else:
                results.append((one, job.measure(one)))
        if len(sets) > 1:
            report_sets(results, as_json=as_json)
        elif isinstance(found := results[0][1], Measured):
            report(found, as_json=as_json, page=page)
        else:
            report_corruptions(found, as_json=as_json)


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


def _data_sets(data: tuple[str, ...], labels: str | None) -> list[DataSet]:
    """From `PATH` and `SET=PATH`, where SET is one of the protocols."""
    from arm_cli.evaluation_job import DataSet
    from arm_core.training.robustness import LabelSet

    found = []
    for word in data:
        name, equals, path = word.partition("=")
        if equals and name in LABEL_SETS:
            found.append(DataSet(path, LabelSet(name)))
        else:
            found.append(DataSet(word, LabelSet(labels) if labels else None))
    if labels and (len(found) > 1 or ("=" in data[0] and found[0].path != data[0])):
        raise ValueError(f"--labels is for one path; write --data {labels}=PATH")
    return found


def _data_of_run(opened: Opened) -> str:
    """The evaluation images in the recipe of the model's run."""
    from arm_core.data.digits import PLACINGS
    from arm_core.recipe.recipe import load_recipe
    from arm_core.training.run_folder import RECIPE

    path = Path(opened.folder).absolute().parent.parent / RECIPE  # RUN/checkpoints/step-00001000
    if not path.exists():
        raise ValueError(
            f"{opened.folder}: does not belong to a run with evaluation images; pass --data PATH"
        )
    data = load_recipe(path).data
    if data.source in PLACINGS:
        return data.source
    if data.source == "folder" and data.eval_path is not None:
        return data.eval_path
    raise ValueError(f"{path}: the recipe has no evaluation images; pass --data PATH")
