"""Batches in a fixed global order: samples, augmentation and mixing depend only on the position.

The position of a training run is an integer, the number of micro-batches consumed by all ranks together.
Batch `position` belongs to epoch `position // batches_per_epoch`; each epoch has its own order. Workers,
ranks and the point of resuming decide which thread prepares a batch, but not its content.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, Self

import numpy as np
import numpy.typing as npt

from arm_core.data.bad_images import BadImages
from arm_core.data.decode import BadImage
from arm_core.data.mixing import Mixing, draw_mix, soft_targets
from arm_core.data.prefetch import Prefetcher
from arm_core.data.sources import ImageSource, Item
from arm_core.data.transforms import Augmented, EvalTransform, Size, TrainTransform
from arm_core.engine.byte_images import Mix
from arm_core.engine.protocol import Batch, Images
from arm_core.model.rng import KeyedRng


@lru_cache(maxsize=4)
def epoch_order(seed: int, epoch: int, count: int) -> npt.NDArray[np.int64]:
    """The order in which an epoch visits `count` samples: `(count,)`, read-only."""
    order = KeyedRng(seed, "shuffle", epoch).permutation(count)
    order.flags.writeable = False
    return order


@dataclass(frozen=True, kw_only=True)
class TrainBatches:
    """All micro-batches of a training run, by position, over an unlimited number of epochs."""

    source: ImageSource
    transform: TrainTransform
    size: Size
    """Height and width that the model reads, pixels."""
    batch_size: int
    seed: int
    classes: int | None
    """Classes of the targets; None for pretraining, which has no targets."""
    mixing: Mixing
    bad: BadImages | None = None
    """Where bad images are noted and replaced by the next good ones; None raises BadImage for them."""

    def __post_init__(self) -> None:
        _check_sizes(self.size, self.batch_size)
        if len(self.source) < self.batch_size:
            raise ValueError(
                f"the data has {len(self.source)} images, fewer than one batch of {self.batch_size}; "
                f"use a batch size of {len(self.source)} or less, or more images"
            )
        if self.classes is not None and len(self.source.classes) != self.classes:
            raise ValueError(
                f"the data has {len(self.source.classes)} classes, the model {self.classes}; they must agree"
            )

    @property
    def batches_per_epoch(self) -> int:
        """Full batches in one pass; the samples left over rest until the next shuffle."""
        return len(self.source) // self.batch_size

    def __len__(self) -> int:
        return sys.maxsize

    def indices(self, position: int) -> npt.NDArray[np.int64]:
        """The samples of a batch, `(batch_size,)`."""
        epoch, batch = divmod(position, self.batches_per_epoch)
        order = epoch_order(self.seed, epoch, len(self.source))
        return order[batch * self.batch_size : (batch + 1) * self.batch_size]

    def samples(self, position: int) -> Iterator[tuple[Item, Augmented, list[str]]]:
        """Each image of a batch as stored and as augmented, and what was drawn for it in words."""
        epoch = position // self.batches_per_epoch
        for index in self.indices(position).tolist():
            yield self._sample(index, epoch)

    def _sample(self, index: int, epoch: int) -> tuple[Item, Augmented, list[str]]:
        for following in range(len(self.source)):
            at, trace = (index + following) % len(self.source), list[str]()
            try:
                item = self.source.item(at, epoch)
                rng = KeyedRng(self.seed, "augment", epoch, at)
                return item, self.transform.augment(item, self.size, rng, trace), trace
            except BadImage as error:
                if self.bad is None:
                    raise
                self.bad.add([str(error)])  # which raises before all are tried
        raise AssertionError

    def mix(self, position: int) -> Mix:
        """How a batch is mixed."""
        return draw_mix(self.mixing, self.size, KeyedRng(self.seed, "mix", position))

    def __getitem__(self, position: int) -> Batch:
        """The batch, with targets if there are classes, and without drop path."""
        items, images, _ = zip(*self.samples(position), strict=True)
        if self.classes is None:
            return Batch(images=self.transform.batch(images))
        mix, labels = self.mix(position), np.array([item.label for item in items], np.int64)
        targets = soft_targets(labels, self.classes, smoothing=self.mixing.smoothing, mix=mix)
        return Batch(images=self.transform.batch(images, mix), targets=targets)


class TrainLoader:
    """This rank's micro-batches from a position on: `start + rank`, `start + rank + world`, ...

    Iterating yields an endless sequence of `Batch`es, with `drop_path_scale` None. `workers` threads prepare
    them ahead, `prefetch` each; with 0, each is prepared on request. Close the loader, or use it in a
    `with` statement. Raises ValueError for data smaller than a batch, a wrong number of classes, or a
    broken image (the message names it).
    """

    def __init__(
        self,
        source: ImageSource,
        transform: TrainTransform,
        *,
        size: Size,
        batch_size: int,
        seed: int,
        classes: int | None = None,
        mixing: Mixing | None = None,
        start: int = 0,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
        prefetch: int = 2,
        bad: BadImages | None = None,
    ) -> None:
        self.batches = TrainBatches(
            source=source,
            transform=transform,
            size=size,
            batch_size=batch_size,
            seed=seed,
            classes=classes,
            mixing=mixing or Mixing(),
            bad=bad,
        )
        _check_rank(rank, world)
        self._prefetcher = Prefetcher(
            self.batches, start=start + rank, step=world, workers=workers, prefetch=prefetch
        )

    @property
    def batches_per_epoch(self) -> int:
        """Micro-batches in one pass over the data, all ranks together."""
        return self.batches.batches_per_epoch

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        return next(self._prefetcher)

    def close(self) -> None:
        """Stop the threads; the loader is then empty."""
        self._prefetcher.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class EvalBatch(NamedTuple):
    """Samples in the order of the source."""

    images: Images
    """(B, H, W, 3)"""
    labels: npt.NDArray[np.int64]
    """(B,); -1 if the source has no class."""
    indices: npt.NDArray[np.int64]
    """(B,) indices of the samples in the source."""


@dataclass(frozen=True, kw_only=True)
class EvalBatches:
    """A source in batches, in order; the last one can be smaller. Every sample occurs once."""

    source: ImageSource
    transform: EvalTransform
    size: Size
    batch_size: int
    bad: BadImages | None = None
    """Records bad images, which are then skipped; None raises BadImage for them."""

    def __post_init__(self) -> None:
        _check_sizes(self.size, self.batch_size)

    def __len__(self) -> int:
        return -(-len(self.source) // self.batch_size)

    def __getitem__(self, number: int) -> EvalBatch:
        indices = range(number * self.batch_size, min((number + 1) * self.batch_size, len(self.source)))
        images = np.empty((len(indices), *self.size, 3), np.uint8)
        good: list[tuple[int, int]] = []
        for index in indices:
            item = self.source.item(index)
            try:
                images[len(good)] = self.transform.crop(item, self.size)
            except BadImage as error:
                if self.bad is None:
                    raise
                self.bad.add([str(error)])
            else:
                good.append((item.label, index))
        labels, kept = np.array(good, np.int64).reshape(-1, 2).T
        return EvalBatch(self.transform.batch(images[: len(good)]), labels.copy(), kept.copy())


class EvalLoader:
    """This rank's share of a source: batches `rank`, `rank + world`, ...; over all ranks every sample once.

    Each `for` loop is a new pass with its own threads, which end with the loop. start: batches of this rank
    to leave out at the beginning.
    Raises ValueError for a broken image; the message names it.
    """

    def __init__(
        self,
        source: ImageSource,
        transform: EvalTransform,
        *,
        size: Size,
        batch_size: int,
        start: int = 0,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
        prefetch: int = 2,
        bad: BadImages | None = None,
    ) -> None:
        self.batches = EvalBatches(
            source=source, transform=transform, size=size, batch_size=batch_size, bad=bad
        )
        _check_rank(rank, world)
        self._first, self._world = rank + start * world, world
        self._workers, self._prefetch = workers, prefetch

    def __len__(self) -> int:
        """Batches of this rank."""
        return len(range(self._first, len(self.batches), self._world))

    @property
    def rounds(self) -> int:
        """Largest number of batches of a rank."""
        return -(-len(self.batches) // self._world)

    def __iter__(self) -> Iterator[EvalBatch]:
        workers = min(self._workers, len(self))  # no more threads than batches
        with Prefetcher(
            self.batches, start=self._first, step=self._world, workers=workers, prefetch=self._prefetch
        ) as prefetcher:
            for batch in prefetcher:
                if len(batch.images):  # otherwise all of them are bad
                    yield batch


def _check_sizes(size: Size, batch_size: int) -> None:
    if min(size) < 1 or batch_size < 1:
        raise ValueError(
            f"data: image size and batch size must be 1 or more, found {size[0]}x{size[1]}, {batch_size}"
        )


def _check_rank(rank: int, world: int) -> None:
    if not 0 <= rank < world:
        raise ValueError(f"data: rank must be 0 to {world - 1} in a world of {world}, found {rank}")
