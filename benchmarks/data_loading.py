"""Images per second of the data pipeline: JPEG files of 500x375 pixels to pretraining batches.

    python benchmarks/data_loading.py [--images 256] [--workers 0 1 2] [--size 192] [--repeats 5]

Photographs are stood in for by soft colour fields with noise, saved at quality 90 and about as large
as those of ImageNet (110 KB). Prints one line per number of workers (0: made in the training process)
with the median over repeats and their range, then where the time of one image goes.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image, features

from arm_core.data import IMAGENET_MEAN, IMAGENET_STD, PRETRAIN, ImageFolder, Synthetic, TrainLoader
from arm_core.data.transforms import decode, normalize, random_resized_crop
from arm_core.model.rng import KeyedRng

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


def images_per_second(source: ImageFolder, size: int, batch: int, workers: int, repeats: int) -> list[float]:
    """One rate per pass over as many batches as the source holds; starting the workers is not timed."""
    rates, batches = [], len(source) // batch
    with TrainLoader(
        source, PRETRAIN, size=(size, size), batch_size=batch, seed=0, workers=workers
    ) as loader:
        for _ in islice(loader, max(1, 4 * workers)):  # fills and empties what is prefetched once
            pass
        for _ in range(repeats):
            start = time.perf_counter()
            for _ in islice(loader, batches):
                pass
            rates.append(batches * batch / (time.perf_counter() - start))
    return rates


def milliseconds(action: Callable[[int], object], count: int, repeats: int) -> float:
    """Median over repeats of the mean time of `action(0..count - 1)`."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        for i in range(count):
            action(i)
        times.append((time.perf_counter() - start) / count * 1000)
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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--size", type=int, default=192)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()

    jpeg = (
        "libjpeg-turbo " + str(features.version("libjpeg_turbo"))
        if features.check("libjpeg_turbo")
        else "libjpeg"
    )
    versions = ", ".join(f"{name} {version(name)}" for name in ("numpy", "pillow", "grain"))
    print(f"machine   {machine()}, {platform.system()} {platform.release()}")
    print(f"versions  Python {platform.python_version()}, {versions}, {jpeg}; commit {commit()}")
    with tempfile.TemporaryDirectory() as folder:
        size_kb = write_images(Path(folder), options.images)
        source = ImageFolder(folder, labels=False)
        print(f"data      {options.images} JPEG files of {WIDTH}x{HEIGHT}, {size_kb:.0f} KB each")
        print(
            f"task      random crop to {options.size}x{options.size} and flip, batches of {options.batch}\n"
        )
        for workers in options.workers:
            rates = images_per_second(source, options.size, options.batch, workers, options.repeats)
            each = f", {statistics.median(rates) / workers:6.0f} per worker" if workers > 1 else ""
            print(
                f"{workers} workers {statistics.median(rates):6.0f} images/s "
                f"({min(rates):.0f} to {max(rates):.0f}, {len(rates)} passes){each}"
            )
        size, count = (options.size, options.size), min(64, options.images)
        files = [source.item(i) for i in range(count)]
        images = [decode(item.image, item.name) for item in files]
        draws = [KeyedRng(0, "benchmark", i) for i in range(count)]
        scale, ratio = PRETRAIN.crop_scale, PRETRAIN.crop_ratio
        crops = [random_resized_crop(images[i], size, scale, ratio, draws[i]) for i in range(count)]
        steps: dict[str, Callable[[int], object]] = {
            "read": source.item,
            "decode": lambda i: decode(files[i].image, files[i].name),
            "crop and resize": lambda i: random_resized_crop(images[i], size, scale, ratio, draws[i]),
            "normalise": lambda i: normalize(crops[i], IMAGENET_MEAN, IMAGENET_STD),
        }
        print()
        for name, action in steps.items():
            print(f"{name:16s}{milliseconds(action, count, options.repeats):6.2f} ms per image")


if __name__ == "__main__":
    main()
