"""Images in Hugging Face data sets: parquet files, and Arrow files of a local `datasets` folder.

They are read with pyarrow, an optional extra. A parquet file is compressed in groups of rows, and reading an
image reads its whole group. This is fast in order and slow in random order (`arm data pack` converts the
files once). Arrow files are memory-mapped, and random reads are as fast as for other formats.
"""

from __future__ import annotations

import bisect
import json
import threading
import warnings
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from arm_core.data.labels import Labels, by_name, by_number
from arm_core.data.sources import UNLABELLED, ListedSource

IMAGE_COLUMNS = ("image", "img", "images", "jpg", "png", "webp")
LABEL_COLUMNS = ("label", "labels", "fine_label", "cls", "class")
CACHED_BYTES = 2**28
"""Row groups that are kept in memory for the next images."""
SLOW_GROUP_BYTES = 2**22
"""Larger row groups, in bytes on average, make random order slow."""


class _Part(NamedTuple):
    """Consecutive rows that are read together."""

    path: Path
    number: int
    rows: int


class HubImages(ListedSource):
    """The rows of `.parquet` or `.arrow` files, in order.

    The image column holds encoded files, as bytes or as the struct `{bytes, path}` of `datasets`. The label
    column holds numbers (optionally with names in the file's metadata) or names. Raises ValueError for other
    columns, with a list of the existing ones, and if pyarrow is not installed.
    """

    def __init__(
        self, paths: Sequence[Path], *, labels: bool = True, classes: Sequence[str] | None = None
    ) -> None:
        _require_pyarrow(paths[0])
        where = str(paths[0]) if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more"
        self._parts: list[_Part] = []
        self._tables: dict[Path, Any] = {}
        names: list[str] = []
        values: list[Any] = []
        schema: Any = None
        for path in paths:
            schema = self._open(path, schema)
            image, label = _columns(path, schema, labels)
            paths_of_rows, found = self._read_labels(path, image, label)
            names += [f"{path.stem}/{name or i}" for i, name in enumerate(paths_of_rows)]
            values += found
        if not names:
            raise ValueError(f"{where}: holds no images")
        self._image = image
        self._starts = np.cumsum([0, *(part.rows for part in self._parts)]).tolist()
        self._lock, self._cache, self._cached = threading.Lock(), OrderedDict[int, Any](), 0
        self._reading: dict[int, Future[Any]] = {}
        self._warn_of_large_groups(where, paths)
        known: tuple[str, ...] = ()
        numbers: Labels = np.full(len(names), UNLABELLED, np.int64)
        if label is not None:
            numbers, known = _labels(where, values, _class_names(schema, label), classes)
        super().__init__(names, numbers, known)

    def _open(self, path: Path, before: Any) -> Any:
        """Open a file and add its parts; returns its schema, which must match that of earlier files."""
        import pyarrow

        try:
            if path.suffix == ".parquet":
                from pyarrow import parquet

                file = parquet.ParquetFile(path)
                schema = file.schema_arrow
                counts = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
            else:
                stream = pyarrow.memory_map(str(path))
                file = list(pyarrow.ipc.open_stream(stream))
                schema = file[0].schema if file else pyarrow.schema([])
                counts = [batch.num_rows for batch in file]
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"{path}: cannot be read ({_first_line(error)})") from None
        if before is not None and schema.names != before.names:
            raise ValueError(
                f"{path}: has the columns {', '.join(schema.names)}; other files have different columns"
            )
        self._tables[path] = file
        self._parts += [_Part(path, i, rows) for i, rows in enumerate(counts)]
        return schema

    def _read_labels(self, path: Path, image: str, label: str | None) -> tuple[list[Any], list[Any]]:
        """Names of the files and labels of all rows, without the images."""
        import pyarrow

        file = self._tables[path]
        if path.suffix == ".parquet":
            nested = pyarrow.types.is_struct(file.schema_arrow.field(image).type)
            columns = [f"{image}.path"] * nested + [label] * (label is not None)
            try:
                table = file.read(columns=columns) if columns else None
            except (pyarrow.ArrowException, OSError) as error:
                raise ValueError(f"{path}: cannot be read ({_first_line(error)})") from None
            rows = file.metadata.num_rows
            paths = [row["path"] for row in table[image].to_pylist()] if table and nested else [None] * rows
            return paths, table[label].to_pylist() if table and label else [None] * rows
        labels: list[Any] = []
        paths = []
        for batch in file:
            column = batch.column(image)
            nested = pyarrow.types.is_struct(column.type)
            paths += column.field("path").to_pylist() if nested else [None] * batch.num_rows
            labels += batch.column(label).to_pylist() if label else [None] * batch.num_rows
        return paths, labels

    def read(self, index: int) -> bytes:
        part = bisect.bisect_right(self._starts, index) - 1
        value = self._column(part)[index - self._starts[part]].as_py()
        content = value["bytes"] if isinstance(value, dict) else value
        if not isinstance(content, bytes):
            raise ValueError(f"{self.where(index)}: no image bytes; expected the images inside the file")
        return content

    def _column(self, part: int) -> Any:
        """The images of a part, as an Arrow array."""
        path, number, _ = self._parts[part]
        if path.suffix != ".parquet":
            return self._tables[path][number].column(self._image)
        with self._lock:
            if part in self._cache:
                self._cache.move_to_end(part)
                return self._cache[part]
            reading = self._reading.get(part)
            first = reading is None
            if reading is None:
                reading = self._reading[part] = Future()
        if not first:
            return reading.result()
        try:
            column = self._read_group(path, number)
        except BaseException as error:
            reading.set_exception(error)
            with self._lock:
                del self._reading[part]
            raise
        reading.set_result(column)
        with self._lock:
            del self._reading[part]
            self._cache[part] = column
            self._cached += column.nbytes
            while self._cached > CACHED_BYTES and len(self._cache) > 1:
                self._cached -= self._cache.popitem(last=False)[1].nbytes
        return column

    def _read_group(self, path: Path, number: int) -> Any:
        """The images of a group of rows; opens the file again, so that threads read at the same time."""
        from pyarrow import parquet

        with parquet.ParquetFile(path, metadata=self._tables[path].metadata) as file:
            return file.read_row_group(number, columns=[self._image])[0].combine_chunks()

    def where(self, index: int) -> str:
        part = bisect.bisect_right(self._starts, index) - 1
        return f"{self._parts[part].path}:{self.names[index].partition('/')[2]}"

    def _warn_of_large_groups(self, where: str, paths: Sequence[Path]) -> None:
        size = sum(path.stat().st_size for path in paths) / max(1, len(self._parts))
        if paths[0].suffix == ".parquet" and len(self._parts) > 1 and size > SLOW_GROUP_BYTES:
            warnings.warn(
                f"{where}: in random order, {size / 2**20:.0f} MiB are read for each image; "
                "convert it once with `arm data pack`",
                stacklevel=4,
            )


