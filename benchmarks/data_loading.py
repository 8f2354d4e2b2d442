"""Speed of the data pipeline: JPEG files of 500x375 pixels to batches of the two official recipes.

    python benchmarks/data_loading.py [--images 256] [--workers 0 1 2] [--repeats 5]

It takes about five minutes on 2 cores. The images are soft colour fields with noise, saved at quality 90, of
about the size of ImageNet's photographs (110 KB). For each recipe it prints:

- images/s with threads, and with a torch DataLoader with the same transform in processes (if torch is
  installed); the ratio decides between threads and processes: threads are kept at 0.95 or more;
- the CPU time of an image beside that of a plain Pillow loop of the same work, and the share of each stage;
- the cores that feed a GPU. CPU time is also valid on a busy machine.

Batches are bytes: normalising and mixing happen on the device. The same work on images of 8x8 pixels takes
the time that does not depend on pixels: mostly Python, with the interpreter lock held. It limits the number
of threads that one process can keep busy.
"""

from __future__ import annotations

import argparse
import io
import math
import os
import platform
import random
import resource
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, features

from arm_core.data import (
    FINETUNE,
    PRETRAIN,
    ImageFolder,
    Item,
    Mixing,
    Synthetic,
    TrainTransform,
)
from arm_core.data.augment import LEVELS, OPERATIONS, rand_augment
from arm_core.data.loader import TrainBatches
from arm_core.data.prefetch import Prefetcher
from arm_core.data.transforms import ERASE_AREA, decode, erased_box, random_resized_crop
from arm_core.model.rng import KeyedRng

GPU_RATES = (1000, 3000, 6000)
"""Images per second that a GPU may take."""
ENOUGH = 0.95
"""Threads are kept if they reach this part of the rate of processes."""
HEIGHT, WIDTH = 375, 500
NOISE = 14
"""Standard deviation of the noise, chosen for the file size."""


def write_images(folder: Path, count: int) -> float:
    """Save the images; returns their mean size, KB."""
    fields, rng = Synthetic(count, (HEIGHT, WIDTH)), np.random.default_rng(0)
    for i in range(count):
        noise = rng.normal(0, NOISE, (HEIGHT, WIDTH, 1))
        pixels = np.clip(fields.item(i).image + noise, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:05d}.jpg", quality=90)
    return statistics.mean(path.stat().st_size for path in folder.iterdir()) / 1000


def images_per_second(batches: TrainBatches, workers: int, repeats: int) -> tuple[list[float], float]:
    """One rate per pass over the images, without the start of the threads; and CPU ms per image."""
    rates, count = [], batches.batches_per_epoch
    with Prefetcher(batches, workers=workers) as sets:
        for _ in islice(sets, max(1, 4 * workers)):  # fills and empties the prefetched batches once
            pass
        cpu = time.process_time()
        for _ in range(repeats):
            start = time.perf_counter()
            for _ in islice(sets, count):
                pass
            rates.append(count * batches.batch_size / (time.perf_counter() - start))
        cpu = time.process_time() - cpu
    return rates, cpu / (repeats * count * batches.batch_size) * 1000


def torch_images_per_second(batches: TrainBatches, workers: int, repeats: int) -> tuple[list[float], float]:
    """The same for a torch DataLoader with the same transform in forked processes."""
    import torch
    from torch.utils.data import DataLoader, Dataset, Sampler

    class Images(Dataset[Any]):
        def __len__(self) -> int:
            return len(batches.source)

        def __getitem__(self, index: int) -> Any:
            rng = KeyedRng(batches.seed, "augment", 0, index)
            return batches.transform.augment(batches.source.item(index), batches.size, rng).pixels

    class Endless(Sampler[int]):
        def __iter__(self) -> Iterator[int]:
            return cycle(range(len(batches.source)))

    def cpu() -> float:
        ended = resource.getrusage(resource.RUSAGE_CHILDREN)
        return time.process_time() + ended.ru_utime + ended.ru_stime

    def stacked(images: list[Any]) -> torch.Tensor:
        return torch.from_numpy(np.stack(images))

    rates, count, began = [], batches.batches_per_epoch, cpu()
    loader = DataLoader(
        Images(), batches.batch_size, sampler=Endless(), num_workers=workers, collate_fn=stacked
    )
    stream = iter(loader)
    warm = max(1, 4 * workers)
    for _ in islice(stream, warm):
        pass
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in islice(stream, count):
            pass
        rates.append(count * batches.batch_size / (time.perf_counter() - start))
    del stream  # ends the processes, which are 2 batches ahead each
    made = warm + repeats * count + 2 * workers
    return rates, (cpu() - began) / (made * batches.batch_size) * 1000


