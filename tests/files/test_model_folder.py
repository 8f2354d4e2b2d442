"""Model folders: exact, strict and atomic."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest

from arm_core.files import safetensors
from arm_core.files.errors import BadFileError
from arm_core.files.model_folder import read_model, write_model
from arm_core.files.safetensors import Tensor, read_tensors
from arm_core.model.parameters import initial_parameters
from arm_core.model.spec import ClassifierSpec, EncoderSpec, PretrainSpec

ENCODER = EncoderSpec(width=8, depth=6, patch=4)
SPEC = PretrainSpec(encoder=ENCODER, image_size=(24, 24), cluster=(2, 2), decoder_width=8, decoder_heads=1)


@pytest.fixture
def parameters():
    return initial_parameters(SPEC, 3)


def names(folder: Path) -> list[str]:
    return sorted(item.name for item in folder.iterdir())


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


def test_shards_are_at_most_their_size_and_read_back(tmp_path: Path, parameters):
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


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_half_precision_is_stored_unchanged_and_loads_as_float32(tmp_path: Path, parameters, dtype):
    halves = {name: Tensor.of(value).cast(dtype) for name, value in parameters.items()}
    write_model(tmp_path / "m", SPEC, halves)
    model = read_model(tmp_path / "m")
    assert {t.dtype for t in model.arrays.values()} == {dtype}
    for name, value in model.load().items():
        assert value.dtype == np.float32
        assert np.array_equal(value, halves[name].read())
        assert np.allclose(value, parameters[name], rtol=2**-8, atol=1e-7)


def test_an_existing_folder_needs_force_and_a_foreign_one_is_never_replaced(tmp_path: Path, parameters):
    write_model(tmp_path / "m", SPEC, parameters)
    with pytest.raises(ValueError, match=r"already exists; .* --force"):
        write_model(tmp_path / "m", SPEC, parameters)
    write_model(tmp_path / "m", SPEC, parameters, force=True)
    assert names(tmp_path) == ["m"]
    (tmp_path / "m" / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"holds 'thesis.tex'"):
        write_model(tmp_path / "m", SPEC, parameters, force=True)
    assert (tmp_path / "m" / "thesis.tex").exists()


@pytest.mark.parametrize(
    "files",
    [
        {"README.md": "# My notes"},
        {"config.json": '{"model_type": "vit"}'},
        {"config.json": None, "model.safetensors/data.txt": "years of work"},
        {"README.md": None, "config.json": "link"},
    ],
    ids=str,
)
def test_force_keeps_folders_with_other_files(tmp_path: Path, parameters, files):
    write_model(tmp_path / "elsewhere", SPEC, parameters)
    config = (tmp_path / "elsewhere" / "config.json").read_text()
    for name, text in files.items():
        path = tmp_path / "m" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if text == "link":
            path.symlink_to(tmp_path / "elsewhere" / "config.json")
        else:
            path.write_text(text or config)
    before = sorted(str(path) for path in (tmp_path / "m").rglob("*"))
    with pytest.raises(ValueError, match="--force replaces model folders only"):
        write_model(tmp_path / "m", SPEC, parameters, force=True)
    assert sorted(str(path) for path in (tmp_path / "m").rglob("*")) == before


def test_an_empty_folder_is_filled_without_force(tmp_path: Path, parameters):
    (tmp_path / "m").mkdir()
    write_model(tmp_path / "m", SPEC, parameters)
    assert read_model(tmp_path / "m").spec == SPEC


def test_of_two_writers_of_one_new_folder_the_second_is_refused(tmp_path: Path, parameters):
    def slow() -> np.ndarray:
        write_model(tmp_path / "m", SPEC, parameters)  # the other writer is faster
        return parameters["query_token"] + 1

    tensors = {name: Tensor.of(value) for name, value in parameters.items()}
    tensors["query_token"] = Tensor(tensors["query_token"].shape, "F32", slow)
    with pytest.raises(ValueError, match=r"already exists|created by another process"):
        write_model(tmp_path / "m", SPEC, tensors)
    assert np.array_equal(read_model(tmp_path / "m").load()["query_token"], parameters["query_token"])
    assert names(tmp_path) == ["m"]


def test_an_index_with_links_to_one_shard_is_refused(tmp_path: Path, parameters):
    write_model(tmp_path / "m", SPEC, parameters, shard_size=20_000)
    index = tmp_path / "m" / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    (tmp_path / "m" / "again.safetensors").symlink_to(content["weight_map"]["query_token"])
    content["weight_map"]["another"] = "again.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(BadFileError, match="are links to one file"):
        read_model(tmp_path / "m")


@pytest.mark.parametrize("existing", [False, True])
def test_a_full_disk_leaves_the_existing_files_unchanged(tmp_path: Path, parameters, monkeypatch, existing):
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