def _require_pyarrow(path: Path) -> None:
    try:
        import pyarrow  # noqa: F401
    except ImportError:
        raise ValueError(
            f"{path}: reading it needs pyarrow; install it with: pip install 'arm-vision[parquet]'"
        ) from None


def _columns(path: Path, schema: Any, labels: bool) -> tuple[str, str | None]:
    columns = ", ".join(schema.names)
    image = next((name for name in IMAGE_COLUMNS if name in schema.names), None)
    if image is None:
        raise ValueError(f"{path}: expected an image column ({', '.join(IMAGE_COLUMNS)}), found {columns}")
    label = next((name for name in LABEL_COLUMNS if name in schema.names), None)
    if labels and label is None:
        raise ValueError(f"{path}: expected a label column ({', '.join(LABEL_COLUMNS)}), found {columns}")
    return image, label if labels else None


def _class_names(schema: Any, label: str) -> list[str] | None:
    """Names that `datasets` stored for a column of numbers."""
    try:
        stored = json.loads((schema.metadata or {})[b"huggingface"])
        names = stored["info"]["features"][label]["names"]
    except (KeyError, TypeError, ValueError):
        return None
    good = isinstance(names, list) and all(isinstance(name, str) for name in names)
    return names if good and names else None


def _labels(
    where: str, values: list[Any], own: list[str] | None, expected: Sequence[str] | None
) -> tuple[Labels, tuple[str, ...]]:
    if all(type(value) is int for value in values):
        return by_number(where, np.array(values, np.int64), own, expected)
    if all(type(value) is str for value in values):
        return by_name(where, values, expected)
    bad = next(value for value in values if type(value) is not type(values[0]) or value is None)
    raise ValueError(f"{where}: labels must be all numbers or all names, found {bad!r}")


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__
