"""Measures one model on one set of images after another, for `arm evaluate`."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from arm_cli.show import echo

if TYPE_CHECKING:
    from arm_cli.evaluation_report import Measured
    from arm_cli.opening import Opened
    from arm_core.data.sources import ImageSource
    from arm_core.engine.byte_images import ByteImages
    from arm_core.engine.protocol import Engine
    from arm_core.engine.ranks import Ranks
    from arm_core.training.evaluation_state import EvaluationState
    from arm_core.training.predictions import Predictions
    from arm_core.training.robustness import LabelSet

DIGITS = "digits"


class DataSet(NamedTuple):
    """Images and the protocol by which they are evaluated."""

    path: str
    label_set: LabelSet | None

    @property
    def name(self) -> str:
        return self.path if self.label_set is None else str(self.label_set)


@dataclass(frozen=True, kw_only=True)
class Job:
    """A model on an engine, ready to be measured on images."""

    opened: Opened
    runner: Engine
    ranks: Ranks
    real_labels: str | None
    data_format: str | None
    batch_size: int
    workers: int
    protocol: dict[str, Any]
    """The settings that determine the result, for the report."""
    model_key: Callable[[], str]
    """A hash of the model's values."""

    def measure(self, data: DataSet) -> Measured:
        """Evaluate the images; all ranks call it together. Continues an interrupted call."""
        from arm_cli.evaluation_report import Measured
        from arm_cli.progress import ProgressBar
        from arm_core.data.loader import EvalLoader
        from arm_core.engine.ranks import together
        from arm_core.training.evaluation import evaluate
        from arm_core.training.predictions import Collector

        opened, ranks = self.opened, self.ranks
        protocol = {
            "model": str(opened.folder),
            "data": data.path,
            **self.protocol,
            "labels": None if data.label_set is None else str(data.label_set),
        }
        with together(ranks):
            source = open_data(data.path, opened, self.data_format, data.label_set)
            runner = self._runner(data.label_set, source)
        state = self._state(source, protocol)
        loader = EvalLoader(
            source,
            opened.transform,
            size=opened.spec.image_size,
            batch_size=self.batch_size,
            start=len(state.sums),
            rank=ranks.rank,
            world=ranks.world,
            workers=self.workers,
        )
        before = sum(ranks.gather(sum(batch[0] for batch in state.sums)))
        began = time.monotonic()
        if before and not ranks.rank:
            echo(f"{data.path}: continues after {before} images", err=True)
        with ProgressBar("evaluate", len(source), "images", start=before) as counter:

            def seen(images: int) -> None:
                state.note()
                counter.advance(images * ranks.world)  # approximate: the last batch can be smaller

            try:
                found = evaluate(
                    runner,
                    loader,
                    seen=seen,
                    each=Collector(state.rows),
                    ranks=ranks,
                    rounds=loader.rounds,
                    sums=state.sums,
                )
            except BaseException:
                state.save()
                if state.sums:
                    echo("the images so far are saved; repeat the command to continue", err=True)
                raise
            seconds = time.monotonic() - began
        predictions = None if found.top1 is None else Collector(state.rows).gather(ranks)
        state.remove()
        return Measured(
            opened=opened,
            source=source,
            evaluation=found,
            predictions=predictions,
            images_per_s=(found.images - before) / max(seconds, 1e-9),
            protocol=protocol,
            real_correct=self._real(data.label_set, predictions, source),
        )

    def _state(self, source: ImageSource, protocol: dict[str, Any]) -> EvaluationState:
        from dataclasses import asdict

        from arm_core.data.identity import identity
        from arm_core.training.evaluation_state import EvaluationState

        opened = self.opened
        key = {
            "protocol": protocol | {"data": str(Path(protocol["data"]).absolute())},
            "model": self.model_key(),
            "images": identity(source),
            "size": opened.spec.image_size,
            "transform": asdict(opened.transform),
        }
        return EvaluationState(key, self.ranks)

    def _runner(self, label_set: LabelSet | None, source: ImageSource) -> Engine:
        from arm_core.data.objectnet import ObjectNet
        from arm_core.training.robustness import RESTRICTED, Merged, Restricted, subset

        if label_set in RESTRICTED:
            assert label_set is not None
            return Restricted(self.runner, subset(label_set, source.classes))
        if isinstance(source, ObjectNet):
            return Merged(self.runner, source.accepted)
        return self.runner

    def _real(
        self, label_set: LabelSet | None, predictions: Predictions | None, source: ImageSource
    ) -> list[bool] | None:
        from arm_core.data.sources import ListedSource
        from arm_core.training.robustness import LabelSet, labels_of_real, real_correct

        if label_set is not LabelSet.IMAGENET_REAL or predictions is None:
            return None
        if not isinstance(source, ListedSource):
            raise ValueError("--labels imagenet-real needs the files of ImageNet's validation set")
        path = None if self.real_labels is None else Path(self.real_labels)
        labels = labels_of_real(path, source.classes)
        found: list[bool] = real_correct(predictions, source, labels).tolist()
        return found


class Mirrored:
    """An engine whose logits are the mean of those of an image and of its mirror image."""

    def __init__(self, engine: object) -> None:
        self._engine = engine

    def __getattr__(self, name: str) -> object:
        return getattr(self._engine, name)

    def forward(self, images: ByteImages, **options: object) -> dict[str, object]:
        plain = self._engine.forward(images, **options)  # type: ignore[attr-defined]
        mirrored = self._engine.forward(images.flipped(), **options)  # type: ignore[attr-defined]
        return {**plain, "logits": (plain["logits"] + mirrored["logits"]) / 2}


def open_data(
    data: str, opened: Opened, data_format: str | None = None, label_set: LabelSet | None = None
) -> ImageSource:
    """The images to evaluate on, their labels in the order of the model's classes."""
    from arm_core.data.digits import PLACINGS, Digits, Split
    from arm_core.data.objectnet import ObjectNet
    from arm_core.data.opening import Format, open_images
    from arm_core.model.spec import ClassifierSpec
    from arm_core.training.robustness import LabelSet, check_classes, class_order, numbered

    spec, form = opened.spec, Format(data_format or "auto")
    if data in PLACINGS:
        source: ImageSource = Digits(Split.TEST, size=spec.image_size, name=data)
    elif not isinstance(spec, ClassifierSpec):
        source = open_images(data, form=form, labels=False)
    elif label_set is None:
        source = open_images(data, form=form, classes=opened.classes if opened.named else None)
    elif label_set is LabelSet.OBJECTNET:
        source = ObjectNet(Path(data), class_order(opened.classes, named=opened.named))
    else:
        classes = class_order(opened.classes, named=opened.named)
        if label_set is LabelSet.IMAGENET_V2:
            classes = tuple(numbered(classes))
        source = listed = open_images(data, form=form, classes=classes)
        try:
            warning = check_classes(label_set, listed)
        except ValueError as error:
            raise ValueError(f"{data}: {error}") from None
        if warning:
            warnings.warn(f"{data}: {warning}", stacklevel=2)
    if isinstance(spec, ClassifierSpec) and len(source.classes) != spec.classes:
        raise ValueError(f"{data}: {len(source.classes)} classes, the model has {spec.classes}")
    return source
