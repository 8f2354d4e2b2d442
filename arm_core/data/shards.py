"""Images in tar files, read in random order: WebDataset shards, packed data, archives of class folders.

An index of every shard (the offset of each image) is built once and kept in the user's cache folder. It is
built again if the size or time of the shard changes. Nothing is unpacked.
"""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from arm_core.data.labels import Labels, by_name, by_number
from arm_core.data.sources import UNLABELLED, ListedSource
from arm_core.data.walk import IMAGE_SUFFIXES, MAX_FILE_BYTES, is_hidden
from arm_core.files.atomic import create_file, new_file
from arm_core.files.reading import open_regular

LABEL_SUFFIXES = (".cls", ".json")
MAX_LABEL_BYTES = 2**16
VERSION = 1


@dataclass(frozen=True)
class Shard:
    """The images of one tar file."""

    names: list[str]
    offsets: npt.NDArray[np.int64]
    """Offset of the bytes of each image."""
    sizes: npt.NDArray[np.int64]
    labels: list[str]
    """Labels as text; empty if a sample has none."""


class TarShards(ListedSource):
    """The images of tar files, in the order of the files and of their members.

    A sample is a name up to its first dot: an image, and its class as `.cls` (a number or a name) or as
    the `label` of a `.json`. If no sample has one, the folder of a member is its class.
    `class_names` names the numbers; `classes` is the order that labels must have.
    Raises ValueError for a file that is truncated or compressed, or holds no images.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        *,
        labels: bool = True,
        classes: Sequence[str] | None = None,
        class_names: Sequence[str] | None = None,
    ) -> None:
        where = str(paths[0]) if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more"
        self._paths = list(paths)
        shards = [_indexed(path) for path in paths]
        names = [name for shard in shards for name in shard.names]
        self._shard = np.repeat(np.arange(len(shards)), [len(shard.names) for shard in shards])
        self._offsets = np.concatenate([shard.offsets for shard in shards])
        self._sizes = np.concatenate([shard.sizes for shard in shards])
        values: Labels = np.full(len(names), UNLABELLED, np.int64)
        known: tuple[str, ...] = ()
        if labels:
            texts = [text for shard in shards for text in shard.labels]
            values, known = _labels(where, names, texts, class_names, classes)
        super().__init__(names, values, known)

    def read(self, index: int) -> bytes:
        path, size = self._paths[self._shard[index]], int(self._sizes[index])
        try:
            with open_regular(path, buffering=0) as file:
                content = os.pread(file.fileno(), size, int(self._offsets[index]))
        except OSError as error:
            raise ValueError(f"{path}: cannot be read ({error.strerror or error})") from None
        if len(content) < size:
            raise ValueError(f"{path}: cut off within {self.names[index]}")
        return content

    def where(self, index: int) -> str:
        return f"{self._paths[self._shard[index]]}:{self.names[index]}"


def _labels(
    where: str,
    names: list[str],
    texts: list[str],
    class_names: Sequence[str] | None,
    expected: Sequence[str] | None,
) -> tuple[Labels, tuple[str, ...]]:
    if not any(texts):
        texts = [name.rsplit("/", 1)[0] if "/" in name else "" for name in names]
        if not all(texts):
            raise ValueError(
                f"{where}: no labels; expected a .cls or .json beside each image, or images in class folders"
            )
        return by_name(where, [text.rsplit("/", 1)[-1] for text in texts], expected)
    if "" in texts:
        raise ValueError(f"{where}: {names[texts.index('')]} has no label (.cls or .json), others have one")
    if all(text.lstrip("-").isdigit() and len(text) < 10 for text in texts):
        return by_number(where, np.array(texts, np.int64), class_names, expected)
    return by_name(where, texts, expected)


def _indexed(path: Path) -> Shard:
    """The index of a shard, from the cache if it matches this file."""
    try:
        status = path.stat()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error})") from None
    key = json.dumps([VERSION, str(path.absolute()), status.st_size, status.st_mtime_ns])
    cached = cache_folder() / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.npz"
    with suppress(Exception):  # missing or corrupt: built again
        with np.load(cached, allow_pickle=False) as stored:
            shard = Shard(
                stored["names"].tolist(), stored["offsets"], stored["sizes"], stored["labels"].tolist()
            )
        ends = shard.offsets + shard.sizes
        if len(shard.names) == len(shard.labels) == len(ends) and 0 <= ends.max() <= status.st_size:
            return shard
    shard = build_index(path)
    with suppress(OSError, ValueError), new_file(cached, force=True) as draft, create_file(draft) as file:
        arrays: dict[str, Any] = {"names": np.array(shard.names), "labels": np.array(shard.labels)}
        np.savez(file, offsets=shard.offsets, sizes=shard.sizes, **arrays)
    return shard


def cache_folder() -> Path:
    """Folder of the indices: `$XDG_CACHE_HOME/arm-vision/shards`, by default below `~/.cache`."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "arm-vision" / "shards"


