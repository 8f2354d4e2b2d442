"""Batches are the same for any number of workers, any rank layout and any point of resuming."""

from __future__ import annotations

import gc
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from itertools import chain, islice
from pathlib import Path

import numpy as np
import pytest

from arm_core.data import (
    FINETUNE,
    OFFICIAL_MIXING,
    PRETRAIN,
    Digits,
    EvalLoader,
    EvalTransform,
    ImageFolder,
    Item,
    Mixing,
    Synthetic,
    TrainLoader,
    TrainTransform,
)
from arm_core.data.prefetch import Prefetcher
from arm_core.engine.byte_images import ByteImages
from arm_core.engine.protocol import Batch
from arm_core.model.rng import KeyedRng

PLAIN = TrainTransform(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), flip=0)
SIZE = (16, 24)


class Numbered:
    """Image i holds the number i in every value, class i % 5."""

    classes = tuple("abcde")

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def item(self, index: int, epoch: int = 0) -> Item:
        return Item(image=np.full((8, 8, 3), index, np.uint8), label=index % 5, name=str(index))


def finetuning(**changes: object) -> TrainLoader:
    """Everything random switched on: 50 images, 12 batches of 4 per epoch."""
    settings = {
        "size": SIZE,
        "batch_size": 4,
        "seed": 5,
        "classes": 10,
        "mixing": OFFICIAL_MIXING,
    }
    return TrainLoader(Synthetic(50, (20, 30)), FINETUNE, **{**settings, **changes})


def take(loader: TrainLoader, count: int) -> list[Batch]:
    with loader:
        return list(islice(loader, count))


@pytest.fixture(scope="module")
def uninterrupted() -> list[Batch]:
    """Two epochs and a bit, made in this process."""
    return take(finetuning(), 27)


def assert_same(found: list[Batch], expected: list[Batch]) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert isinstance(a.images, ByteImages)
        assert isinstance(b.images, ByteImages)
        np.testing.assert_array_equal(a.images.pixels, b.images.pixels)
        np.testing.assert_array_equal(a.images.noise, b.images.noise)
        np.testing.assert_array_equal(np.asarray(a.images), np.asarray(b.images))
        np.testing.assert_array_equal(a.targets, b.targets)


def seen(batch: Batch) -> list[int]:
    """Numbers of the images in a batch of `Numbered`."""
    assert isinstance(batch.images, ByteImages)
    return batch.images.pixels[:, 0, 0, 0].tolist()


def numbered(count: int, batch_size: int, **changes: object) -> TrainLoader:
    return TrainLoader(Numbered(count), PLAIN, size=(8, 8), batch_size=batch_size, seed=1, **changes)


# The order of training


@pytest.mark.parametrize(("workers", "start"), [(1, 0), (2, 11), (3, 5)])
def test_threads_yield_the_same_batches_as_the_main_thread(
    workers: int, start: int, uninterrupted: list[Batch]
) -> None:
    assert_same(take(finetuning(workers=workers, start=start), 27 - start), uninterrupted[start:])


def test_a_run_resumed_at_any_position_sees_the_rest_of_the_uninterrupted_stream(
    uninterrupted: list[Batch],
) -> None:
    for start in (0, 1, 7, 11, 12, 13, 24, 26):
        assert_same(take(finetuning(start=start), 27 - start), uninterrupted[start:])


@pytest.mark.parametrize(("world", "start"), [(2, 0), (3, 4), (5, 13)])
def test_ranks_share_the_global_stream_between_them(
    world: int, start: int, uninterrupted: list[Batch]
) -> None:
    for rank in range(world):
        expected = uninterrupted[start + rank :: world]
        assert_same(take(finetuning(rank=rank, world=world, start=start), len(expected)), expected)


def test_batches_are_bytes_with_targets_that_sum_to_one(uninterrupted: list[Batch]) -> None:
    for batch in uninterrupted:
        assert isinstance(batch.images, ByteImages)
        assert batch.images.shape == (4, *SIZE, 3)
        assert batch.images.pixels.dtype == np.uint8
        assert batch.images.pixels.flags.c_contiguous
        assert np.asarray(batch.images).dtype == np.float32
        assert batch.targets is not None
        assert batch.targets.shape == (4, 10)
        np.testing.assert_allclose(batch.targets.sum(1), 1, atol=1e-6)
        assert batch.drop_path_scale is None


