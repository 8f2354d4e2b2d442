"""safetensors files: compatible with the library in both directions, and exact in bfloat16."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import safetensors as library
import safetensors.numpy as library_numpy

from arm_core.files import bfloat16, safetensors
from arm_core.files.errors import BadFileError
from arm_core.files.safetensors import DTYPES, read_tensors, write_tensors


def safetensors_bytes(header: dict | str, data: bytes = b"") -> bytes:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    return len(text).to_bytes(8, "little") + text + data


def arrays_of_every_type() -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)
    made = {"scalar": np.array(2.5, np.float32), "empty": np.zeros((0, 3), np.float32)}
    for name, dtype in DTYPES.items():
        if name != "BF16":
            made[name] = (draw.normal(size=(3, 5)) * 9).astype(dtype)
    return made


def test_the_library_reads_our_files(tmp_path: Path):
    arrays = arrays_of_every_type()
    write_tensors(tmp_path / "ours", arrays, {"a": "b", "c": "\u00e4"})
    theirs = library_numpy.load_file(tmp_path / "ours")
    assert set(theirs) == set(arrays)
    for name, value in arrays.items():
        assert theirs[name].dtype == value.dtype
        assert np.array_equal(theirs[name], value)
    with library.safe_open(tmp_path / "ours", "np") as file:
        assert file.metadata() == {"a": "b", "c": "\u00e4"}


def test_we_read_the_files_of_the_library(tmp_path: Path):
    arrays = arrays_of_every_type()
    library_numpy.save_file(arrays, tmp_path / "theirs", metadata={"a": "b"})
    file = read_tensors(tmp_path / "theirs")
    assert file.metadata == {"a": "b"}
    assert set(file.tensors) == set(arrays)
    for name, value in arrays.items():
        found = file.tensors[name].bits()
        assert found.dtype == value.dtype
        assert np.array_equal(found, value)


def test_bfloat16_is_exchanged_with_torch_through_the_library(tmp_path: Path):
    torch = pytest.importorskip("torch")
    library_torch = pytest.importorskip("safetensors.torch")
    values = torch.randn(4, 3).bfloat16()
    library_torch.save_file({"a": values}, tmp_path / "theirs")
    assert np.array_equal(read_tensors(tmp_path / "theirs").tensors["a"].read(), values.float().numpy())
    write_tensors(tmp_path / "ours", read_tensors(tmp_path / "theirs").tensors)
    assert torch.equal(library_torch.load_file(tmp_path / "ours")["a"], values)


def test_equal_tensors_are_laid_out_like_in_the_library_up_to_their_order(tmp_path: Path):
    arrays = {"b": np.ones(3, np.float32), "a": np.ones(2, np.float16)}
    write_tensors(tmp_path / "ours", arrays)
    library_numpy.save_file(arrays, tmp_path / "theirs")
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_a_new_file_is_not_written_through_a_link(tmp_path: Path):
    (tmp_path / "precious").write_text("years of work")
    (tmp_path / "out").symlink_to("precious")
    write_tensors(tmp_path / "out", {"a": np.ones(2, np.float32)})
    assert (tmp_path / "precious").read_text() == "years of work"
    assert not (tmp_path / "out").is_symlink()


def test_metadata_that_is_not_unicode_is_refused_by_name(tmp_path: Path):
    with pytest.raises(ValueError, match=r"x: metadata is not valid Unicode: .*caf\\udce9"):
        write_tensors(tmp_path / "x", {"a": np.ones(2, np.float32)}, {"classes": "caf\udce9"})


def test_a_file_that_shrinks_after_it_was_opened_is_refused(tmp_path: Path):
    write_tensors(tmp_path / "x", {"a": np.ones(1000, np.float32)})
    tensor = read_tensors(tmp_path / "x").tensors["a"]
    os.truncate(tmp_path / "x", 500)
    with pytest.raises(BadFileError, match="a: the file ends early"):
        tensor.read()


def test_every_bfloat16_decodes_to_the_float32_that_encodes_back():
    bits = np.arange(2**16, dtype=np.uint16)
    values = bfloat16.decode(bits)
    assert values[0x3F80] == 1.0
    assert values[0xC0A0] == -5.0
    assert np.array_equal(bfloat16.encode(values), bits)


def test_bfloat16_rounds_to_nearest_and_ties_to_even():
    def f(bits: int) -> float:
        return float(np.uint32(bits).view(np.float32))

    values = np.array([f(0x3F808000), f(0x3F818000), f(0x3F808001), f(0x3F807FFF), f(0x7F7FFFFF)], np.float32)
    assert [hex(b) for b in bfloat16.encode(values)] == ["0x3f80", "0x3f82", "0x3f81", "0x3f80", "0x7f80"]
    nan = np.array([0x7F800001], np.uint32).view(np.float32)
    assert np.isnan(bfloat16.decode(bfloat16.encode(nan))).all()


def test_a_value_too_large_for_float16_is_refused_and_not_made_infinite():
    with pytest.raises(ValueError, match=r"7e\+04 is too large for F16"):
        safetensors.encode(np.array([1.0, 7e4], np.float32), "F16")


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
BAD_FILES = {
    "shorter than its length field": (b"\x01\x02", "not a safetensors file"),
    "claims terabytes": (
        (2**42).to_bytes(8, "little") + b"{}",
        "truncated: the header takes 4398046511104 bytes",
    ),
    "header is no json": (safetensors_bytes("{'a"), "key must be a string"),
    "header is a list": (safetensors_bytes("[]"), "not a safetensors file"),
    "deep nesting": (safetensors_bytes('{"a":' * 100_000), "invalid JSON"),
    "name twice": (
        safetensors_bytes('{"a":%s,"a":%s}' % ((json.dumps(ENTRY),) * 2), bytes(8)),
        "'a' appears twice",
    ),
    "unknown type": (safetensors_bytes({"a": {**ENTRY, "dtype": "F13"}}, bytes(8)), "unknown variant `F13`"),
    "negative size": (safetensors_bytes({"a": {**ENTRY, "shape": [-2]}}, bytes(8)), "usize"),
    "size beyond 64 bits": (safetensors_bytes({"a": {**ENTRY, "shape": [2**64]}}), "usize"),
    "product beyond the file": (
        safetensors_bytes({"a": {**ENTRY, "shape": [2**40, 2**40]}}, bytes(8)),
        "overflow computing buffer size",
    ),
    "offsets out of bounds": (
        safetensors_bytes({"a": ENTRY}, bytes(4)),
        "truncated: the tensors take 8 bytes, the file has 4",
    ),
    "overlap": (safetensors_bytes({"a": ENTRY, "b": ENTRY}, bytes(16)), "invalid offset"),
    "gap": (safetensors_bytes({"a": {**ENTRY, "data_offsets": [8, 16]}}, bytes(16)), "invalid offset"),
    "trailing bytes": (safetensors_bytes({"a": ENTRY}, bytes(12)), "not fully covered"),
    "boolean as a size": (
        safetensors_bytes({"a": {**ENTRY, "shape": [True, 2]}}, bytes(8)),
        "expected usize",
    ),
    "metadata of numbers": (safetensors_bytes({"__metadata__": {"a": 1}}), "expected a string"),
    "metadata twice": (safetensors_bytes('{"__metadata__":{"a":"1","a":"2"}}'), "'a' appears twice"),
    "type that NumPy lacks": (
        safetensors_bytes({"a": {"dtype": "F8_E4M3", "shape": [8], "data_offsets": [0, 8]}}, bytes(8)),
        "a: type F8_E4M3 is not supported",
    ),
    "too many axes": (
        safetensors_bytes({"a": {**ENTRY, "shape": [1] * 40 + [2]}}, bytes(8)),
        "at most 32 axes",
    ),
    "name with an escape sequence": (safetensors_bytes({"\x1b[2J": ENTRY}, bytes(8)), "printable name"),
}


def test_a_header_over_16_mib_is_refused_before_it_is_read(tmp_path: Path):
    with (tmp_path / "x").open("wb") as file:
        file.write((2**25).to_bytes(8, "little") + b'{"a":1')
        file.truncate(2**25 + 8)
    with pytest.raises(BadFileError, match="the header takes 33554432 bytes; at most 16777216"):
        read_tensors(tmp_path / "x")


@pytest.mark.parametrize(("content", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_a_corrupt_or_hostile_safetensors_file_is_refused_by_name(tmp_path: Path, content, message):
    (tmp_path / "bad.safetensors").write_bytes(content)
    with pytest.raises(BadFileError, match=f"bad.safetensors.*{message}"):
        read_tensors(tmp_path / "bad.safetensors")
