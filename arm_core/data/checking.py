"""Finds broken and unusual images in a data set, and says how training treats them."""

from __future__ import annotations

import hashlib
import os
import threading
import warnings
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from arm_core.data.decode import MAX_PIXELS, MAX_SIDES, open_image, orientation, reason, to_rgb
from arm_core.data.folder import ImageFolder
from arm_core.data.opening import Format, open_images
from arm_core.data.sources import UNLABELLED, ListedSource
from arm_core.data.walk import is_hidden

_BAD = "stops training, or is replaced with --on-bad-image skip"
CONSEQUENCES = {
    "empty file": _BAD,
    "cannot be decoded": _BAD,
    "too large": f"refused (more than {MAX_PIXELS} pixels, or sides beyond {MAX_SIDES}:1): {_BAD}",
    "CMYK": "converted to RGB",
    "16-bit": "the high byte of each value is used",
    "palette": "converted to RGB",
    "grey": "the three channels are equal",
    "transparent": "transparent parts become white",
    "animation": "the first frame is used",
    "EXIF rotation": "rotated upright",
    "duplicate": "counts once for each copy",
    "empty class folder": "stops training",
    "classes that differ by case": "are two classes; on some disks they are one folder",
    "skipped": "not read",
}
"""Kinds of findings, and how training treats each."""

BAD = ("empty file", "cannot be decoded", "too large", "empty class folder")
"""Kinds that stop training."""


@dataclass
class Report:
    """The findings in a data set."""

    images: int
    bytes: int = 0
    findings: dict[str, list[str]] = field(default_factory=dict)
    """Names of the images, or sentences, by kind (`CONSEQUENCES`)."""
    classes: dict[str, int] = field(default_factory=dict)
    """Images in each class; empty without labels."""

    def add(self, kind: str, name: str) -> None:
        self.findings.setdefault(kind, []).append(name)

    @property
    def bad(self) -> int:
        """Findings that stop training."""
        return sum(len(self.findings.get(kind, ())) for kind in BAD)


def open_leniently(path: str, *, form: Format = Format.AUTO) -> tuple[ListedSource, Report]:
    """The images at `path`, even if training would refuse them, and the findings of opening them.

    Raises ValueError if the data cannot be opened at all.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        source, classes = _open(path, form)
    report = Report(images=len(source), classes=classes)
    for warning in caught:
        kind = "classes that differ by case" if "by case" in str(warning.message) else "skipped"
        report.add(kind, str(warning.message))
    for name, count in classes.items():
        if count == 0:
            report.add("empty class folder", name)
    return source, report


def check(
    source: ListedSource,
    report: Report,
    *,
    workers: int = 1,
    checked: Callable[[int], None] | None = None,
) -> None:
    """Read and decode every image, and add the findings to the report, in the order of the images.

    `checked` is called with the number of checked images.
    """
    lock, hashes = threading.Lock(), dict[int, str]()

    def look(index: int) -> tuple[list[str], int]:
        kinds, size, digest = _look(source, index)
        with lock:
            hashes[index] = digest
        if checked is not None:
            checked(1)
        return kinds, size

    with ThreadPoolExecutor(max(1, workers)) as threads:
        for index, (kinds, size) in enumerate(threads.map(look, range(len(source)))):
            report.bytes += size
            for kind in kinds:
                report.add(*_finding(kind, source.where(index)))
    first: dict[str, int] = {}
    for index in range(len(source)):
        if hashes[index] and first.setdefault(hashes[index], index) != index:
            report.add("duplicate", f"{source.where(index)} = {source.where(first[hashes[index]])}")


def _open(path: str, form: Format) -> tuple[ListedSource, dict[str, int]]:
    """The images without labels, and the number of images in each class."""
    folder = Path(path)
    if folder.is_dir():
        source = open_images(path, form=form, labels=False)
        if not isinstance(source, ImageFolder):
            source = open_images(path, form=form)
    else:
        try:
            source = open_images(path, form=form)
        except ValueError:
            source = open_images(path, form=form, labels=False)
    if source.classes:
        counts = Counter(source.labels[source.labels != UNLABELLED].tolist())
        return source, {name: counts[label] for label, name in enumerate(source.classes)}
    if not folder.is_dir() or not isinstance(source, ImageFolder):
        return source, {}
    names = sorted(e.name for e in os.scandir(folder) if e.is_dir() and not is_hidden(e.name))
    inside = Counter(name.split("/")[0] for name in source.names if "/" in name)
    with_case = Counter(name.casefold() for name in names)
    if twins := [name for name in names if with_case[name.casefold()] > 1]:
        warnings.warn(f"the classes {', '.join(twins)} differ by case only", stacklevel=2)
    return source, {name: inside[name] for name in names if not (folder / name).samefile(folder)}


def _look(source: ListedSource, index: int) -> tuple[list[str], int, str]:
    """The findings about an image, its number of bytes, and a hash of them."""
    try:
        content = source.read(index)
    except ValueError as error:
        return [f"cannot be decoded: {error}"], 0, ""
    if not content:
        return ["empty file"], 0, ""
    digest = hashlib.sha256(content).hexdigest()
    try:
        with open_image(content) as image:
            kinds = _kinds(image)
            image.load()
            to_rgb(image)
    except Exception as error:
        large = isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning)
        large = large or "pixels, expected" in str(error)
        return [f"{'too large' if large else 'cannot be decoded'}: {reason(error)}"], len(content), digest
    return kinds, len(content), digest


def _finding(kind: str, name: str) -> tuple[str, str]:
    kind, colon, why = kind.partition(": ")
    return kind, f"{name} ({why})" if colon and not why.startswith(name) else why or name


def _kinds(image: Image.Image) -> list[str]:
    checks = {
        "CMYK": image.mode == "CMYK",
        "16-bit": image.mode.startswith("I"),
        "palette": image.mode == "P",
        "grey": image.mode in ("1", "L", "LA"),
        "transparent": image.has_transparency_data,
        "animation": getattr(image, "n_frames", 1) > 1,
        "EXIF rotation": orientation(image) != 1,
    }
    return [kind for kind, found in checks.items() if found]
