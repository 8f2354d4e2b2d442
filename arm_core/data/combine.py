"""Sources made from other sources: several as one, a part of one, and a split by names."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from arm_core.data.labels import by_name
from arm_core.data.sources import ListedSource

Indices = npt.NDArray[np.int64]


class Joined(ListedSource):
    """The images of several sources, in order; classes are matched by name."""

    def __init__(self, sources: Sequence[ListedSource]) -> None:
        self._sources = list(sources)
        self._starts = np.cumsum([0, *(len(source) for source in sources)])
        names = [f"{i}/{name}" for i, source in enumerate(sources) for name in source.names]
        classes = sources[0].classes
        labels = [source.labels for source in sources]
        if any(source.classes != classes for source in sources):
            every = sorted({name for source in sources for name in source.classes})
            tables = [by_name("data", source.classes, every)[0] for source in sources]
            labels = [table[source.labels] for table, source in zip(tables, sources, strict=True)]
            classes = tuple(every)
        grouped = any(source.groups is not None for source in sources)
        groups = [group for source in sources for group in (source.groups or source.names)]
        super().__init__(names, np.concatenate(labels), classes, groups=groups if grouped else None)

    def _at(self, index: int) -> tuple[ListedSource, int]:
        source = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self._sources[source], index - int(self._starts[source])

    def read(self, index: int) -> bytes:
        source, own = self._at(index)
        return source.read(own)

    def where(self, index: int) -> str:
        source, own = self._at(index)
        return source.where(own)


class Subset(ListedSource):
    """Some images of a source, in the order of `indices`, with the same classes."""

    def __init__(self, source: ListedSource, indices: Indices) -> None:
        self._source, self._indices = source, indices
        names = [source.names[i] for i in indices.tolist()]
        super().__init__(names, source.labels[indices], source.classes)

    def read(self, index: int) -> bytes:
        return self._source.read(int(self._indices[index]))

    def where(self, index: int) -> str:
        return self._source.where(int(self._indices[index]))


def split(source: ListedSource, fraction: float) -> tuple[ListedSource, ListedSource]:
    """Images to train on, and about `fraction` of each class to evaluate on.

    The split is determined by hashes of the names (of the groups, if the source has groups). It is the same
    on every machine, and an image that is added later moves few others. Raises ValueError if one part
    would be empty.
    """
    held = np.zeros(len(source), bool)
    if source.groups is not None:
        members = defaultdict[str, list[int]](list)
        for index, group in enumerate(source.groups):
            members[group].append(index)
        for group in sorted(members, key=_hash):
            if held.sum() + len(members[group]) <= round(fraction * len(source)):
                held[members[group]] = True
    else:
        for label in np.unique(source.labels).tolist():
            own = np.flatnonzero(source.labels == label).tolist()
            own.sort(key=lambda index: _hash(source.names[index]))
            held[own[: round(fraction * len(own))]] = True
    if held.all() or not held.any():
        raise ValueError(
            f"data.val_fraction of {fraction:g} leaves no images to {'train' if held.all() else 'evaluate'} "
            f"on, of {len(source)}"
        )
    return Subset(source, np.flatnonzero(~held)), Subset(source, np.flatnonzero(held))


def _hash(name: str) -> bytes:
    return hashlib.sha256(name.encode(errors="surrogateescape")).digest()
