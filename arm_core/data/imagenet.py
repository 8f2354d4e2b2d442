"""ImageNet-1k's classes in the order of the logits, its subsets and labels; sources: `assets/README.md`."""

from __future__ import annotations

import gzip
from collections import Counter
from functools import lru_cache
from importlib import resources

CLASSES = 1000


def _asset(name: str) -> bytes:
    return resources.files("arm_core.data").joinpath(f"assets/{name}").read_bytes()


@lru_cache(maxsize=1)
def _rows() -> tuple[tuple[str, str], ...]:
    text = _asset("imagenet_classes.tsv").decode()
    return tuple((synset, words) for synset, words in (line.split("\t") for line in text.splitlines()))


def imagenet_synsets() -> tuple[str, ...]:
    """WordNet synsets (`n01440764`, ...): the names of ImageNet's class folders, 1000."""
    return tuple(synset for synset, _ in _rows())


def imagenet_names() -> tuple[str, ...]:
    """A short and unique name for each class (`tench`, ...), 1000.

    The first word of the synset; if two classes share it, all its words and the synset.
    """
    short = [words.split(",")[0] for _, words in _rows()]
    count = Counter(short)
    return tuple(
        name if count[name] == 1 else f"{words} ({synset})"
        for name, (synset, words) in zip(short, _rows(), strict=True)
    )


def imagenet_subset(name: str) -> tuple[str, ...]:
    """The synsets of a robustness set, 200 each. name: `imagenet-a` or `imagenet-r`."""
    return tuple(_asset(f"{name.replace('-', '_')}.txt").decode().split())


def real_labels() -> list[list[int]]:
    """Labels of ImageNet-ReaL of the validation images 1, 2, ...: 50,000 lists, some of them empty."""
    text = gzip.decompress(_asset("imagenet_real.txt.gz")).decode()
    return [[int(label) for label in line.split()] for line in text.splitlines()]
