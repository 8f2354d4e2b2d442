"""Opens images by path; the format is detected unless it is given."""

from __future__ import annotations

import glob
import itertools
import os
import re
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path

from arm_core.data.combine import Joined
from arm_core.data.folder import ImageFolder
from arm_core.data.pack import MANIFEST, read_manifest
from arm_core.data.parquet import HubImages
from arm_core.data.shards import TarShards
from arm_core.data.sources import ListedSource
from arm_core.data.table import ImageTable
from arm_core.data.walk import IMAGE_SUFFIXES, is_hidden

HUB = "hf://datasets/"


class Format(StrEnum):
    """How images are stored."""

    AUTO = "auto"
    FOLDER = "folder"
    TABLE = "table"
    """A .csv, .tsv or .jsonl file."""
    PARQUET = "parquet"
    """Hugging Face parquet files."""
    ARROW = "arrow"
    """A folder that `datasets` saved."""
    TAR = "tar"
    """WebDataset shards, or the output of `arm data pack`."""


_SUFFIXES = {
    ".csv": Format.TABLE,
    ".tsv": Format.TABLE,
    ".jsonl": Format.TABLE,
    ".ndjson": Format.TABLE,
    ".parquet": Format.PARQUET,
    ".arrow": Format.ARROW,
    ".tar": Format.TAR,
}
_ENDINGS = {Format.PARQUET: ".parquet", Format.ARROW: ".arrow", Format.TAR: ".tar"}


def open_images(
    path: str | os.PathLike[str],
    *,
    form: Format = Format.AUTO,
    labels: bool = True,
    classes: Sequence[str] | None = None,
) -> ListedSource:
    """The images at a path.

    path: a folder, a file of a known kind, a pattern (`train-*.parquet`, `shard-{000..099}.tar`), several
    paths (`{/data/first,/data/second}`), or `hf://datasets/USER/NAME[@REVISION][/FOLDER]`, which is
    downloaded to the hub's cache.
    labels: False for images without classes.  classes: the order of the classes, if it is fixed.
    Raises ValueError if nothing is found, or if the data does not match its format.
    """
    found = [str(download(name)) if name.startswith(HUB) else name for name in expand(os.fspath(path))]
    files: list[Path] = []
    sources: list[ListedSource] = []
    for name in found:
        if Path(name).is_dir() or not Path(name).exists():
            sources.append(_open_folder(Path(name), form, labels, classes))
        else:
            files.append(Path(name))
    kinds = sorted({_kind(file) for file in files} if form is Format.AUTO else {form})
    if len(kinds) > 1:
        raise ValueError(f"{path}: matches files of several formats ({', '.join(kinds)})")
    if files and kinds[0] is Format.TABLE:
        sources += [ImageTable(file, labels=labels, classes=classes) for file in files]
    elif files:
        sources.append(_open_files(files, kinds[0], labels, classes))
    return sources[0] if len(sources) == 1 else Joined(sources)


def _open_folder(folder: Path, form: Format, labels: bool, classes: Sequence[str] | None) -> ListedSource:
    if form is Format.AUTO:
        form = _found(folder) if folder.is_dir() else Format.FOLDER
    if form is Format.FOLDER:
        return ImageFolder(folder, labels=labels, classes=classes)  # raises the error about missing labels
    if form is Format.TABLE:
        raise ValueError(f"{folder}: expected a .csv, .tsv or .jsonl file, found a folder")
    return _open_files(_listed(folder, _ENDINGS[form]), form, labels, classes)


def _open_files(files: list[Path], form: Format, labels: bool, classes: Sequence[str] | None) -> ListedSource:
    if form is Format.FOLDER:
        raise ValueError(f"{files[0]}: is a file, not a folder; expected a folder of images")
    if form is not Format.TAR:
        return HubImages(files, labels=labels, classes=classes)
    folder = files[0].parent
    names = read_manifest(folder)["classes"] if (folder / MANIFEST).is_file() else None
    return TarShards(files, labels=labels, classes=classes, class_names=names or None)


def _kind(file: Path) -> Format:
    return _SUFFIXES.get(file.suffix.lower(), Format.FOLDER)