def build_index(path: Path) -> Shard:
    """Read the headers of a tar file. ValueError if it is not one, is truncated, or holds no images."""
    images: dict[str, tuple[str, int, int]] = {}
    labels: dict[str, str] = {}
    with open_regular(path) as file:
        try:
            with tarfile.open(fileobj=file, mode="r:") as archive:
                while (member := archive.next()) is not None:
                    archive.members.clear()  # type: ignore[attr-defined]  # it would keep each header
                    if not member.isreg() or member.size == 0:
                        continue
                    _add(path, archive, member, images, labels)
        except tarfile.TarError as error:
            raise ValueError(f"{path}: {_reason(file, str(error))}, after {len(images)} images") from None
    if not images:
        raise ValueError(f"{path}: holds no images (of the suffixes {' '.join(IMAGE_SUFFIXES)})")
    found = list(images.values())
    return Shard(
        [name for name, _, _ in found],
        np.array([offset for _, offset, _ in found], np.int64),
        np.array([size for _, _, size in found], np.int64),
        [labels.get(key, "") for key in images],
    )


def _add(
    path: Path,
    archive: tarfile.TarFile,
    member: tarfile.TarInfo,
    images: dict[str, tuple[str, int, int]],
    labels: dict[str, str],
) -> None:
    name = member.name.removeprefix("./")
    folder, _, base = name.rpartition("/")
    stem, dot, suffix = base.partition(".")
    if not stem or is_hidden(base):
        return
    key, suffix = f"{folder}/{stem}", (dot + suffix).lower()
    if suffix.endswith(IMAGE_SUFFIXES):
        if member.issparse() or member.size > MAX_FILE_BYTES:
            raise ValueError(f"{path}: {name} is sparse or larger than {MAX_FILE_BYTES / 2**20:.0f} MiB")
        if key in images:
            raise ValueError(f"{path}: two images have the name {key.strip('/')}")
        images[key] = (name, member.offset_data, member.size)
    elif suffix in LABEL_SUFFIXES and member.size <= MAX_LABEL_BYTES:
        stored = archive.extractfile(member)
        assert stored is not None
        text = _label(stored.read(), suffix)
        if text is not None:
            labels[key] = text


def _label(content: bytes, suffix: str) -> str | None:
    try:
        text = content.decode().strip()
        if suffix == ".cls":
            return text
        value = json.loads(text)
        found = value.get("label") if isinstance(value, dict) else None
        return None if found is None or isinstance(found, bool | float | list | dict) else str(found)
    except (ValueError, RecursionError):
        return None


def _reason(file: Any, error: str) -> str:
    file.seek(0)
    head = file.read(6)
    if head.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")):  # gzip, bzip2, xz, zstd
        return "a compressed tar file cannot be read in random order; decompress it"
    return "cut off" if "unexpected end" in error else f"not a valid tar file ({error})"