def test_no_two_batches_are_alike(uninterrupted: list[Batch]) -> None:
    assert len({np.asarray(batch.images).tobytes() for batch in uninterrupted}) == len(uninterrupted)


def test_another_seed_gives_another_stream(uninterrupted: list[Batch]) -> None:
    other = take(finetuning(seed=6), 1)[0]
    assert not np.array_equal(np.asarray(other.images), np.asarray(uninterrupted[0].images))


def test_an_epoch_visits_each_sample_once_except_an_incomplete_batch_and_the_next_reshuffles() -> None:
    loader = numbered(23, 5)
    assert loader.batches_per_epoch == 4
    batches = [seen(batch) for batch in take(loader, 12)]
    epochs = [list(chain(*batches[i : i + 4])) for i in (0, 4, 8)]
    for epoch in epochs:
        assert len(epoch) == len(set(epoch)) == 20
        assert set(epoch) <= set(range(23))
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert set().union(*epochs) == set(range(23))  # images omitted in one epoch occur in another


def test_an_image_depends_on_the_seed_the_epoch_and_its_index() -> None:
    source = Synthetic(10, (20, 30))
    with TrainLoader(source, PRETRAIN, size=SIZE, batch_size=4, seed=5) as loader:
        for position, batch in enumerate(islice(loader, 4)):
            indices = loader.batches.indices(position).tolist()
            for image, index in zip(np.asarray(batch.images), indices, strict=True):
                rng = KeyedRng(5, "augment", position // 2, index)
                np.testing.assert_array_equal(image, PRETRAIN(source.item(index), SIZE, rng))


def test_each_batch_is_mixed_differently() -> None:
    loader = numbered(20, 2, classes=5, mixing=Mixing(mixup=1.0))
    weights = [batch.targets.max() for batch in take(loader, 10) if batch.targets is not None]
    assert len(set(weights)) > 5


def test_the_targets_belong_to_the_images() -> None:
    for batch in take(numbered(23, 5, classes=5), 8):
        assert batch.targets is not None
        assert batch.targets.argmax(1).tolist() == [number % 5 for number in seen(batch)]


def test_pretraining_has_no_targets() -> None:
    loader = TrainLoader(Synthetic(8, (20, 20), classes=0), PRETRAIN, size=SIZE, batch_size=4, seed=0)
    assert take(loader, 1)[0].targets is None


def test_a_source_that_redraws_receives_the_epoch() -> None:
    with TrainLoader(Digits(labels_per_class=1), PLAIN, size=(24, 24), batch_size=10, seed=0) as loader:
        first, second = (np.sort(np.asarray(next(loader).images).sum((1, 2, 3))) for _ in range(2))
    assert not np.allclose(first, second)


def test_data_smaller_than_a_batch_is_refused() -> None:
    with pytest.raises(
        ValueError, match="the data has 3 images, fewer than one batch of 4; use a batch size of 3"
    ):
        numbered(3, 4)


def test_a_wrong_number_of_classes_is_refused() -> None:
    with pytest.raises(ValueError, match="the data has 5 classes, the model 7"):
        numbered(10, 2, classes=7)


@pytest.mark.parametrize(
    "arguments", [{"rank": 2, "world": 2}, {"start": -1}, {"workers": -1}, {"prefetch": 0}, {"rank": -1}]
)
def test_impossible_positions_and_ranks_are_refused(arguments: dict) -> None:
    with pytest.raises(ValueError, match=r"^data: "):
        numbered(10, 2, **arguments)


def test_a_closed_loader_is_empty() -> None:
    loader = numbered(10, 2)
    next(loader)
    loader.close()
    loader.close()
    assert list(loader) == []


# Evaluation


@pytest.mark.parametrize(("count", "workers"), [(11, 0), (12, 0), (11, 2), (3, 3)])
def test_evaluation_yields_every_sample_once_in_order(count: int, workers: int) -> None:
    loader = EvalLoader(Numbered(count), EvalTransform(), size=(8, 8), batch_size=4, workers=workers)
    for _ in range(2 if workers == 0 else 1):  # each loop is a new pass
        batches = list(loader)
        assert len(batches) == len(loader)
        assert [len(batch.images) for batch in batches] == [min(4, count - i) for i in range(0, count, 4)]
        indices = np.concatenate([batch.indices for batch in batches])
        np.testing.assert_array_equal(indices, np.arange(count))
        np.testing.assert_array_equal(np.concatenate([batch.labels for batch in batches]), indices % 5)
        numbers = np.concatenate([np.asarray(batch.images)[:, 0, 0, 0] for batch in batches])
        assert (np.diff(numbers) > 0).all()


@pytest.mark.parametrize("world", [2, 3, 7])
def test_ranks_evaluate_every_sample_exactly_once_together(world: int) -> None:
    shares = [
        EvalLoader(Numbered(21), EvalTransform(), size=(8, 8), batch_size=4, rank=rank, world=world)
        for rank in range(world)
    ]
    batches = [list(share) for share in shares]
    assert [len(share) for share in shares] == [len(b) for b in batches]
    indices = [index for share in batches for batch in share for index in batch.indices.tolist()]
    assert sorted(indices) == list(range(21))


# Broken images, and threads that must not outlive their loader


@pytest.fixture
def damaged(tmp_path: Path) -> ImageFolder:
    from PIL import Image

    for i in range(6):
        Image.new("RGB", (9, 9), (i, i, i)).save(tmp_path / f"{i}.png")
    (tmp_path / "3.png").write_bytes((tmp_path / "3.png").read_bytes()[:40])
    return ImageFolder(tmp_path, labels=False)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_stops_training_and_evaluation_with_its_name(
    damaged: ImageFolder, workers: int
) -> None:
    with (
        TrainLoader(damaged, PRETRAIN, size=SIZE, batch_size=2, seed=0, workers=workers) as loader,
        pytest.raises(ValueError, match=r"3\.png: cannot be decoded"),
    ):
        list(islice(loader, 3))
    if workers == 0:
        with pytest.raises(ValueError, match=r"3\.png: cannot be decoded"):
            list(EvalLoader(damaged, EvalTransform(), size=SIZE, batch_size=2))


def test_importing_the_data_package_loads_no_framework(
    fresh_python: Callable[[str], str],
) -> None:
    names = "{'torch', 'mlx', 'pyarrow', 'sklearn', 'numba'}"
    assert fresh_python(f"import sys, arm_core.data; print({names} & set(sys.modules))").strip() == "set()"


def test_threads_end_with_their_loader_and_with_a_forgotten_one() -> None:
    before = threading.active_count()
    loader = finetuning(workers=2)
    next(loader)
    assert threading.active_count() == before + 2
    loader.close()
    assert threading.active_count() == before
    loader = finetuning(workers=2)
    next(loader)
    del loader
    gc.collect()
    deadline = time.monotonic() + 20
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == before


def test_threads_prepare_the_requested_number_of_batches_ahead() -> None:
    made: list[int] = []

    class Maker:
        def __len__(self) -> int:
            return 10

        def __getitem__(self, number: int) -> dict:
            made.append(number)
            return {"number": np.array(number)}

    with Prefetcher(Maker(), workers=2, prefetch=2) as sets:
        assert next(sets)["number"] == 0
        deadline = time.monotonic() + 20
        while len(made) < 5 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.05)
        assert sorted(made) == [0, 1, 2, 3, 4]
        assert [int(arrays["number"]) for arrays in sets] == list(range(1, 10))


SCRIPT = """
import time
from arm_core.data import PRETRAIN, Synthetic, TrainLoader

loader = TrainLoader(Synthetic(64, (32, 32)), PRETRAIN, size=(32, 32), batch_size=8, seed=0, workers=2)
next(loader)
print("ready", flush=True)
time.sleep(60)
"""


def test_an_interrupted_script_with_busy_threads_ends(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    process = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process.stdout:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) != 0
