"""ObjectNet: its images of classes that ImageNet has too, with the classes that count as correct.

Barbu et al., 2019, "ObjectNet: A large-scale bias-controlled dataset for pushing the limits of object
recognition models", objectnet.dev. 113 of its 313 classes correspond to one or more classes of ImageNet. The
table of the correspondence is read from the folder `mappings` of the download, so that none is shipped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from arm_core.data.decode import decode
from arm_core.data.folder import ImageFolder
from arm_core.data.imagenet import imagenet_synsets
from arm_core.data.sources import Item, ListedSource
from arm_core.files.reading import MAX_JSON, read_json_file, read_text

IMAGES, MAPPINGS = "images", "mappings"
FOLDERS = "folder_to_objectnet_label.json"
"""Name of an image folder -> name of a class of ObjectNet."""
ANSWERS = "objectnet_to_imagenet_1k.json"
"""Name of a class of ObjectNet -> names of classes of ImageNet, separated by `; `."""
NAMES = "imagenet_to_label_2012_v2"
"""Names of the classes of ImageNet, one a line, in the order of the ILSVRC 2012 development kit."""
ORDER = "pytorch_to_imagenet_2012_id.json"
"""Index of a class in the order of the synsets -> number of its line in `NAMES`, from 0."""

BORDER = 2
"""Pixels cut from each side, as in the authors' github.com/abarbu/objectnet-template-pytorch: the files are
framed in red."""


class ObjectNet(ListedSource):
    """The images at a download of ObjectNet; an image's label is the first of the accepted classes.

    root: holds the folders `images` and `mappings`.  classes: synsets, in the order of the model's logits.
    Raises ValueError if a file of the download is missing or if it names unknown classes.
    """

    def __init__(self, root: Path, classes: Sequence[str]) -> None:
        missing = [name for name in (IMAGES, MAPPINGS) if not (root / name).is_dir()]
        if missing:
            raise ValueError(
                f"{root}: no folder {missing[0]!r}; expected the download of ObjectNet with {IMAGES!r} and "
                f"{MAPPINGS!r}"
            )
        answers = read_answers(root / MAPPINGS, classes)
        self._source = ImageFolder(root / IMAGES)
        groups = [answers.get(name) for name in self._source.classes]
        if unknown := sorted(set(answers) - set(self._source.classes)):
            raise ValueError(f"{root / IMAGES}: no folder {unknown[0]!r}, which {FOLDERS} names")
        kept = [i for i, label in enumerate(self._source.labels.tolist()) if groups[label] is not None]
        self._indices = kept
        labels = [groups[label][0] for label in self._source.labels[kept].tolist()]
        super().__init__([self._source.names[i] for i in kept], np.array(labels, np.int64), classes)
        self.accepted = list(answers.values())
        """Indices of the classes that count as correct, for each class of ObjectNet."""

    def read(self, index: int) -> bytes:
        return self._source.read(self._indices[index])

    def where(self, index: int) -> str:
        return self._source.where(self._indices[index])

    def item(self, index: int, epoch: int = 0) -> Item:
        """The image without its frame, as pixels."""
        framed = super().item(index)
        image = decode(framed.image, framed.name)
        inner = image.crop((BORDER, BORDER, image.width - BORDER, image.height - BORDER))
        return replace(framed, image=np.asarray(inner))


def read_answers(mappings: Path, classes: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """For each image folder that ImageNet has classes for, their indices among `classes` (synsets)."""
    if absent := [name for name in (FOLDERS, ANSWERS, NAMES, ORDER) if not (mappings / name).is_file()]:
        raise ValueError(f"{mappings}: no file {absent[0]!r}, which is part of ObjectNet's download")
    folders, answers, order = (read_json_file(mappings / name) for name in (FOLDERS, ANSWERS, ORDER))
    lines = read_text(mappings / NAMES, MAX_JSON).splitlines()
    synsets, places = imagenet_synsets(), {name: i for i, name in enumerate(classes)}
    index_of_line = {line: int(index) for index, line in order.items()}
    folder_of = {label: folder for folder, label in folders.items()}
    found: dict[str, tuple[int, ...]] = {}
    seen: set[int] = set()
    for label, words in answers.items():
        group = []
        for name in words.split("; "):
            if lines.count(name) != 1:
                raise ValueError(f"{mappings / ANSWERS}: {name!r} is not one line of {NAMES}")
            synset = synsets[index_of_line[lines.index(name)]]
            if synset not in places:
                raise ValueError(f"objectnet: the model lacks the class {synset} ({name})")
            group.append(places[synset])
        if label not in folder_of:
            raise ValueError(f"{mappings / ANSWERS}: class {label!r} has no folder in {FOLDERS}")
        if seen.intersection(group):
            raise ValueError(f"{mappings / ANSWERS}: {label!r} shares a class of ImageNet with another class")
        seen.update(group)
        found[folder_of[label]] = tuple(group)
    return found
