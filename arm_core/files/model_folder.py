"""A model on disk: a folder with `config.json` and `model.safetensors`, read by every backend.

`config.json` is `spec.to_json`; the tensors carry the names and shapes of the parameter table. Large
models may be cut into shards with an index, as on the Hugging Face hub:

    config.json  model.safetensors
    config.json  model.safetensors.index.json  model-00001-of-00003.safetensors  ...

Folders appear whole or not at all: they are written beside their place and renamed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt

from arm_core.files import quantized
from arm_core.files.atomic import new_folder, write_text
from arm_core.files.quantized import QuantizedTensor
from arm_core.files.safetensors import (
    AnyArray,
    BadFileError,
    Tensor,
    as_tensors,
    parse_json,
    read_tensors,
    write_tensors,
)
from arm_core.model.parameters import check_parameters, parameter_table
from arm_core.model.spec import ModelSpec, from_json, to_json

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD = "model-{number:05d}-of-{total:05d}.safetensors"
CARD = "README.md"
QUANTIZATION = "quantization"
"""Metadata of quantized weights: `affine, 4 bits`."""

MAX_DEPTH, MAX_SIZE = 1024, 2**20
"""Bounds on what is read from a file; far beyond any model that could be trained."""

_MAX_JSON = 16 * 2**20
_OURS = re.compile(rf"{re.escape(CONFIG)}|{CARD}|model(-\d{{5}}-of-\d{{5}})?\.safetensors(\.index\.json)?")
"""File names that a model folder may hold, and that `force` may therefore replace."""


@dataclass(frozen=True)
class Model:
    """A model on disk; its tensors are read on demand."""

    spec: ModelSpec
    arrays: dict[str, Tensor]
    """By name, in the order of the parameter table, checked against it."""
    metadata: dict[str, str]
    path: Path

    def load(self) -> dict[str, npt.NDArray[np.float32]]:
        """All parameters as float32 arrays, those of a quantized model as `Quantized` matrices."""
        return {name: _loaded(tensor) for name, tensor in self.arrays.items()}


def _loaded(tensor: Tensor) -> npt.NDArray[np.float32]:
    if isinstance(tensor, QuantizedTensor):
        # It stands in for the array: `np.asarray` gives its values, an engine may take its parts.
        return cast(npt.NDArray[np.float32], tensor.parts())
    return np.asarray(tensor.read(), np.float32)


def read_model(path: Path | str) -> Model:
    """Open a model folder; names and shapes are checked strictly, bytes are read later."""
    folder = Path(path)
    if not folder.exists():
        raise ValueError(f"{folder}: no such folder")
    if not (folder / CONFIG).is_file():
        raise ValueError(f"{folder}: expected a model folder with {CONFIG} and {WEIGHTS}, found no {CONFIG}")
    spec = read_config(folder)
    arrays, metadata = read_weights(folder)
    return checked_model(spec, arrays, metadata, folder)


def checked_model(
    spec: ModelSpec, arrays: Mapping[str, Tensor], metadata: Mapping[str, str], path: Path
) -> Model:
    """A `Model` from a spec and tensors found at `path`, after comparing them with the parameter table."""
    check_parameters(spec, arrays, source=str(path))  # type: ignore[arg-type]  # reads shapes alone
    for name, tensor in arrays.items():
        if tensor.dtype not in ("F32", "F16", "BF16"):
            raise BadFileError(f"{path}: {name}: expected F32, F16 or BF16, found {tensor.dtype}")
    return Model(spec, {name: arrays[name] for name in parameter_table(spec)}, dict(metadata), path)


def read_config(folder: Path) -> ModelSpec:
    """The spec in a folder's `config.json`."""
    path = folder / CONFIG
    if path.stat().st_size > _MAX_JSON:
        raise BadFileError(f"{path}: larger than {_MAX_JSON} bytes")
    return parse_config(path, path.read_bytes())


def parse_config(path: Path, text: bytes) -> ModelSpec:
    """The spec in the JSON of a `config.json`; path: what errors call it."""
    data = parse_json(path, text)
    try:
        spec = from_json(data)
    except (ValueError, TypeError, ArithmeticError) as error:  # whatever a foreign file holds
        raise BadFileError(f"{path}: {error}") from None
    depths = [spec.encoder.depth, getattr(spec, "decoder_depth", 1)]
    sizes = [spec.encoder.width, spec.encoder.state, spec.encoder.conv_width, *spec.image_size]
    if max(depths) > MAX_DEPTH or max(sizes) > MAX_SIZE:
        # The parameter table has a row for each block: a hostile depth would fill the memory.
        raise BadFileError(f"{path}: expected at most {MAX_DEPTH} blocks and sizes up to {MAX_SIZE}")
    return spec


