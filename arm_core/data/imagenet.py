"""The classes of ImageNet-1k in the order of the logits; source and licence: `assets/README.md`."""

from __future__ import annotations

from collections import Counter
from functools import lru_cache
from importlib import resources

CLASSES = 1000


@lru_cache(maxsize=1)
def _rows() -> tuple[tuple[str, str], ...]:
    text = resources.files("arm_core.data").joinpath("assets/imagenet_classes.tsv").read_text("utf-8")
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
