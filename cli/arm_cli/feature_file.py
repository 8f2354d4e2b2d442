"""Outputs of a model, written batch by batch to .npz or Parquet: memory holds one batch."""

from __future__ import annotations

import shutil
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

MEANS = ("loss", "loss_per_token")
"""Outputs that are means over the images; all others have a row for each image."""


class FeatureFile(Protocol):
    """A file that is being written; it gets its name if the `with` block ends without an error."""

    def add(self, outputs: Mapping[str, Array]) -> None:
        """Append the outputs of the next batch."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the written arrays, by name."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def feature_file(path: Path, total: int, columns: Mapping[str, Sequence[str]]) -> FeatureFile:
    """A file for the outputs of `total` images, in the format of its suffix: `.npz` or `.parquet`.

    columns: strings known beforehand, by name, one for each image.
    Raises ValueError for another suffix, a missing folder, and Parquet without pyarrow.
    """
    if not path.absolute().parent.is_dir():
        raise ValueError(f"{path}: the folder {path.parent} does not exist")
    if path.suffix == ".npz":
        return NpzFile(path, total, columns)
    if path.suffix == ".parquet":
        return ParquetFile(path, total, columns)
    raise ValueError(f"{path}: expected a name that ends in .npz or .parquet")


class NpzFile:
    """Writes each output to a memory-mapped .npy file; at the end they become one archive."""

    def __init__(self, path: Path, total: int, columns: Mapping[str, Sequence[str]]) -> None:
        self._path, self._total, self._columns, self._done = path, total, columns, 0
        self._folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.absolute().parent))
        self._rows: dict[str, Array] = {}
        self._means: dict[str, Array] = {}

    def add(self, outputs: Mapping[str, Array]) -> None:
        count = next(len(value) for name, value in outputs.items() if name not in MEANS)
        for name, value in outputs.items():
            if name in MEANS:
                share = np.asarray(value, np.float64) * (count / self._total)
                self._means[name] = self._means.get(name, np.zeros(share.shape)) + share
                continue
            if name not in self._rows:
                shape = (self._total, *value.shape[1:])
                self._rows[name] = np.lib.format.open_memmap(
                    self._folder / f"{name}.npy", mode="w+", dtype=value.dtype, shape=shape
                )
            self._rows[name][self._done : self._done + count] = value
        self._done += count

    def shapes(self) -> dict[str, tuple[int, ...]]:
        found = {name: value.shape for name, value in {**self._rows, **self._means}.items()}
        return {**found, **{name: (len(values),) for name, values in self._columns.items()}}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._rows.clear()
            shutil.rmtree(self._folder, ignore_errors=True)

    def _finish(self) -> None:
        from arm_core.files.atomic import create_file, new_file

        assert self._done == self._total, "all images are already written"
        small: dict[str, Array] = {name: value.astype(np.float32) for name, value in self._means.items()}
        small |= {name: np.array(values) for name, values in self._columns.items()}
        for name, values in small.items():
            np.save(self._folder / f"{name}.npy", values, allow_pickle=False)
        for rows in self._rows.values():
            rows.flush()  # type: ignore[attr-defined]
        with (
            new_file(self._path, force=True) as draft,
            create_file(draft) as file,
            zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive,
        ):
            for name in [*self._rows, *small]:
                archive.write(self._folder / f"{name}.npy", f"{name}.npy")


class ParquetFile:
    """Writes a row group for each batch; outputs with more than one axis per image are flattened."""

    def __init__(self, path: Path, total: int, columns: Mapping[str, Sequence[str]]) -> None:
        try:
            import pyarrow.parquet
        except ImportError:
            raise ValueError(f"{path}: Parquet needs pyarrow; pip install 'arm-vision[parquet]'") from None
        self._library = pyarrow
        self._path, self._total, self._columns, self._done = path, total, columns, 0
        self._draft = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.absolute().parent))
        self._writer: Any = None
        self._shapes: dict[str, tuple[int, ...]] = {}

    def add(self, outputs: Mapping[str, Array]) -> None:
        pa = self._library
        rows = {name: value for name, value in outputs.items() if name not in MEANS}
        count = len(next(iter(rows.values())))
        part = slice(self._done, self._done + count)
        arrays = {name: pa.array(list(values[part]), pa.string()) for name, values in self._columns.items()}
        for name, value in rows.items():
            flat = np.ascontiguousarray(value, np.float32).reshape(count, -1)
            arrays[name] = pa.FixedSizeListArray.from_arrays(pa.array(flat.ravel()), flat.shape[1])
            self._shapes[name] = (self._total, *value.shape[1:])
        table = pa.table(arrays)
        if self._writer is None:
            self._writer = pa.parquet.ParquetWriter(self._draft / "rows.parquet", table.schema)
        self._writer.write_table(table)
        self._done += count

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {**{name: (len(values),) for name, values in self._columns.items()}, **self._shapes}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._writer is not None:
            self._writer.close()
        try:
            if kind is None and self._writer is not None:
                (self._draft / "rows.parquet").replace(self._path)
        finally:
            shutil.rmtree(self._draft, ignore_errors=True)
