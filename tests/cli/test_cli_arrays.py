"""Array files: .npy read strictly, .npz written atomically."""

from __future__ import annotations

import io
import random
from pathlib import Path

import numpy as np
import pytest

from arm_cli.arrays import read_array
from arm_cli.feature_file import feature_file
from arm_core.files.errors import BadFileError

IMAGES = np.random.default_rng(0).normal(size=(2, 3, 4, 6)).astype(np.float32)


def npy(array: np.ndarray, version: tuple[int, int] | None = None) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, array, version=version)
    return file.getvalue()


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.filterwarnings("ignore:Stored array in format")
def test_files_of_numpy_are_read_in_every_format_version_and_order(tmp_path: Path, version, order):
    (tmp_path / "x.npy").write_bytes(npy(np.asarray(IMAGES, order=order), version))
    found = read_array(str(tmp_path / "x.npy"), (4, 6), 3)
    assert np.array_equal(found, IMAGES.transpose(0, 2, 3, 1))


def header(text: str, data: bytes = b"") -> bytes:
    padded = text.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\1\0" + len(padded).to_bytes(2, "little") + padded + data


GOOD = "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3, 4, 6), }"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (npy(IMAGES)[:-4], "takes 576 bytes, found 572"),
        (npy(IMAGES) + b"1234", "takes 576 bytes, found 580"),
        (npy(IMAGES.astype(np.float64)), r"expected float32 \(images, 3, 4, 6\), found <f8"),
        (npy(IMAGES[:0]), "found <f4"),
        (npy(IMAGES[0]), r"found <f4 \(3, 4, 6\)"),
        (header(GOOD.replace("(2,", "(9999999999999,")), "takes 2,879,999,999,999,712 bytes, found 0"),
        (header(GOOD.replace("2", "(" * 50)), "the header of a .npy file"),
        (header(GOOD.replace("2", "9" * 5000)), "the header of a .npy file"),
        (header(GOOD.replace("False", "__import__('os')")), "the header of a .npy file"),
        (header(GOOD.replace("'<f4'", "[('a', '<f4')]")), "the header of a .npy file"),
        (b"\x93NUMPY\2\0" + (2**32 - 1).to_bytes(4, "little") + b"{", "the header of a .npy file"),
        (b"\x93NUMPY\7\0", "this is not one"),
        (b"\x93NUM", "this is not one"),
        (b"", "this is not one"),
        (b"PK\3\4", "found an .npz archive"),
        (npy(IMAGES * np.float32(np.inf)), "NaN or infinite"),
    ],
    ids=lambda value: "" if isinstance(value, bytes) else value,
)
def test_a_bad_array_is_refused_by_name(tmp_path: Path, content, message):
    (tmp_path / "x.npy").write_bytes(content)
    with pytest.raises(BadFileError, match=f"x.npy: .*{message}"):
        read_array(str(tmp_path / "x.npy"), (4, 6), 3)


def test_mutated_arrays_are_read_or_refused_with_a_typed_error(tmp_path: Path):
    seed = npy(IMAGES[:1])
    draw = random.Random(0)
    read = 0
    for _ in range(3000):
        content = bytearray(seed)
        for _ in range(draw.randint(1, 4)):
            at = draw.randrange(200)
            content[at : at + draw.randrange(2)] = bytes([draw.randrange(256)] * draw.randrange(3))
        (tmp_path / "x.npy").write_bytes(content)
        try:
            read_array(str(tmp_path / "x.npy"), (4, 6), 3)
            read += 1
        except BadFileError:
            pass
    assert 0 < read < 3000


def test_outputs_are_not_written_through_a_planted_link(tmp_path: Path):
    (tmp_path / "victim").write_text("precious")
    for name in ("o.npz", ".o.npz.tmp"):
        (tmp_path / name).symlink_to("victim")
    with feature_file(tmp_path / "o.npz", len(IMAGES), {}) as file:
        file.add({"a": IMAGES})
    assert (tmp_path / "victim").read_text() == "precious"
    with np.load(tmp_path / "o.npz") as found:
        assert np.array_equal(found["a"], IMAGES)


def test_batches_written_to_parquet_are_read_back_with_their_names(tmp_path: Path):
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs pyarrow, part of the dev extra")
    features = np.arange(12, dtype=np.float32).reshape(3, 2, 2)
    with feature_file(tmp_path / "o.parquet", 3, {"images": ["a", "b", "c"]}) as file:
        file.add({"features": features[:2], "loss": np.float32(1)})
        file.add({"features": features[2:], "loss": np.float32(1)})
    table = parquet.read_table(tmp_path / "o.parquet").to_pydict()
    assert table["images"] == ["a", "b", "c"]
    assert np.array_equal(np.array(table["features"]), features.reshape(3, 4))
    assert file.shapes()["features"] == (3, 2, 2)


def test_a_file_of_features_is_absent_after_an_error(tmp_path: Path):
    def fail(name: str) -> None:
        with feature_file(tmp_path / name, 2, {}) as file:
            file.add({"features": IMAGES[:1]})
            raise RuntimeError

    pytest.importorskip("pyarrow", reason="needs pyarrow, part of the dev extra")
    for name in ("o.npz", "o.parquet"):
        with pytest.raises(RuntimeError):
            fail(name)
    assert not list(tmp_path.iterdir())


def test_means_are_weighted_by_the_images_of_their_batches(tmp_path: Path):
    with feature_file(tmp_path / "o.npz", 3, {}) as file:
        file.add({"prediction": IMAGES, "loss": np.float32(3)})
        file.add({"prediction": IMAGES[:1], "loss": np.float32(0)})
    with np.load(tmp_path / "o.npz") as found:
        assert found["loss"] == 2
        assert found["prediction"].shape == (3, 3, 4, 6)


def test_other_formats_of_features_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"expected a name that ends in \.npz or \.parquet"):
        feature_file(tmp_path / "o.csv", 1, {})