def read_weights(folder: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a folder, from one file or from the shards that its index names."""
    if not (folder / INDEX).exists():
        file = read_tensors(folder / WEIGHTS)
        return _unquantized(folder, file.tensors, file.metadata)
    index = folder / INDEX
    if (folder / WEIGHTS).exists():
        raise BadFileError(f"{folder}: holds both {WEIGHTS} and {INDEX}; remove the one that is out of date")
    if index.stat().st_size > _MAX_JSON:
        raise BadFileError(f"{index}: larger than {_MAX_JSON} bytes")
    content = parse_json(index, index.read_bytes())
    places = content.get("weight_map")
    if not isinstance(places, dict) or not places:
        raise BadFileError(f"{index}: expected weight_map to name the file of each tensor")
    for name, file_name in places.items():
        # A shard stands beside its index: a path would let an index open any file.
        if not isinstance(file_name, str) or not re.fullmatch(r"[\w.-]{1,200}\.safetensors", file_name):
            raise BadFileError(
                f"{index}: {name}: expected the name of a .safetensors file, found {str(file_name)[:80]!r}"
            )
    shards = {file_name: read_tensors(folder / file_name) for file_name in dict.fromkeys(places.values())}
    arrays: dict[str, Tensor] = {}
    for name, file_name in places.items():
        if name not in shards[file_name].tensors:
            raise BadFileError(f"{index}: {name} is not in {file_name}")
        arrays[name] = shards[file_name].tensors[name]
    for file_name, shard in shards.items():
        if extra := [name for name in shard.tensors if places.get(name) != file_name]:
            raise BadFileError(f"{folder / file_name}: {extra[0]} is not listed for this file in {INDEX}")
    return _unquantized(folder, arrays, next(iter(shards.values())).metadata)


def _unquantized(
    folder: Path, stored: dict[str, Tensor], metadata: dict[str, str]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Stored tensors as those of the parameter table, where the metadata says that some are quantized."""
    if QUANTIZATION not in metadata:
        return stored, metadata
    bits = next((bits for bits in quantized.BITS if metadata[QUANTIZATION] == f"affine, {bits} bits"), None)
    if bits is None:
        raise BadFileError(f"{folder}: unknown quantization {metadata[QUANTIZATION][:60]!r}")
    rest = {key: value for key, value in metadata.items() if key != QUANTIZATION}
    return quantized.join(stored, bits, str(folder)), rest


def write_model(
    folder: Path | str,
    spec: ModelSpec,
    arrays: Mapping[str, Tensor | AnyArray],
    *,
    metadata: Mapping[str, str] | None = None,
    force: bool = False,
    shard_size: int | None = None,
    card: str | None = None,
) -> Path:
    """Write a model folder, whole or not at all, one tensor at a time.

    arrays: by name, as arrays or as tensors read on demand; storage types are kept as they come.
    metadata: strings stored in the header of the weights.  shard_size: bytes of a file at most (a
    single larger tensor gets a file of its own); None for one file.  card: the text of `README.md`.
    Raises ValueError where the folder exists (unless `force`) or names and shapes are not the spec's.
    """
    target = Path(folder)
    tensors = as_tensors(arrays)
    checked_model(spec, tensors, {}, target)
    check_new(target, force=force)
    with new_folder(target) as draft:
        write_weights(draft, {name: tensors[name] for name in parameter_table(spec)}, metadata, shard_size)
        write_text(draft / CONFIG, json.dumps(to_json(spec), indent=2) + "\n")
        if card is not None:
            write_text(draft / CARD, card)
    return target


def write_weights(
    folder: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None, shard_size: int | None
) -> None:
    """Write tensors as one file, or as shards with an index where they exceed `shard_size` bytes."""
    bits = {tensor.bits_each for tensor in tensors.values() if isinstance(tensor, QuantizedTensor)}
    if bits:
        assert len(bits) == 1, "a model is quantized with one number of bits"
        metadata = {**(metadata or {}), QUANTIZATION: f"affine, {bits.pop()} bits"}
        tensors = quantized.split(tensors)
    total = sum(tensor.nbytes for tensor in tensors.values())
    if shard_size is None or total <= shard_size:
        write_tensors(folder / WEIGHTS, tensors, metadata)
        return
    shards: list[dict[str, Tensor]] = [{}]
    used = 0
    for name, tensor in tensors.items():
        if shards[-1] and used + tensor.nbytes > shard_size:
            shards.append({})
            used = 0
        shards[-1][name] = tensor
        used += tensor.nbytes
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file_name = SHARD.format(number=number, total=len(shards))
        write_tensors(folder / file_name, shard, metadata)
        places |= dict.fromkeys(shard, file_name)
    index = {"metadata": {"total_size": total}, "weight_map": places}
    write_text(folder / INDEX, json.dumps(index, indent=2) + "\n")


def check_new(target: Path, *, force: bool) -> None:
    """Refuse a target that exists, or that `force` may not replace."""
    if not target.name:
        raise ValueError(f"{target}: expected the name of a new folder")
    if not target.exists() and not target.is_symlink():
        return
    if not force:
        raise ValueError(f"{target}: exists already; choose another folder or pass --force to replace it")
    if target.is_symlink() or not target.is_dir():
        raise ValueError(f"{target}: exists and is not a model folder; remove it yourself")
    if foreign := sorted(item.name for item in target.iterdir() if not _OURS.fullmatch(item.name)):
        raise ValueError(f"{target}: --force replaces model folders only, and this one holds {foreign[0]!r}")
