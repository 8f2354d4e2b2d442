"""The inputs of each step of a run: batches, drop path and learning rate, from the recipe and the step."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from fractions import Fraction

from arm_core.data.bad_images import BadImages, OnBadImage
from arm_core.data.loader import EvalBatch, EvalLoader, TrainBatches, TrainLoader
from arm_core.data.sources import ImageSource
from arm_core.engine.protocol import Batch, StepStopped
from arm_core.engine.ranks import ALONE, Ranks
from arm_core.model.drop_path import drop_path_scale
from arm_core.model.spec import ClassifierSpec, ModelSpec
from arm_core.recipe.recipe import Recipe
from arm_core.recipe.schedule import Schedule
from arm_core.recipe.sections import TrainingSettings
from arm_core.recipe.toml import Span


class BatchFailed(ValueError):  # noqa: N818
    """A batch cannot be made: its data cannot be read or decoded. No training step is half done."""


@contextmanager
def _naming_failed_batches() -> Iterator[None]:
    try:
        yield
    except (ValueError, OSError, RuntimeError) as error:  # RuntimeError: no thread can be started
        raise BatchFailed(str(error)) from error


class Plan:
    """A recipe applied to a data source.

    With several ranks, rank r prepares the micro-batches with position % world == r, so that the images of
    an update do not depend on the number of ranks.

    Raises ValueError if they do not match: too few images for a batch, another number of classes, a
    warm-up longer than the run, more ranks than micro-batches per update.
    """

    def __init__(
        self,
        recipe: Recipe,
        spec: ModelSpec,
        source: ImageSource,
        *,
        ranks: Ranks = ALONE,
        known_bad: Sequence[str] = (),
    ) -> None:
        self._recipe, self._training, self._spec, self._source = recipe, recipe.training, spec, source
        self._rank, self._world = ranks.rank, ranks.world
        _check_shares(self._training, ranks.world)
        self._classes = spec.classes if isinstance(spec, ClassifierSpec) else None
        batches = self._batches = training_batches(
            recipe, spec, source, batch_size=self._training.micro_batch
        )
        skip = recipe.data.on_bad_image is OnBadImage.SKIP
        self.bad_images = BadImages(len(source), known_bad) if skip else None
        """Bad images found by the loaders of this plan, if the recipe skips them."""
        self.steps_per_epoch = Fraction(batches.batches_per_epoch, self._training.accumulation)
        """Updates in one pass over the data; a fraction if an update spans two epochs."""
        length = self._training.length.steps(self.steps_per_epoch)
        self.total_steps = max(1, math.floor(length))
        warmup = recipe.schedule.warmup.steps(self.steps_per_epoch)
        if warmup > length:
            raise ValueError(
                f"schedule.warmup of {recipe.schedule.warmup} exceeds training.length of "
                f"{self._training.length} ({float(warmup):g} and {float(length):g} steps); shorten it"
            )
        self._schedule = Schedule(
            lr=recipe.lr, min_lr=recipe.schedule.min_lr, warmup=float(warmup), length=float(length)
        )

    def lr(self, step: int) -> float:
        """Learning rate of update number `step`, counted from 1: the rate at the time when it begins."""
        return self._schedule.at(step - 1)

    def epoch(self, step: int) -> float:
        """Passes over the data after `step` updates."""
        return round(float(step / self.steps_per_epoch), 4)

    def due(self, every: Span, step: int) -> bool:
        """Whether `step` is the first step at or after a multiple of `every`."""
        steps = every.steps(self.steps_per_epoch)
        return step // steps > (step - 1) // steps

    def save_due(self, step: int) -> bool:
        """Whether a checkpoint is due at `step`."""
        return self.due(self._training.save_every, step) or self.kept(step)

    def kept(self, step: int) -> bool:
        """Whether the checkpoint of `step` is kept permanently (`training.keep_every`)."""
        every = self._training.keep_every
        return every is not None and step > 0 and self.due(every, step)

    def open(self, position: int, *, workers: int) -> TrainLoader:
        """Loader of this rank's micro-batches from `position` on; close it after use."""
        return TrainLoader(
            self._source,
            self._recipe.augmentation,
            size=self._spec.image_size,
            batch_size=self._training.micro_batch,
            seed=self._training.seed,
            classes=self._classes,
            mixing=self._recipe.mixing,
            start=position,
            rank=(self._rank - position) % self._world,
            world=self._world,
            workers=workers,
            bad=self.bad_images,
        )

    def next_batches(
        self, loader: Iterator[Batch], position: int, stop: Callable[[], bool] | None = None
    ) -> list[Batch]:
        """This rank's micro-batches of one update, with drop path; `loader` is at `position`.

        stop: called before each of them; True raises StepStopped.
        """
        batches = []
        for p in self._own(position):
            if stop is not None and stop():
                raise StepStopped
            with _naming_failed_batches():
                batches.append(self._with_drop_path(next(loader), p))
        return batches

    def image_names(self, position: int) -> list[str]:
        """Names of the images of the update at `position`, of all ranks."""
        update = range(position, position + self._training.accumulation)
        batches = [self._batches.indices(p).tolist() for p in update]
        return [self._source.item(index).name for indices in batches for index in indices]

    def _own(self, position: int) -> list[int]:
        """Positions of this rank's micro-batches in the update that begins at `position`."""
        update = range(position, position + self._training.accumulation)
        return [p for p in update if p % self._world == self._rank]

    def _with_drop_path(self, batch: Batch, position: int) -> Batch:
        rate, depth = self._training.drop_path, self._spec.encoder.depth
        if rate == 0:
            return batch
        scale = drop_path_scale(rate, depth, len(batch.images), seed=self._training.seed, position=position)
        return replace(batch, drop_path_scale=scale)

    @staticmethod
    def eval_batches(loader: EvalLoader) -> Iterator[EvalBatch]:
        """One pass over a loader."""
        batches = iter(loader)
        while True:
            with _naming_failed_batches():
                batch = next(batches, None)
            if batch is None:
                return
            yield batch

    def eval_loader(self, source: ImageSource) -> EvalLoader:
        """This rank's batches of `source` for evaluation; ValueError if its classes differ."""
        if self._classes is not None and source.classes != self._source.classes:
            raise ValueError(
                f"the evaluation images have other classes ({_some(source.classes)}) "
                f"than the training images ({_some(self._source.classes)})"
            )
        return EvalLoader(
            source,
            self._recipe.eval_transform,
            size=self._spec.image_size,
            batch_size=self._training.micro_batch,
            rank=self._rank,
            world=self._world,
            workers=self._recipe.data.workers,
            bad=self.bad_images,
        )

    def model_metadata(self) -> dict[str, str]:
        """Metadata of a model file, so that it can be used without its run."""
        transform = json.dumps(asdict(self._recipe.eval_transform))
        names = {} if self._classes is None else {"classes": json.dumps(list(self._source.classes))}
        return {"eval_transform": transform, **names}


def training_batches(
    recipe: Recipe, spec: ModelSpec, source: ImageSource, *, batch_size: int
) -> TrainBatches:
    """The micro-batches of a recipe for a model of its kind."""
    return TrainBatches(
        source=source,
        transform=recipe.augmentation,
        size=spec.image_size,
        batch_size=batch_size,
        seed=recipe.training.seed,
        classes=spec.classes if isinstance(spec, ClassifierSpec) else None,
        mixing=recipe.mixing,
    )


def _check_shares(training: TrainingSettings, world: int) -> None:
    if world <= training.accumulation:
        return
    fitting = next((n for n in range(world, training.batch_size + 1) if training.batch_size % n == 0), None)
    advice = f"start a new run with --set training.accumulation={fitting}, or " if fitting else ""
    raise ValueError(
        f"training.accumulation: an update has {training.accumulation} micro-batches of "
        f"{training.micro_batch} images, too few for {world} processes; {advice}use "
        f"{training.accumulation} or fewer processes"
    )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f", ... {len(names)} in all" if len(names) > 3 else "") or "none"
