"""Protocols of ImageNet's robustness sets: the classes that count, and the definition of a correct answer.

Their images are in folders named like ImageNet's classes (WordNet ids), except where stated.

imagenet-a       arXiv:1907.07174; 200 classes, the other logits are ignored
imagenet-r       arXiv:2006.16241; 200 classes, the other logits are ignored
imagenet-sketch  arXiv:1905.13549; all classes
imagenet-v2      arXiv:1902.10811; folders are named by the indices of the classes
imagenet-real    arXiv:2006.07159; the validation images, several right answers for each, or none
imagenet-c       arXiv:1903.12261; corruption/severity/class, the errors relative to AlexNet's
objectnet        Barbu et al., 2019; some of its classes are several of ImageNet (`arm_core.data.objectnet`)
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from arm_core.data.imagenet import CLASSES, imagenet_subset, imagenet_synsets, real_labels
from arm_core.data.sources import ListedSource
from arm_core.engine.protocol import Array, Engine, Images
from arm_core.files.reading import MAX_JSON, read_text
from arm_core.training.predictions import Predictions


class LabelSet(StrEnum):
    """A set of images with its own protocol."""

    IMAGENET_A = "imagenet-a"
    IMAGENET_R = "imagenet-r"
    IMAGENET_SKETCH = "imagenet-sketch"
    IMAGENET_V2 = "imagenet-v2"
    IMAGENET_REAL = "imagenet-real"
    IMAGENET_C = "imagenet-c"
    OBJECTNET = "objectnet"


RESTRICTED = (LabelSet.IMAGENET_A, LabelSet.IMAGENET_R)
"""Sets whose other classes are ignored."""

ALEXNET_ERRORS = {
    "gaussian_noise": 0.886428,
    "shot_noise": 0.894468,
    "impulse_noise": 0.922640,
    "defocus_blur": 0.819880,
    "glass_blur": 0.826268,
    "motion_blur": 0.785948,
    "zoom_blur": 0.798360,
    "snow": 0.866816,
    "frost": 0.826572,
    "fog": 0.819324,
    "brightness": 0.564592,
    "contrast": 0.853204,
    "elastic_transform": 0.646056,
    "pixelate": 0.717840,
    "jpeg_compression": 0.606500,
}
"""AlexNet's mean error over the five severities, by corruption: github.com/hendrycks/robustness, the code of
arXiv:1903.12261."""
SEVERITIES = ("1", "2", "3", "4", "5")


class Restricted:
    """An engine whose logits are -inf, except for some classes."""

    def __init__(self, engine: Engine, classes: npt.NDArray[np.int64]) -> None:
        self._engine, self._classes = engine, classes

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def forward(self, images: Images, *, intermediates: bool = False) -> dict[str, Array]:
        outputs = self._engine.forward(images, intermediates=intermediates)
        logits = np.full_like(outputs["logits"], -np.inf)
        logits[:, self._classes] = outputs["logits"][:, self._classes]
        return {**outputs, "logits": logits}


class Merged:
    """An engine that takes groups of classes as one: the first has the group's largest logit, others -inf."""

    def __init__(self, engine: Engine, groups: Sequence[Sequence[int]]) -> None:
        self._engine, self._groups = engine, [np.array(group) for group in groups]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def forward(self, images: Images, *, intermediates: bool = False) -> dict[str, Array]:
        outputs = self._engine.forward(images, intermediates=intermediates)
        logits = outputs["logits"].copy()
        for group in self._groups:
            logits[:, group] = -np.inf
            logits[:, group[0]] = outputs["logits"][:, group].max(-1)
        return {**outputs, "logits": logits}


def class_order(classes: Sequence[str], *, named: bool) -> tuple[str, ...]:
    """The names of a model's classes; a model of 1000 classes without names has ImageNet's."""
    return imagenet_synsets() if not named and len(classes) == CLASSES else tuple(classes)


def subset(label_set: LabelSet, classes: Sequence[str]) -> npt.NDArray[np.int64]:
    """Indices of the 200 classes of imagenet-a or imagenet-r. Raises ValueError if `classes` lacks one."""
    places = {name: i for i, name in enumerate(classes)}
    names = imagenet_subset(label_set)
    if missing := [name for name in names if name not in places]:
        raise ValueError(
            f"{label_set}: the model lacks {len(missing)} of its {len(names)} classes, such as {missing[0]}; "
            "expected a model of ImageNet's classes, named by WordNet ids"
        )
    return np.array([places[name] for name in names])