def pillow_loop(file: bytes, size: tuple[int, int], transform: TrainTransform) -> None:
    """The same work with Pillow, NumPy and `random`, and nothing else."""
    image = Image.open(io.BytesIO(file)).convert("RGB")
    while True:
        area = random.uniform(*transform.crop_scale) * image.width * image.height
        aspect = math.exp(random.uniform(*(math.log(ratio) for ratio in transform.crop_ratio)))
        width, height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if width <= image.width and height <= image.height:
            break
    left, top = random.randint(0, image.width - width), random.randint(0, image.height - height)
    crop = image.crop((left, top, left + width, top + height))
    crop = crop.resize((size[1], size[0]), Image.Resampling.BICUBIC)
    if random.random() < transform.flip:
        crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if (augment := transform.rand_augment) is not None:
        for operation in random.choices(list(OPERATIONS.values()), k=augment.operations):
            if random.random() < augment.probability:
                crop = operation(crop, augment.magnitude / LEVELS, (124, 116, 104))
    if random.random() < transform.erase:
        erased = int(random.uniform(*ERASE_AREA) * size[0] * size[1])
        np.random.default_rng(random.getrandbits(32)).standard_normal((erased, 3), np.float32)
    np.asarray(crop)


def cpu_ms(action: Callable[[int], object], count: int, repeats: int) -> float:
    """Median over repeats of the mean CPU time of `action(0..count - 1)`, milliseconds."""
    return cpu_ms_in_turn([action], count, repeats)[0]


def cpu_ms_in_turn(actions: Sequence[Callable[[int], object]], count: int, repeats: int) -> list[float]:
    """The same for several actions, measured in turn, so that they share the load of the machine."""
    times: list[list[float]] = [[] for _ in actions]
    for _ in range(repeats):
        for action, own in zip(actions, times, strict=True):
            start = time.thread_time()
            for i in range(count):
                action(i)
            own.append((time.thread_time() - start) / count * 1000)
    return [statistics.median(own) for own in times]


def machine() -> str:
    names = [
        line.split(":")[1].strip()
        for path in (Path("/proc/cpuinfo"),)
        if path.exists()
        for line in path.read_text().splitlines()
        if line.startswith("model name")
    ]
    return f"{names[0] if names else platform.processor() or platform.machine()}, {len(names) or '?'} cores"


def commit() -> str:
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    return subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or "unknown"


def verdict(ratio: float, workers: int) -> str:
    if not workers:
        return "both in the main thread"
    return f"threads reach {ENOUGH:.0%} of processes" if ratio >= ENOUGH else "processes are faster"


