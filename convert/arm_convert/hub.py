"""Models on the Hugging Face hub, through `huggingface_hub` (extra `hub`).

A model there is `hf://user/name`, `hf://user/name@revision`, or one file of it,
`hf://user/name/path/checkpoint.pth`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arm_core.files.model_folder import CARD, CONFIG, INDEX, WEIGHTS

PREFIX = "hf://"
FILES = [CONFIG, CARD, WEIGHTS, INDEX, "model-*.safetensors"]
"""Patterns of the files in a model folder; only these are downloaded."""

_PART = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
_ADDRESS = re.compile(rf"hf://({_PART}/{_PART})(?:@([A-Za-z0-9._-]+))?(?:/(.+))?")


@dataclass(frozen=True)
class Address:
    """A repository on the hub, with an optional revision and file."""

    repository: str
    revision: str | None = None
    file: str | None = None


def parse_address(text: str) -> Address:
    """The parts of an address; ValueError if it is not one."""
    match = _ADDRESS.fullmatch(text)
    if match is None or (match[3] and ".." in match[3].split("/")):
        raise ValueError(f"{text}: expected hf://user/name, hf://user/name@revision or hf://user/name/file")
    return Address(match[1], match[2], match[3])


def fetch(text: str) -> Path:
    """Download a model, unless it is in the hub's cache; returns its folder or file."""
    address, hub = parse_address(text), library()
    with in_one_line(text):
        if address.file:
            return Path(hub.hf_hub_download(address.repository, address.file, revision=address.revision))
        return Path(
            hub.snapshot_download(address.repository, revision=address.revision, allow_patterns=FILES)
        )


def push(folder: Path, text: str, *, private: bool, message: str) -> str:
    """Upload a model folder, and create the repository if needed; returns the URL of the commit."""
    address, hub = parse_address(text), library()
    if address.file:
        raise ValueError(f"{text}: expected hf://user/name or hf://user/name@revision to push to")
    with in_one_line(text):
        api = hub.HfApi()
        api.create_repo(address.repository, private=private, exist_ok=True)
        if address.revision:
            api.create_branch(address.repository, branch=address.revision, exist_ok=True)
        done = api.upload_folder(
            repo_id=address.repository,
            folder_path=folder,
            revision=address.revision,
            commit_message=message,
            allow_patterns=FILES,
            delete_patterns=FILES,  # remove the shards of an earlier upload
        )
    return str(done)


def library() -> Any:
    try:
        import huggingface_hub
    except ImportError:
        raise ValueError("hf:// needs huggingface_hub: pip install 'arm-vision[hub]'") from None
    return huggingface_hub


@contextmanager
def in_one_line(text: str) -> Iterator[None]:
    """Convert the errors of the library and of its HTTP client, which have many classes, to ValueError."""
    try:
        yield
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"{text}: {lines[0]}") from error
