"""Model folders: exact, strict, atomic; and the safetensors reader beneath them."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest

from arm_core.files import bfloat16, safetensors
from arm_core.files.model_folder import read_model, write_model
from arm_core.files.safetensors import BadFileError, Tensor, read_tensors, write_tensors
from arm_core.model.parameters import initial_parameters
from arm_core.model.spec import ClassifierSpec, EncoderSpec, PretrainSpec

ENCODER = EncoderSpec(width=8, depth=6, patch=4)
SPEC = PretrainSpec(encoder=ENCODER, image_size=(24, 24), cluster=(2, 2), decoder_width=8, decoder_heads=1)


@pytest.fixture
def parameters():
    return initial_parameters(SPEC, 3)


def names(folder: Path) -> list[str]:
    return sorted(item.name for item in folder.iterdir())


def safetensors_bytes(header: dict | str, data: bytes = b"") -> bytes:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    return len(text).to_bytes(8, "little") + text + data


def test_a_model_reads_back_bit_by_bit_with_its_metadata(tmp_path: Path, parameters):
    write_model(tmp_path / "m", SPEC, parameters, metadata={"recipe": "x"}, card="# Card\n")
    model = read_model(tmp_path / "m")
    assert model.spec == SPEC
    assert model.metadata == {"recipe": "x"}
    loaded = model.load()
    assert list(loaded) == list(parameters)
    assert all(np.array_equal(loaded[name], parameters[name]) for name in parameters)
    assert (tmp_path / "m" / "README.md").read_text() == "# Card\n"
    assert names(tmp_path) == ["m"]


def test_equal_models_give_equal_bytes(tmp_path: Path, parameters):
    write_model(tmp_path / "a", SPEC, parameters)
    write_model(tmp_path / "b", SPEC, read_model(tmp_path / "a").arrays)
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_shards_hold_no_more_than_their_size_and_read_back(tmp_path: Path, parameters):
    size = 20_000
    write_model(tmp_path / "m", SPEC, parameters, shard_size=size, metadata={"k": "v"})
    shards = sorted((tmp_path / "m").glob("model-*.safetensors"))
    assert len(shards) > 2
    for shard in shards:
        held = [t.nbytes for t in read_tensors(shard).tensors.values()]
        assert sum(held) <= size or len(held) == 1
    model = read_model(tmp_path / "m")
    assert model.metadata == {"k": "v"}
    assert all(np.array_equal(value, parameters[name]) for name, value in model.load().items())


def test_the_safetensors_library_reads_what_we_write_and_the_reverse(tmp_path: Path, parameters):
    library = pytest.importorskip("safetensors.numpy")
    write_tensors(tmp_path / "ours", parameters, {"a": "b"})
    theirs = library.load_file(tmp_path / "ours")
    assert all(np.array_equal(theirs[name], parameters[name]) for name in parameters)
    library.save_file(parameters, tmp_path / "theirs", metadata={"a": "b"})
    file = read_tensors(tmp_path / "theirs")
    assert file.metadata == {"a": "b"}
    assert all(np.array_equal(file.tensors[name].read(), parameters[name]) for name in parameters)


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


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_half_precision_is_stored_as_it_is_and_loads_as_float32(tmp_path: Path, parameters, dtype):
    halves = {name: Tensor.of(value).cast(dtype) for name, value in parameters.items()}
    write_model(tmp_path / "m", SPEC, halves)
    model = read_model(tmp_path / "m")
    assert {t.dtype for t in model.arrays.values()} == {dtype}
    for name, value in model.load().items():
        assert value.dtype == np.float32
        assert np.array_equal(value, halves[name].read())
        assert np.allclose(value, parameters[name], rtol=2**-8, atol=1e-7)


def test_a_value_too_large_for_float16_is_refused_not_made_infinite():
    with pytest.raises(ValueError, match=r"7e\+04 is too large for F16"):
        safetensors.encode(np.array([1.0, 7e4], np.float32), "F16")


def test_an_existing_folder_needs_force_and_a_foreign_one_is_never_replaced(tmp_path: Path, parameters):
    write_model(tmp_path / "m", SPEC, parameters)
    with pytest.raises(ValueError, match=r"exists already; .* --force"):
        write_model(tmp_path / "m", SPEC, parameters)
    write_model(tmp_path / "m", SPEC, parameters, force=True)
    assert names(tmp_path) == ["m"]
    (tmp_path / "m" / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"holds 'thesis.tex'"):
        write_model(tmp_path / "m", SPEC, parameters, force=True)
    assert (tmp_path / "m" / "thesis.tex").exists()


@pytest.mark.parametrize("existing", [False, True])
def test_a_full_disk_leaves_what_was_there_and_nothing_else(
    tmp_path: Path, parameters, monkeypatch, existing
):
    if existing:
        write_model(tmp_path / "m", SPEC, parameters)
        before = (tmp_path / "m" / "model.safetensors").read_bytes()
    written = 0
    real = os.write

    def full(descriptor: int, data: memoryview) -> int:
        nonlocal written
        written += len(data)
        if written > 30_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, data)

    monkeypatch.setattr(safetensors.os, "write", full)
    with pytest.raises(OSError, match="No space left"):
        write_model(tmp_path / "m", SPEC, {k: v * 2 for k, v in parameters.items()}, force=True)
    assert names(tmp_path) == (["m"] if existing else [])
    if existing:
        assert (tmp_path / "m" / "model.safetensors").read_bytes() == before


def test_names_and_shapes_are_checked_before_anything_is_written(tmp_path: Path, parameters):
    wrong = dict(parameters)
    wrong["surplus"] = wrong.pop("query_token")
    with pytest.raises(ValueError, match=r"missing query_token.*unexpected surplus"):
        write_model(tmp_path / "m", SPEC, wrong)
    assert names(tmp_path) == []


def test_a_folder_of_another_spec_is_refused_by_name_and_shape(tmp_path: Path, parameters):
    write_model(tmp_path / "m", SPEC, parameters)
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    config["decoder_width"] = 16
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"taps_to_decoder.weight: expected \(64, 32\), found \(32, 32\)"):
        read_model(tmp_path / "m")


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
BAD_FILES = {
    "shorter than its length field": (b"\x01\x02", "truncated"),
    "claims terabytes": ((2**42).to_bytes(8, "little") + b"{}", "claims 4398046511104 bytes"),
    "header is no json": (safetensors_bytes("{'a"), "not valid JSON"),
    "header is a list": (safetensors_bytes("[]"), "expected a JSON object"),
    "deep nesting": (safetensors_bytes("[" * 100_000), "not valid JSON"),
    "name twice": (
        safetensors_bytes('{"a":%s,"a":%s}' % ((json.dumps(ENTRY),) * 2), bytes(8)),
        "'a' stands twice",
    ),
    "unknown type": (safetensors_bytes({"a": {**ENTRY, "dtype": "F13"}}, bytes(8)), "a: unknown type 'F13'"),
    "negative size": (safetensors_bytes({"a": {**ENTRY, "shape": [-2]}}, bytes(8)), "shape must be whole"),
    "size beyond 64 bits": (safetensors_bytes({"a": {**ENTRY, "shape": [2**64]}}), "shape must be whole"),
    "product beyond the file": (
        safetensors_bytes({"a": {**ENTRY, "shape": [2**40, 2**40]}}, bytes(8)),
        "takes 4835703278458516698824704 bytes, data_offsets hold 8",
    ),
    "offsets out of bounds": (safetensors_bytes({"a": ENTRY}, bytes(4)), "take 8 bytes, the file holds 4"),
    "overlap": (safetensors_bytes({"a": ENTRY, "b": ENTRY}, bytes(16)), "it overlaps another tensor"),
    "gap": (safetensors_bytes({"a": {**ENTRY, "data_offsets": [8, 16]}}, bytes(16)), "it leaves a gap"),
    "trailing bytes": (safetensors_bytes({"a": ENTRY}, bytes(12)), "take 8 bytes, the file holds 12"),
    "boolean as a size": (safetensors_bytes({"a": {**ENTRY, "shape": [True, 2]}}, bytes(8)), "must be whole"),
    "metadata of numbers": (safetensors_bytes({"__metadata__": {"a": 1}}), "__metadata__ must map"),
}


@pytest.mark.parametrize(("content", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_a_damaged_or_hostile_safetensors_file_is_refused_by_name(tmp_path: Path, content, message):
    (tmp_path / "bad.safetensors").write_bytes(content)
    with pytest.raises(BadFileError, match=f"bad.safetensors.*{message}"):
        read_tensors(tmp_path / "bad.safetensors")


@pytest.mark.parametrize(
    "place", ["../m/model-00001-of-00002.safetensors", "/etc/passwd", 3, "x/y.safetensors"]
)
def test_an_index_cannot_point_out_of_its_folder(tmp_path: Path, parameters, place):
    write_model(tmp_path / "m", SPEC, parameters, shard_size=20_000)
    index = tmp_path / "m" / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["query_token"] = place
    index.write_text(json.dumps(content))
    with pytest.raises(BadFileError, match=r"query_token: expected the name of a \.safetensors file"):
        read_model(tmp_path / "m")


def test_an_index_that_hides_a_tensor_of_a_shard_is_refused(tmp_path: Path, parameters):
    write_model(tmp_path / "m", SPEC, parameters, shard_size=20_000)
    index = tmp_path / "m" / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    del content["weight_map"]["query_token"]
    index.write_text(json.dumps(content))
    with pytest.raises(BadFileError, match="query_token is not listed"):
        read_model(tmp_path / "m")


def test_a_classifier_folder_keeps_its_spec(tmp_path: Path):
    spec = ClassifierSpec(encoder=ENCODER, classes=3, image_size=(8, 12))
    write_model(tmp_path / "m", spec, initial_parameters(spec, 0))
    assert read_model(tmp_path / "m").spec == spec
