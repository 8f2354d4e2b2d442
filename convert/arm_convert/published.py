"""Published checkpoints by name: the list comes from the hub at run time and is cached.

The official weights are files of the Hugging Face repository `OliverRen/ARM`; `official/NAME` means the
file NAME of it, with or without its suffix.
"""

from __future__ import annotations

import difflib
import json
import os
import warnings
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from arm_convert.checkpoint_source import open_checkpoint_source
from arm_convert.importing import import_model, resolve
from arm_core.files.atomic import new_file, write_text
from arm_core.files.model_folder import check_new, read_model
from arm_core.model.presets import PRESETS
from arm_core.training.model_source import Weights

REPOSITORIES = {"official": "OliverRen/ARM"}
"""Repositories of published checkpoints, by the first part of their names."""

SUFFIXES = (".pth", ".pt", ".bin", ".safetensors")
"""Files of a repository that are checkpoints."""

LONGEST_NAME, MOST_FILES = 200, 1000
"""Limits of the search for similar names: its time is quadratic in the length."""


@dataclass(frozen=True)
class Published:
    """A checkpoint on the hub."""

    name: str
    """The name for commands: `official/NAME`."""
    address: str
    """`hf://user/name/file`."""


def cache_folder() -> Path:
    """Folder of lists and converted models: `$ARM_VISION_CACHE`, else `~/.cache/arm-vision`."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("ARM_VISION_CACHE") or Path(base) / "arm-vision")


def list_models(*, refresh: bool = True) -> list[Published]:
    """The published checkpoints, sorted by name.

    refresh: contact the hub; without a network, or if False, the last known list is used.
    Raises ValueError if the hub cannot be reached and no list is cached.
    """
    found: list[Published] = []
    for prefix, repository in REPOSITORIES.items():
        files = _files(prefix, repository, refresh)
        found += [
            Published(f"{prefix}/{file}", f"hf://{repository}/{file}")
            for file in sorted(files)
            if file.endswith(SUFFIXES)
        ]
    return found


def find_published(name: str) -> str | None:
    """The hub address of a published name, None for other names.

    Raises ValueError for an unknown name below a known prefix, with near matches.
    """
    prefix = name.partition("/")[0]
    if prefix not in REPOSITORIES or Path(name).exists():
        return None
    known = {published.name: published.address for published in list_models(refresh=False)}
    if (address := _lookup(name, known)) is None:
        known = {published.name: published.address for published in list_models()}
        address = _lookup(name, known)
    if address is None:
        close = difflib.get_close_matches(name, known, n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else f"known are {', '.join(known) or 'none'}."
        raise ValueError(f"{name}: no published checkpoint of this name; {hint}")
    return address


def pull(name: str, out: str | Path | None = None, *, weights: str = "raw", force: bool = False) -> Path:
    """Download a checkpoint, convert it to a model folder, and check the result; returns the folder.

    name: a published name or `hf://user/name[@revision][/file]`.  out: the folder; None for a folder in the
    cache, which is reused.  An interrupted download is resumed. `hf_hub` verifies sizes and hashes.
    Raises ValueError if the hub cannot be reached, and if this is not an ARM checkpoint.
    """
    address = find_published(name) or name
    if not address.startswith("hf://"):
        raise ValueError(
            f"{name}: expected a published name (`arm models` lists them) or hf://user/name[/file]"
        )
    target = Path(out) if out is not None else _cached(address, weights)
    if out is None and target.exists() and not force:
        read_model(target)  # raises an error if it is broken
        return target
    check_new(target, force=force)
    source = open_checkpoint_source(address, warn=lambda text: warnings.warn(text, stacklevel=3))
    import_model(source, resolve(source, weights=Weights(weights)), target, force=force)
    read_model(target)
    return target


def similar_names(name: str) -> str:
    """`; did you mean ...?` with presets, known published checkpoints and files, or an empty string.

    The list of published checkpoints is the cached one; the network is not used.
    """
    known = [f"{preset}{kind}" for preset in PRESETS for kind in ("", "-classifier", "-pretrain")]
    for prefix in REPOSITORIES:
        if _list_file(prefix).exists():
            known += [f"{prefix}/{file}" for file in _listed(prefix) if file.endswith(SUFFIXES)]
    parent = Path(name).parent
    if parent.is_dir():
        known += [str(parent / path.name) for path in islice(parent.iterdir(), MOST_FILES)]
    close = difflib.get_close_matches(name, known, n=3) if len(name) < LONGEST_NAME else []
    return f"; did you mean {' or '.join(close)}?" if close else ""


def _lookup(name: str, known: dict[str, str]) -> str | None:
    return next((known[full] for full in (name, *(name + s for s in SUFFIXES)) if full in known), None)


def _cached(address: str, weights: str) -> Path:
    plain = address.removeprefix("hf://").replace("/", "--").replace("@", "--at-")
    return cache_folder() / "models" / (plain if weights == "raw" else f"{plain}--{weights}")


def _files(prefix: str, repository: str, refresh: bool) -> list[str]:
    """File names of a repository: from the hub, or else the last known ones."""
    seen = _list_file(prefix)
    if refresh or not seen.exists():
        try:
            files = _ask_hub(repository)
        except ValueError:
            if not seen.exists():
                raise
            warnings.warn(
                f"{repository}: the hub cannot be reached; showing the last known list", stacklevel=4
            )
        else:
            with new_file(seen, force=True) as draft:
                write_text(draft, json.dumps(files))
            return files
    return _listed(prefix)


def _list_file(prefix: str) -> Path:
    return cache_folder() / f"{prefix}.json"


def _listed(prefix: str) -> list[str]:
    """The last known file names of a repository."""
    stored: Any = json.loads(_list_file(prefix).read_text("utf-8"))
    return [str(file) for file in stored]


def _ask_hub(repository: str) -> list[str]:
    from arm_convert.hub import in_one_line, library

    with in_one_line(f"hf://{repository}"):
        return sorted(library().HfApi().list_repo_files(repository))
