"""Speed of the data pipeline: JPEG files of 500x375 pixels to batches of the two official recipes.

    python benchmarks/data_loading.py [--images 256] [--workers 0 1 2] [--repeats 5]

The images are soft colour fields with noise, saved at quality 90, with about the size of ImageNet's
photographs (110 KB). The output for each recipe: images/s with threads, with a torch DataLoader with the same
transform in processes (if torch is installed) and with a plain Pillow loop of the same work; the CPU time of
an image and of its stages; and the cores that feed a GPU. CPU time is also valid on a busy machine.

The same work on images of 8x8 pixels takes the time that does not depend on pixels: mostly Python, with
the interpreter lock held. It limits the number of threads that one process can keep busy.
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
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, features

from arm_core.data import (
    FINETUNE,
    IMAGENET_MEAN,
    IMAGENET_STD,
    PRETRAIN,
    ImageFolder,
    Item,
    Mixing,
    Synthetic,
    TrainTransform,
)
from arm_core.data.augment import rand_augment
from arm_core.data.loader import TrainBatches
from arm_core.data.prefetch import Prefetcher
from arm_core.data.transforms import decode, normalize, random_erase, random_resized_crop
from arm_core.model.rng import KeyedRng

GPU_RATES = (1000, 3000, 6000)
"""Images per second that a GPU may take."""
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
    from torch.utils.data import DataLoader, Dataset

    class Images(Dataset[Any]):
        def __len__(self) -> int:
            return len(batches.source)

        def __getitem__(self, index: int) -> Any:
            rng = KeyedRng(batches.seed, "augment", 0, index)
            return batches.transform(batches.source.item(index), batches.size, rng)

    def cpu() -> float:
        ended = resource.getrusage(resource.RUSAGE_CHILDREN)
        return time.process_time() + ended.ru_utime + ended.ru_stime

    rates, began, seen = [], cpu(), 0
    for _ in range(repeats):
        loader = DataLoader(Images(), batches.batch_size, shuffle=True, num_workers=workers)
        stream = iter(loader)
        next(stream)  # the processes are running
        start = time.perf_counter()
        rest = sum(len(images) for images in stream)
        rates.append(rest / (time.perf_counter() - start))
        seen += rest + batches.batch_size
    return rates, (cpu() - began) / seen * 1000


def pillow_loop(files: list[bytes], size: tuple[int, int]) -> None:
    """Decode, crop, flip and normalise with Pillow, NumPy and `random`, and nothing else."""
    mean, std = np.array(IMAGENET_MEAN, np.float32), np.array(IMAGENET_STD, np.float32)
    for file in files:
        image = Image.open(io.BytesIO(file)).convert("RGB")
        part = math.sqrt(random.uniform(0.2, 1))
        width, height = int(image.width * part), int(image.height * part)
        left, top = random.randint(0, image.width - width), random.randint(0, image.height - height)
        crop = image.crop((left, top, left + width, top + height))
        crop = crop.resize((size[1], size[0]), Image.Resampling.BICUBIC)
        if random.random() < 0.5:
            crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        (np.asarray(crop, np.float32) / 255 - mean) / std


def cpu_ms(action: Callable[[int], object], count: int, repeats: int) -> float:
    """Median over repeats of the mean CPU time of `action(0..count - 1)`, milliseconds."""
    times = []
    for _ in range(repeats):
        start = time.thread_time()
        for i in range(count):
            action(i)
        times.append((time.thread_time() - start) / count * 1000)
    return statistics.median(times)


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
        for label, measure in loaders:
            rates, cpu = measure(batches, workers, repeats)
            print(
                f"  {workers} {label:28s}{statistics.median(rates):6.0f} images/s "
                f"({min(rates):.0f} to {max(rates):.0f}, {len(rates)} passes), CPU {cpu:.2f} ms per image"
            )
    items = [source.item(i) for i in range(count)]
    images = [decode(item.image, item.name) for item in items]
    rngs = [[KeyedRng(0, "benchmark", i) for i in range(count)] for _ in range(repeats)]
    crops = [
        random_resized_crop(images[i], size, transform.crop_scale, transform.crop_ratio, rngs[0][i])
        for i in range(count)
    ]
    arrays = [normalize(crop, transform.mean, transform.std) for crop in crops]
    small = Image.new("RGB", (8, 8))
    tiny = Item(image=np.asarray(small), label=0, name="tiny")
    stages: dict[str, Callable[[int], object]] = {
        "read": source.item,
        "decode": lambda i: decode(items[i].image, items[i].name),
        "crop and resize": lambda i: random_resized_crop(
            images[i], size, transform.crop_scale, transform.crop_ratio, KeyedRng(0, "b", i)
        ),
        "normalise": lambda i: normalize(crops[i], transform.mean, transform.std),
    }
    if (augment := transform.rand_augment) is not None:
        stages["rand-augment"] = lambda i: rand_augment(
            crops[i], augment, fill=transform.mean, rng=KeyedRng(0, "b", i)
        )
        stages["erase (a quarter)"] = lambda i: i % 4 or random_erase(arrays[i], KeyedRng(0, "b", i))
    whole = cpu_ms(lambda i: transform(items[i], size, KeyedRng(0, "b", i)), count, repeats)
    fixed = cpu_ms(lambda i: transform(tiny, (8, 8), KeyedRng(0, "b", i)), count, repeats)
    for stage, action in stages.items():
        print(f"  {stage:30s}{cpu_ms(action, count, repeats):6.2f} ms CPU per image")
    print(f"  {'all of it':30s}{whole:6.2f} ms CPU per image, {1000 / whole:.0f} images/s per core")
    if augment is None:
        files = [item.image for item in items if isinstance(item.image, bytes)]
        plain = cpu_ms(lambda i: pillow_loop(files[i : i + 1], size), count, repeats)
        print(f"  {'plain Pillow loop':30s}{plain:6.2f} ms CPU per image")
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