def expand(path: str) -> list[str]:
    """The paths that match a pattern, in order; an existing path matches itself."""
    if Path(path).exists() or not (glob.has_magic(path) or "{" in path):
        return [path]
    found: list[str] = []
    for pattern in _braces(path):
        matches = sorted(glob.glob(pattern)) if glob.has_magic(pattern) else [pattern]  # noqa: PTH207
        found += matches
        if not matches or not (pattern.startswith(HUB) or Path(matches[0]).exists()):
            raise ValueError(f"{pattern}: no such file or folder; expected images")
    return found


def absolute(path: str) -> str:
    """A path to the same data from any working directory."""
    if Path(path).exists() or not path.startswith((HUB, "{")):
        return path if path.startswith(HUB) else os.path.abspath(path)  # noqa: PTH100
    return path if path.startswith(HUB) else together([absolute(name) for name in _braces(path)])


def together(paths: Sequence[str]) -> str:
    """Several paths as one."""
    if len(paths) == 1:
        return paths[0]
    if bad := next((path for path in paths if set(path) & set("{},")), None):
        raise ValueError(
            f"{bad}: several paths are joined with braces and commas, so no path can contain them"
        )
    return "{" + ",".join(paths) + "}"


def _braces(pattern: str) -> list[str]:
    """`a{00..02}` to `a00`, `a01`, `a02`; `{x,y}` to both."""
    parts = re.split(r"\{([^{}]*)\}", pattern)
    choices = []
    for number, part in enumerate(parts):
        span = re.fullmatch(r"(\d{1,9})\.\.(\d{1,9})", part)
        if number % 2 == 0:
            choices.append([part])
        elif span is None:
            choices.append(part.split(","))
        else:
            first, last = int(span[1]), int(span[2])
            if not 0 <= last - first < 10**6:
                raise ValueError(f"{pattern}: {first}..{last} is not a range of shards")
            choices.append([f"{i:0{len(span[1])}d}" for i in range(first, last + 1)])
    return ["".join(words) for words in itertools.product(*choices)]


def _found(folder: Path) -> Format:
    """The format of a folder; other files count only if there are neither images nor class folders."""
    names = sorted(entry.name for entry in os.scandir(folder) if not is_hidden(entry.name))
    if MANIFEST in names:
        return Format.TAR
    if any(name.lower().endswith(IMAGE_SUFFIXES) for name in names):
        return Format.FOLDER
    if {"dataset_info.json", "state.json"} <= set(names):
        return Format.ARROW
    if any((folder / name).is_dir() and name != "data" for name in names):
        return Format.FOLDER
    inside = names + [path.name for path in (folder / "data").glob("*")]
    return next(
        (form for form in (Format.TAR, Format.PARQUET) if any(n.endswith(_ENDINGS[form]) for n in inside)),
        Format.FOLDER,
    )


def _listed(folder: Path, ending: str) -> list[Path]:
    """The files of a kind in a folder or its sub-folder `data`; ValueError if there are several splits."""
    found = sorted(folder.glob(f"*{ending}")) or sorted((folder / "data").glob(f"*{ending}"))
    if not found:
        raise ValueError(f"{folder}: no {ending} files found")
    splits = sorted({re.split(r"[-_.]", file.stem)[0] for file in found})
    known = [name for name in splits if name in ("train", "val", "valid", "validation", "test")]
    if len(known) > 1:
        example = found[0].parent / f"{known[0]}*{ending}"
        raise ValueError(f"{folder}: holds the splits {', '.join(known)}; pass one, such as '{example}'")
    return found


def download(path: str) -> Path:
    """The folder of `hf://datasets/USER/NAME[@REVISION][/FOLDER]` in the hub's cache."""
    match = re.fullmatch(r"hf://datasets/([\w.-]+/[\w.-]+)(?:@([\w.-]+))?(?:/([\w./*-]+))?", path)
    if match is None:
        raise ValueError(f"{path}: expected {HUB}USER/NAME[@REVISION][/FOLDER]")
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ImportError:
        raise ValueError(
            f"{path}: needs huggingface_hub; install it with: pip install 'arm-vision[hub]'"
        ) from None
    name, revision, below = match.groups()
    wanted = [f"{below or ''}*{end}" for end in (".parquet", ".tar", ".csv", ".jsonl")]
    wanted += [f"{below.rstrip('/')}/*"] if below else []
    try:
        root = snapshot_download(name, repo_type="dataset", revision=revision, allow_patterns=wanted)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be downloaded ({str(error).splitlines()[0][:200]})") from None
    return Path(root) / below if below else Path(root)
