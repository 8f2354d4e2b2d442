"""Images listed in a CSV, TSV or JSON-lines file, with their paths, labels and groups."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from arm_core.data.labels import Labels, by_name
from arm_core.data.sources import UNLABELLED, ListedSource
from arm_core.data.walk import read_file
from arm_core.files.reading import open_regular

PATH_COLUMNS = ("path", "image", "image_path", "file", "file_name", "filename")
LABEL_COLUMNS = ("label", "class", "class_name", "category")
GROUP_COLUMN = "group"
"""Images of one group (a patient, a video) go to the same side of `data.val_fraction`."""


class ImageTable(ListedSource):
    """The images that a file lists, in its order; paths are relative to the file's folder.

    A `.csv` or `.tsv` file starts with a line of column names; a `.jsonl` file holds one object per line. One
    column names the file (`PATH_COLUMNS`), one the class (`LABEL_COLUMNS`); `group` is optional.
    Raises ValueError for other columns, for files that do not exist, and for a class that `classes` lacks.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, labels: bool = True, classes: Sequence[str] | None = None
    ) -> None:
        table = Path(path)
        rows = list(_rows(table))
        if not rows:
            raise ValueError(f"{table}: lists no images")
        path_column = _column(table, rows[0], PATH_COLUMNS)
        names = [_text(table, i, row, path_column) for i, row in enumerate(rows)]
        values: Labels = np.full(len(rows), UNLABELLED, np.int64)
        known: tuple[str, ...] = ()
        if labels:
            column = _column(table, rows[0], LABEL_COLUMNS)
            texts = [_text(table, i, row, column) for i, row in enumerate(rows)]
            values, known = by_name(str(table), texts, classes)
        self._folder = table.parent
        missing = [name for name in names if not (self._folder / name).is_file()]
        if missing:
            raise ValueError(
                f"{table}: {len(missing)} of {len(names)} files do not exist in {self._folder}: "
                f"{', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}"
            )
        grouped = GROUP_COLUMN in rows[0]
        groups = [_text(table, i, row, GROUP_COLUMN) for i, row in enumerate(rows)] if grouped else None
        super().__init__(names, values, known, groups=groups)

    def read(self, index: int) -> bytes:
        return read_file(self._folder / self.names[index])

    def where(self, index: int) -> str:
        return str(self._folder / self.names[index])


def _rows(table: Path) -> Iterable[dict[str, Any]]:
    with open_regular(table) as file, io.TextIOWrapper(file, "utf-8-sig", newline="") as text:
        try:
            if table.suffix.lower() in (".csv", ".tsv"):
                yield from csv.DictReader(text, delimiter="\t" if table.suffix.lower() == ".tsv" else ",")
                return
            for number, line in enumerate(text, 1):
                if line.strip():
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise ValueError(f"{table}, line {number}: expected a JSON object")
                    yield row
        except (csv.Error, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"{table}: cannot be read ({error})") from None


def _column(table: Path, row: dict[str, Any], known: tuple[str, ...]) -> str:
    found = [name for name in known if name in row]
    if len(found) != 1:
        columns = ", ".join(str(name)[:40] for name in list(row)[:10])
        raise ValueError(f"{table}: expected one column of {', '.join(known)}; found the columns {columns}")
    return found[0]


def _text(table: Path, index: int, row: dict[str, Any], column: str) -> str:
    value = row.get(column)
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise ValueError(f"{table}: row {index + 1}: expected text in the column {column!r}, found {value!r}")
    return str(value)
