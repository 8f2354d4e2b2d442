"""Images in a folder: classes by sub-folder, or images without labels."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from arm_core.data.labels import not_among, warn_of_case
from arm_core.data.sources import UNLABELLED, ListedSource
from arm_core.data.walk import Found, find_images, is_hidden, looked_for, read_file

SPLITS = {"train", "training", "val", "valid", "validation", "test"}


class ImageFolder(ListedSource):
    """The images under a folder.

    With `labels`, every sub-folder of `root` is a class and holds its images at any depth. `classes`
    fixes the class order (by default the sorted names) and refuses other sub-folders, so that the
    labels of a validation folder have the same meaning as those of the training folder. Without `labels`,
    every image under `root` is included, without a class. Hidden files and folders are skipped; special files
    and formats that are not read are skipped with a warning.

    Raises ValueError for a missing folder, one without images, a class without images, an unknown class.
    """

    def __init__(
        self, root: str | os.PathLike[str], *, labels: bool = True, classes: Sequence[str] | None = None
    ) -> None:
        self._root = Path(root)
        if not self._root.is_dir():
            what = "is a file, not a folder" if self._root.exists() else "no such folder"
            raise ValueError(f"{self._root}: {what}; expected a folder of images")
        found, counts = Found(), []
        folders = _class_folders(self._root, found) if labels else []
        names = _known(self._root, folders, classes) if labels else ("",)
        for name in names:
            before = len(found.images)
            # A class that the caller named may be missing here.
            if not labels or name in folders:
                find_images(self._root, name, found)
            counts.append(len(found.images) - before)
        found.warn(self._root)
        if not found.images:
            raise ValueError(f"{self._root}: no images found ({looked_for()})")
        # An existing class folder must not be empty.
        for name, count in zip(names, counts, strict=True):
            if not count and name in folders:
                raise ValueError(f"{self._root / name}: no images in this class folder ({looked_for()})")
        values = np.repeat(np.arange(len(counts)) if labels else [UNLABELLED], counts)
        super().__init__(found.images, values.astype(np.int64), names if labels else ())

    def read(self, index: int) -> bytes:
        return read_file(self._root / self.names[index])

    def where(self, index: int) -> str:
        return str(self._root / self.names[index])


def _class_folders(root: Path, found: Found) -> list[str]:
    folders = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not is_hidden(entry.name))
    cycles = [name for name in folders if (root / name).samefile(root)]
    found.repeated += cycles
    folders = [name for name in folders if name not in cycles]
    if not folders:
        raise ValueError(
            f"{root}: no class folders; a classifier learns from one sub-folder of images per class"
        )
    if len(folders) > 1 and SPLITS.issuperset(name.lower() for name in folders):
        raise ValueError(
            f"{root}: holds the splits {', '.join(folders)}, not classes; "
            f"pass one of them, such as {root / folders[0]}"
        )
    warn_of_case(str(root), folders)
    return folders


def _known(root: Path, folders: Sequence[str], expected: Sequence[str] | None) -> tuple[str, ...]:
    if expected is None:
        return tuple(folders)
    if unknown := sorted(set(folders) - set(expected)):
        raise ValueError(f"{root}: class folder {unknown[0]!r} {not_among(expected)}")
    return tuple(expected)
