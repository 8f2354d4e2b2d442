"""Packs images into tar shards, a common format that is faster to read than many small files.

OUT/shard-00000.tar ...  WebDataset shards: `NAME.jpg`, and `NAME.cls` with the index of its class
OUT/pack.json            classes, settings, and count, size and sha256 of each shard; written last
OUT/partial.json         the same for the finished shards during packing; a repeated call resumes from it
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image

from arm_core.data.decode import BadImage, decode, open_image, orientation, reason
from arm_core.data.identity import identity
from arm_core.data.shards import build_index
from arm_core.data.sources import ListedSource
from arm_core.data.walk import IMAGE_SUFFIXES
from arm_core.files.atomic import create_file, new_file, replace_text
from arm_core.files.reading import open_regular, read_json_file

MANIFEST, PARTIAL = "pack.json", "partial.json"
IMAGES_PER_SHARD = 5000
BLOCK = 2**20


@dataclass(frozen=True, kw_only=True)
class PackSettings:
    """How images are packed."""

    size: int | None = None
    """Images whose short side is longer are resized to it, pixels; None keeps every file as it is."""
    quality: int = 95
    """JPEG quality of resized images."""
    shards: int | None = None
    """Number of tar files; None for one for each `IMAGES_PER_SHARD` images."""

    def __post_init__(self) -> None:
        if self.size is not None and self.size < 1:
            raise ValueError(f"size: expected 1 pixel or more, found {self.size}")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"quality: expected 1 to 100, found {self.quality}")
        if self.shards is not None and self.shards < 1:
            raise ValueError(f"shards: expected 1 or more, found {self.shards}")


def pack(
    source: ListedSource,
    out: Path,
    settings: PackSettings,
    *,
    workers: int = 1,
    packed: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Write `source` to the folder `out`; returns the manifest. `packed` is called with counts of images.

    A second call with the same source and settings resumes an interrupted one. Every shard is read again
    and compared with the written data. Raises ValueError for an image that cannot be decoded, for a folder
    with other contents, and for a shard that differs when it is read.
    """
    shards = min(settings.shards or -(-len(source) // IMAGES_PER_SHARD), len(source))
    task = {"format": 1, "settings": {**asdict(settings), "shards": shards}, "source": identity(source)}
    out.mkdir(parents=True, exist_ok=True)
    done = _continue(out, task)
    keys = _keys(source.names)
    bounds = [len(source) * i // shards for i in range(shards + 1)]
    lock, stopped = threading.Lock(), threading.Event()

    def tell(images: int) -> None:
        if stopped.is_set():
            raise InterruptedError
        if packed is not None:
            packed(images)

    def write(number: int) -> None:
        name = f"shard-{number:05d}.tar"
        if name in done and _same_file(out / name, done[name]):
            tell(done[name]["images"])
            return
        part = range(bounds[number], bounds[number + 1])
        with new_file(out / name, force=True) as draft:
            written = _write_shard(draft, source, part, keys, settings, tell)
        with lock:
            done[name] = written
            replace_text(out / PARTIAL, json.dumps({**task, "shards": done}))

    with ThreadPoolExecutor(max(1, workers)) as threads:
        running = [threads.submit(write, number) for number in range(shards)]
        try:
            for each in running:
                each.result()
        except BaseException:
            stopped.set()
            threads.shutdown(cancel_futures=True)
            raise
        list(threads.map(lambda name: _verify(out / name, done[name]), sorted(done)))
    manifest = {**task, "images": len(source), "classes": list(source.classes)}
    manifest["shards"] = [{"file": name, **done[name]} for name in sorted(done)]
    replace_text(out / MANIFEST, json.dumps(manifest, indent=1) + "\n")
    (out / PARTIAL).unlink(missing_ok=True)
    return manifest


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a packed folder; ValueError if `pack` did not write it."""
    manifest = read_json_file(folder / MANIFEST)
    classes = manifest.get("classes")
    if manifest.get("format") != 1 or not isinstance(classes, list):
        raise ValueError(f"{folder / MANIFEST}: not written by this version of `arm data pack`")
    return manifest


def _continue(out: Path, task: Mapping[str, Any]) -> dict[str, Any]:
    """The shards that an interrupted call for the same task left."""
    found = sorted(entry.name for entry in out.iterdir())
    if not found:
        return {}
    state = next((read_json_file(out / name) for name in (PARTIAL, MANIFEST) if name in found), None)
    ours = [MANIFEST, PARTIAL]
    foreign = [n for n in found if n not in ours and not n.lstrip(".").startswith("shard-")]
    if state is None and foreign:
        raise ValueError(f"{out}: not empty (it holds {foreign[0]!r}); packing needs a new folder")
    if state is not None and {name: state.get(name) for name in ("format", "settings", "source")} != task:
        raise ValueError(f"{out}: holds a pack of other images or settings; choose another folder")
    shards = {} if state is None else state.get("shards", {})
    if isinstance(shards, list):
        shards = {shard.pop("file"): shard for shard in shards}
    return dict(shards)


def _same_file(path: Path, record: Mapping[str, Any]) -> bool:
    with suppress(OSError, ValueError):
        return _hash(path) == record.get("sha256")
    return False


def _verify(path: Path, record: Mapping[str, Any]) -> None:
    if len(build_index(path).names) != record["images"] or _hash(path) != record["sha256"]:
        raise ValueError(f"{path}: reading it gives other data than was written; check the disk")


def _hash(path: Path) -> str:
    found = hashlib.sha256()
    with open_regular(path) as file:
        while block := file.read(BLOCK):
            found.update(block)
    return found.hexdigest()


def _write_shard(
    path: Path,
    source: ListedSource,
    part: range,
    keys: Sequence[str],
    settings: PackSettings,
    packed: Callable[[int], None],
) -> dict[str, Any]:
    before = 0
    with (
        create_file(path) as file,
        tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as archive,
    ):
        for index in part:
            item = source.item(index)
            assert isinstance(item.image, bytes)
            before += len(item.image)
            content, suffix = _converted(item.image, item.name, settings)
            name = source.names[index]
            kept = keys[index] + name[len(keys[index]) :] if _suffix(name) == suffix else keys[index] + suffix
            _add(archive, kept, content)
            if source.classes:
                _add(archive, f"{keys[index]}.cls", str(item.label).encode())
            packed(1)
    return {"images": len(part), "bytes": path.stat().st_size, "source_bytes": before, "sha256": _hash(path)}


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)  # fixed time, owner and mode: the same images give the same shard
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


_SUFFIXES = {"JPEG": ".jpg", "TIFF": ".tif", "JPEG2000": ".jp2", "PPM": ".ppm"}


def _converted(image: bytes, name: str, settings: PackSettings) -> tuple[bytes, str]:
    """The file to store, and its suffix."""
    try:
        with open_image(image) as opened:
            suffix = _SUFFIXES.get(opened.format or "", f".{(opened.format or '').lower()}")
            small = settings.size is None or min(opened.size) <= settings.size
            if small and (settings.size is None or (suffix == ".jpg" and orientation(opened) == 1)):
                return image, suffix
    except Exception as error:
        raise BadImage(f"{name}: cannot be decoded as an image ({reason(error)})") from error
    pixels = decode(image, name)
    scale = min(1.0, (settings.size or 0) / min(pixels.size))
    if scale < 1:
        size = max(1, round(pixels.width * scale)), max(1, round(pixels.height * scale))
        pixels = pixels.resize(size, Image.Resampling.BICUBIC)
    file = io.BytesIO()
    pixels.save(file, "JPEG", quality=settings.quality)
    return file.getvalue(), ".jpg"


def _suffix(name: str) -> str:
    suffix = PurePosixPath(name).suffix.lower()
    return {".jpeg": ".jpg", ".tiff": ".tif"}.get(suffix, suffix)


def _keys(names: Sequence[str]) -> list[str]:
    """Names of the samples: those of the files if they are valid in a tar file, else numbers."""
    keys = [name.removesuffix(PurePosixPath(name).suffix) for name in names]
    sound = all(
        name.lower().endswith(IMAGE_SUFFIXES)
        and not name.startswith("/")
        and "." not in PurePosixPath(key).name
        and ".." not in PurePosixPath(key).parts
        and name.isprintable()
        for name, key in zip(names, keys, strict=True)
    )
    return keys if sound and len(set(keys)) == len(keys) else [f"{i:09d}" for i in range(len(names))]
