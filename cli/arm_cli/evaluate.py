"""`arm evaluate`: accuracy or prediction error of a model on images."""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
    from arm_cli.evaluation_report import Measured
    from arm_cli.opening import Opened
    from arm_core.data.sources import ImageSource
    from arm_core.engine.byte_images import ByteImages
    from arm_core.engine.protocol import Engine
    from arm_core.engine.ranks import Ranks
    from arm_core.training.predictions import Predictions
    from arm_core.training.robustness import LabelSet

DIGITS = "digits"
LABEL_SETS = (
    "imagenet-a",
    "imagenet-r",
    "imagenet-sketch",
    "imagenet-v2",
    "imagenet-real",
    "imagenet-c",
)
"""Values of `arm_core.training.robustness.LabelSet`."""


@click.command(short_help="Measure a model on images.")
@click.argument("model")
@click.option("--data", metavar="PATH", help="Images to evaluate on, or `digits` for its test split.")
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
@click.option("--real-labels", metavar="REAL.JSON", help="Labels of --labels imagenet-real.")
@click.option("--html", "page", metavar="REPORT.HTML", help="Write an HTML page of confusions and mistakes.")
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

    --labels follows the protocol of a robustness set: imagenet-a and -r ignore the classes that PATH lacks,
    imagenet-v2 takes folder names for class numbers, imagenet-real takes any of an image's labels in
    --real-labels for right, imagenet-c reads corruption/severity/class and adds the mean corruption error.
    """
    from arm_cli.evaluation_report import report, report_corruptions
    from arm_cli.opening import open_model
    from arm_core.engine.ranks import together
    from arm_core.model.spec import ClassifierSpec
    from arm_core.training.robustness import LabelSet, corrupted_folders

    label_set = LabelSet(labels) if labels else None
    with engine.join() as (backend, ranks):
        with together(ranks):
            if (label_set is LabelSet.IMAGENET_REAL) != (real_labels is not None):
                raise ValueError("--labels imagenet-real and --real-labels REAL.JSON belong together")
            opened = _changed(open_model(model, weights=weights), crop, image_size)
            if not isinstance(opened.spec, ClassifierSpec) and (tta != "none" or page or labels):
                raise ValueError(f"{model}: a pretraining model has no classes; drop --tta, --html, --labels")
            path = data or _data_of_run(opened)
            folders = corrupted_folders(Path(path)) if label_set is LabelSet.IMAGENET_C else {}
            runner = engine.create(opened.spec, opened.parameters, ranks)
        job = _Job(
            opened=opened,
            runner=_Mirrored(runner) if tta == "flip" else runner,  # type: ignore[arg-type]
            ranks=ranks,
            label_set=label_set,
            real_labels=real_labels,
            data_format=data_format,
            batch_size=batch_size,
            workers=workers,
            protocol={
                "weights": weights,
                "labels": labels,
                "tta": tta,
                "backend": f"{backend.name} {backend.version()}",
                "device": runner.device,
                "scan": runner.scan,
                "precision": engine.precision or "float32",
                "batch_size": batch_size,
                "processes": ranks.world,
            },
        )
        if folders:
            found = {name: [job.measure(str(path)) for path in paths] for name, paths in folders.items()}
            report_corruptions(found, as_json=as_json)
        else:
            report(job.measure(path), as_json=as_json, page=page)


@dataclass(frozen=True, kw_only=True)
class _Job:
    """A model on an engine, ready to be measured on images."""

    opened: Opened
    runner: Engine
    ranks: Ranks
    label_set: LabelSet | None
    real_labels: str | None
    data_format: str | None
    batch_size: int
    workers: int
    protocol: dict[str, Any]

    def measure(self, path: str) -> Measured:
        """Evaluate the images at `path`; all ranks call it together."""
        import numpy as np

        from arm_cli.evaluation_report import Measured
        from arm_cli.progress import ProgressBar
        from arm_core.data.loader import EvalLoader
        from arm_core.data.sources import ListedSource
        from arm_core.engine.ranks import together
        from arm_core.training.evaluation import evaluate as run
        from arm_core.training.predictions import Collector
        from arm_core.training.robustness import RESTRICTED, Restricted

        opened, ranks, runner = self.opened, self.ranks, self.runner
        with together(ranks):
            source = open_data(path, opened, self.data_format, self.label_set)
            loader = EvalLoader(
                source,
                opened.transform,
                size=opened.spec.image_size,
                batch_size=self.batch_size,
                rank=ranks.rank,
                world=ranks.world,
                workers=self.workers,
            )
        if self.label_set in RESTRICTED:
            assert isinstance(source, ListedSource)
            runner = Restricted(runner, np.unique(source.labels))
        collector, began = Collector(), time.monotonic()
        with ProgressBar("evaluate", len(source), "images") as counter:

            def seen(images: int) -> None:
                counter.advance(images * ranks.world)  # approximate: the last batch can be smaller

            found = run(runner, loader, seen=seen, each=collector, ranks=ranks, rounds=loader.rounds)
            seconds = time.monotonic() - began
        predictions = None if found.top1 is None else collector.gather(ranks)
        return Measured(
            opened=opened,
            source=source,
            evaluation=found,
            predictions=predictions,
            images_per_s=found.images / max(seconds, 1e-9),
            protocol={"model": str(opened.folder), "data": path, **self.protocol},
            real_correct=self._real(predictions, source),
        )

    def _real(self, predictions: Predictions | None, source: ImageSource) -> list[bool] | None:
        if self.real_labels is None or predictions is None:
            return None
        from arm_core.data.sources import ListedSource
        from arm_core.training.robustness import read_real_labels, real_correct

        if not isinstance(source, ListedSource):
            raise ValueError("--labels imagenet-real needs the files of ImageNet's validation set")
        found: list[bool] = real_correct(
            predictions, source, read_real_labels(Path(self.real_labels))
        ).tolist()
        return found


class _Mirrored:
    """An engine whose logits are the mean of those of an image and of its mirror image."""

    def __init__(self, engine: object) -> None:
        self._engine = engine

    def __getattr__(self, name: str) -> object:
        return getattr(self._engine, name)

    def forward(self, images: ByteImages, **options: object) -> dict[str, object]:
        plain = self._engine.forward(images, **options)  # type: ignore[attr-defined]
        mirrored = self._engine.forward(images.flipped(), **options)  # type: ignore[attr-defined]
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


def open_data(
    data: str, opened: Opened, data_format: str | None = None, label_set: LabelSet | None = None
) -> ImageSource:
    """The images to evaluate on, their labels in the order of the model's classes."""
    from arm_core.data.digits import Digits, Split
    from arm_core.data.opening import Format, open_images
    from arm_core.model.spec import ClassifierSpec
    from arm_core.training.robustness import CLASS_COUNTS, LabelSet, numbered

    spec, form = opened.spec, Format(data_format or "auto")
    if data == DIGITS:
        source: ImageSource = Digits(Split.TEST, size=spec.image_size)
    elif isinstance(spec, ClassifierSpec):
        classes = opened.classes if opened.named else None
        if label_set is LabelSet.IMAGENET_V2:
            classes = tuple(numbered(opened.classes))
        source = listed = open_images(data, form=form, classes=classes)
        expected, found = CLASS_COUNTS.get(label_set), len(set(listed.labels.tolist()))  # type: ignore[arg-type]
        if expected is not None and found != expected:
            warnings.warn(f"{data}: {label_set} has {expected} classes, found {found}", stacklevel=2)
    else:
        source = open_images(data, form=form, labels=False)
    if isinstance(spec, ClassifierSpec) and len(source.classes) != spec.classes:
        raise ValueError(f"{data}: {len(source.classes)} classes, the model has {spec.classes}")
    return source


def _data_of_run(opened: Opened) -> str:
    """The evaluation images in the recipe of the model's run."""
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