def report(name: str, source: ImageFolder, transform: TrainTransform, side: int, options: Any) -> None:
    """Measure one recipe."""
    size, count, repeats = (side, side), min(64, len(source)), options.repeats
    batches = TrainBatches(
        source=source, transform=transform, size=size, batch_size=options.batch, seed=0, classes=None,
        mixing=Mixing(),
    )  # fmt: skip
    print(f"\n{name}, {side}x{side}, batches of {options.batch}")
    loaders: list[tuple[str, Any]] = [("threads", images_per_second)]
    if find_spec("torch"):
        loaders.append(("torch DataLoader, processes", torch_images_per_second))
    for workers in options.workers:
        medians = []
        for label, measure in loaders:
            rates, cpu = measure(batches, workers, repeats)
            medians.append(statistics.median(rates))
            print(
                f"  {workers} {label:28s}{medians[-1]:6.0f} images/s "
                f"({min(rates):.0f} to {max(rates):.0f}, {len(rates)} passes), CPU {cpu:.2f} ms per image"
            )
        if len(medians) == 2:
            ratio = medians[0] / medians[1]
            print(f"  {workers} {'threads / DataLoader':28s}{ratio:6.2f} ({verdict(ratio, workers)})")
    items = [source.item(i) for i in range(count)]
    images = [decode(item.image, item.name) for item in items]
    rngs = [[KeyedRng(0, "benchmark", i) for i in range(count)] for _ in range(repeats)]
    crops = [
        random_resized_crop(images[i], size, transform.crop_scale, transform.crop_ratio, rngs[0][i])
        for i in range(count)
    ]
    small = Image.new("RGB", (8, 8))
    tiny = Item(image=np.asarray(small), label=0, name="tiny")
    stages: dict[str, Callable[[int], object]] = {
        "read": source.item,
        "decode": lambda i: decode(items[i].image, items[i].name),
        "crop and resize": lambda i: random_resized_crop(
            images[i], size, transform.crop_scale, transform.crop_ratio, KeyedRng(0, "b", i)
        ),
    }
    if (augment := transform.rand_augment) is not None:
        stages["rand-augment"] = lambda i: rand_augment(
            crops[i], augment, fill=transform.mean, rng=KeyedRng(0, "b", i)
        )
        stages["erase (a quarter)"] = lambda i: i % 4 or erased_box(size, KeyedRng(0, "b", i))
    stages["flip, copy to the batch"] = lambda i: np.array(
        crops[i].transpose(Image.Transpose.FLIP_LEFT_RIGHT) if i % 2 else crops[i]
    )
    files = [item.image for item in items if isinstance(item.image, bytes)]
    random.seed(0)
    whole, plain = cpu_ms_in_turn(
        [
            lambda i: transform.augment(items[i], size, KeyedRng(0, "b", i)),
            lambda i: pillow_loop(files[i], size, transform),
        ],
        count,
        repeats,
    )
    fixed = cpu_ms(lambda i: transform.augment(tiny, (8, 8), KeyedRng(0, "b", i)), count, repeats)
    for stage, action in stages.items():
        ms = cpu_ms(action, count, repeats)
        print(f"  {stage:30s}{ms:6.2f} ms CPU per image, {100 * ms / whole:3.0f} %")
    print(f"  {'all of it':30s}{whole:6.2f} ms CPU per image, {1000 / whole:.0f} images/s per core")
    print(
        f"  {'plain Pillow loop':30s}{plain:6.2f} ms CPU per image: "
        f"this pipeline is {plain / whole:.2f} times as fast"
    )
    print(
        f"  {'of this on 8x8 pixels':30s}{fixed:6.2f} ms CPU per image: "
        f"about {100 * fixed / whole:.0f} % with the interpreter lock held, {1000 / fixed:.0f} images/s"
    )
    cores = ", ".join(f"{whole * rate / 1000:.1f} at {rate}" for rate in GPU_RATES)
    print(f"  cores that feed a GPU: {cores} images/s")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()

    jpeg = (
        "libjpeg-turbo " + str(features.version("libjpeg_turbo"))
        if features.check("libjpeg_turbo")
        else "libjpeg"
    )
    names = ("numpy", "pillow", *(["torch"] if find_spec("torch") else []))
    versions = ", ".join(f"{name} {version(name)}" for name in names)
    print(f"machine   {machine()}, {platform.system()} {platform.release()}")
    print(f"load      {os.getloadavg()[0]:.1f} processes in the last minute")
    print(f"versions  Python {platform.python_version()}, {versions}, {jpeg}; commit {commit()}")
    with tempfile.TemporaryDirectory() as folder:
        size_kb = write_images(Path(folder), options.images)
        source = ImageFolder(folder, labels=False)
        print(f"data      {options.images} JPEG files of {WIDTH}x{HEIGHT}, {size_kb:.0f} KB each")
        report("pretraining", source, PRETRAIN, 192, options)
        report("finetuning", source, FINETUNE, 224, options)


if __name__ == "__main__":
    main()