def check_classes(label_set: LabelSet, source: ListedSource) -> str | None:
    """A warning if the images are only a part of the set, else None.

    Raises ValueError if imagenet-a or imagenet-r has images of classes that the set does not have.
    """
    found = {source.classes[label] for label in np.unique(source.labels).tolist()}
    if label_set in RESTRICTED:
        expected = imagenet_subset(label_set)
        if other := sorted(found.difference(expected)):
            raise ValueError(f"class {other[0]!r} is not one of the {len(expected)} classes of {label_set}")
    elif label_set in (LabelSet.IMAGENET_SKETCH, LabelSet.IMAGENET_V2):
        expected = source.classes
    else:
        return None
    if len(found) == len(expected):
        return None
    return f"{label_set} has {len(expected)} classes, found {len(found)}"


def numbered(classes: Sequence[str]) -> list[str]:
    """The names of ImageNetV2's class folders, in the order of a model's classes."""
    return [str(number) for number in range(len(classes))]


def labels_of_real(path: Path | None, classes: Sequence[str]) -> list[list[int]]:
    """Labels of validation image 1, 2, ... as indices of a model's classes, from a file or the shipped ones.

    Raises ValueError for a label that the model does not have.
    """
    labels = real_labels() if path is None else read_real_labels(path)
    where, names = path or "imagenet-real", imagenet_synsets()
    if set(classes) == set(names):  # in any order
        places = {name: i for i, name in enumerate(classes)}
        order = [places[name] for name in names]
    else:
        order = list(range(len(classes)))
    for number, row in enumerate(labels, 1):
        if row and max(row) >= len(order):
            raise ValueError(f"{where}: image {number} has label {max(row)}, the model {len(order)} classes")
    return [[order[label] for label in row] for row in labels]


def read_real_labels(path: Path) -> list[list[int]]:
    """`real.json` of github.com/google-research/reassessed-imagenet: labels of validation image 1, 2, ..."""
    try:
        labels = json.loads(read_text(path, MAX_JSON))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read ({error})") from None
    good = isinstance(labels, list) and all(
        isinstance(row, list) and all(type(label) is int and label >= 0 for label in row) for row in labels
    )
    if not good:
        raise ValueError(f"{path}: expected a list of lists of class numbers")
    return list(labels)


def real_correct(
    found: Predictions, source: ListedSource, labels: Sequence[Sequence[int]]
) -> npt.NDArray[np.bool_]:
    """Whether each image's prediction is one of its labels; images without labels are skipped.

    Raises ValueError for an image whose name does not end in its number, `ILSVRC2012_val_00000001`.
    """
    correct = []
    for index, predicted in zip(found.indices.tolist(), found.predicted.tolist(), strict=True):
        name = source.names[index]
        match = re.search(r"ILSVRC2012_val_(\d{8})\.\w+$", name)
        number = int(match[1]) if match else 0
        if not 1 <= number <= len(labels):
            raise ValueError(f"{name}: expected a file of ImageNet's validation set, ILSVRC2012_val_NUMBER")
        if labels[number - 1]:
            correct.append(predicted in labels[number - 1])
    if not correct:
        raise ValueError("none of the images has a label in the file of labels")
    return np.array(correct)


def corrupted_folders(root: Path) -> dict[str, list[Path]]:
    """The folders of severities by corruption, for the existing corruptions; the mean needs all 15."""
    found = {name: [root / name / severity for severity in SEVERITIES] for name in ALEXNET_ERRORS}
    found = {name: paths for name, paths in found.items() if paths[0].parent.is_dir()}
    if not found:
        raise ValueError(f"{root}: expected folders named {', '.join(list(ALEXNET_ERRORS)[:3])}, ...")
    missing = [path for paths in found.values() for path in paths if not path.is_dir()]
    if missing:
        raise ValueError(f"{missing[0]}: no such folder; each corruption has the severities 1 to 5")
    return found


def mean_corruption_error(errors: Mapping[str, Sequence[float]]) -> float:
    """mCE (arXiv:1903.12261, section 4.1) of errors by corruption, one for each severity.

    It is computed over the given corruptions; the published measure uses all 15.
    """
    ratios = [sum(row) / (len(row) * ALEXNET_ERRORS[name]) for name, row in errors.items()]
    return sum(ratios) / len(ratios)
