"""From the labels in files (numbers or names) to indices into one order of classes."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from arm_core.data.sources import UNLABELLED

Labels = npt.NDArray[np.int64]

MAX_CLASSES = 10**6
"""Larger labels are mistakes; the table of names would be too long."""


def by_name(
    where: str, names: Sequence[str], expected: Sequence[str] | None
) -> tuple[Labels, tuple[str, ...]]:
    """Labels given as names. Without `expected`, classes are the sorted names (numbers by value).

    Raises ValueError for a name that `expected` lacks.
    """
    found = set(names)
    if expected is None:
        numbers = all(name.isascii() and name.isdigit() for name in found)
        classes = tuple(sorted(found, key=(lambda name: (int(name), name)) if numbers else None))
        warn_of_case(where, classes)
    else:
        classes = tuple(expected)
    table = {name: i for i, name in enumerate(classes)}
    if unknown := sorted(found - set(table)):
        raise ValueError(f"{where}: class {unknown[0]!r} {not_among(classes)}")
    return np.array([table[name] for name in names], np.int64), classes


def by_number(
    where: str, labels: Labels, own: Sequence[str] | None, expected: Sequence[str] | None
) -> tuple[Labels, tuple[str, ...]]:
    """Labels given as indices, into `own` names if the data has names.

    With `expected`, named classes are looked up there, and unnamed ones are indices into it.
    Raises ValueError for a label without a class.
    """
    names = own or expected
    if not len(labels):
        return labels, tuple(names or ())
    low, high = int(labels.min()), int(labels.max())
    count = len(names) if names else MAX_CLASSES
    if low < 0 or high >= count:
        bad = int(np.flatnonzero((labels < 0) | (labels >= count))[0])
        raise ValueError(
            f"{where}: image {bad} has label {labels[bad]}, expected 0 to {count - 1}"
            + ("; -1 marks images without a class" if low == UNLABELLED else "")
        )
    if own is None or expected is None or tuple(own) == tuple(expected):
        return labels, tuple(names or (str(i) for i in range(high + 1)))
    found, classes = by_name(where, list(own), expected)
    return found[labels], classes


def not_among(classes: Sequence[str]) -> str:
    """The end of a sentence about a class that the model or the training data does not have."""
    return (
        f"is none of the {len(classes)} known classes "
        f"({', '.join(list(classes)[:5])}{', ...' if len(classes) > 5 else ''})"
    )


def warn_of_case(where: str, classes: Sequence[str]) -> None:
    """Warn of two classes that only differ by case: on some disks they are one folder."""
    seen: dict[str, str] = {}
    for name in classes:
        if (other := seen.setdefault(name.casefold(), name)) != name:
            warnings.warn(f"{where}: the classes {other!r} and {name!r} differ by case only", stacklevel=3)
