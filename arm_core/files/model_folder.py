"""Model folders: `config.json` and `model.safetensors`, the same for every backend.

`config.json` is `spec.to_json`; the tensors have the names and shapes of the parameter table. Large
models may be split into shards with an index, as on the Hugging Face hub:

    config.json  model.safetensors
    config.json  model.safetensors.index.json  model-00001-of-00003.safetensors  ...

Folders are written atomically (`arm_core.files.atomic`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt

from arm_core.files import quantized
from arm_core.files.atomic import new_folder, write_text
from arm_core.files.errors import BadFileError, reading
from arm_core.files.metadata import QUANTIZATION
from arm_core.files.quantized import QuantizedTensor
from arm_core.files.reading import MAX_JSON, parse_json, read_bounded, read_json_file
from arm_core.files.safetensors import AnyArray, Tensor, as_tensors, read_tensors, write_tensors
from arm_core.model.parameters import check_parameters, parameter_table
from arm_core.model.spec import ModelSpec, from_json, to_json

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD = "model-{number:05d}-of-{total:05d}.safetensors"
CARD = "README.md"
_OURS = re.compile(rf"{re.escape(CONFIG)}|{CARD}|model(-\d{{5}}-of-\d{{5}})?\.safetensors(\.index\.json)?")
"""Names of the files in a model folder; `force` only replaces folders with these files."""


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
        # It replaces the array: `np.asarray` returns its values, and an engine can use its parts.
        return cast(npt.NDArray[np.float32], tensor.parts())
    return np.asarray(tensor.read(), np.float32)


def read_model(path: Path | str) -> Model:
    """Open a model folder; names and shapes are checked strictly, tensors are read later.

    Raises ValueError if the folder is missing or holds no model, BadFileError (a ValueError) if a file is
    corrupt or belongs to another model.
    """
    folder = Path(path)
    if not folder.exists():
        raise ValueError(f"{folder}: no such folder")
    if not (folder / CONFIG).exists():
        raise ValueError(f"{folder}: expected a model folder with {CONFIG} and {WEIGHTS}, found no {CONFIG}")
    with reading(folder):
        spec = read_config(folder)
        arrays, metadata = read_weights(folder)
        return checked_model(spec, arrays, metadata, folder)


def checked_model(
    spec: ModelSpec, arrays: Mapping[str, Tensor], metadata: Mapping[str, str], path: Path
) -> Model:
    """A `Model` from a spec and tensors found at `path`, after comparing them with the parameter table."""
    check_parameters(spec, arrays, source=str(path))  # type: ignore[arg-type]  # only reads shapes
    for name, tensor in arrays.items():
        if tensor.dtype not in ("F32", "F16", "BF16"):
            raise BadFileError(f"{path}: {name}: expected F32, F16 or BF16, found {tensor.dtype}")
    return Model(spec, {name: arrays[name] for name in parameter_table(spec)}, dict(metadata), path)


def read_config(folder: Path) -> ModelSpec:
    """The spec in a folder's `config.json`."""
    path = folder / CONFIG
    return parse_config(path, read_bounded(path, MAX_JSON))


def parse_config(path: Path, text: bytes | str) -> ModelSpec:
    """The spec in the JSON of a `config.json`. path: its name in errors."""
    data = parse_json(path, text)
    try:
        return from_json(data)
    except (ValueError, TypeError, ArithmeticError) as error:  # a foreign file can contain any value
        raise BadFileError(f"{path}: {error}") from None


def read_weights(folder: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a folder, from one file or from the shards that its index names."""
    if not (folder / INDEX).exists():
        file = read_tensors(folder / WEIGHTS)
        return _unquantized(folder, file.tensors, file.metadata)
    index = folder / INDEX
    if (folder / WEIGHTS).exists():
        raise BadFileError(f"{folder}: holds both {WEIGHTS} and {INDEX}; remove the one that is out of date")
    places = read_json_file(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise BadFileError(f"{index}: expected weight_map to name the file of each tensor")
    for name, file_name in places.items():
        # Shards are in the folder of their index: a path would let an index open any file.
        if not isinstance(file_name, str) or not re.fullmatch(r"[\w.-]{1,200}\.safetensors", file_name):
            raise BadFileError(
                f"{index}: {name}: expected the name of a .safetensors file, found {str(file_name)[:80]!r}"
            )
    names = list(dict.fromkeys(places.values()))
    if missing := [name for name in names if not (folder / name).exists()]:
        raise BadFileError(
            f"{folder}: {len(missing)} of the {len(names)} files that {INDEX} names are missing, "
            f"such as {missing[0]}; download or copy them again"
        )
    _refuse_shared_shards(folder, names)
    shards = {file_name: read_tensors(folder / file_name) for file_name in names}
    arrays: dict[str, Tensor] = {}
    for name, file_name in places.items():
        if name not in shards[file_name].tensors:
            raise BadFileError(f"{index}: {name} is not in {file_name}")
        arrays[name] = shards[file_name].tensors[name]
    for file_name, shard in shards.items():
        if extra := [name for name in shard.tensors if places.get(name) != file_name]:
            raise BadFileError(f"{folder / file_name}: {extra[0]} is not listed for this file in {INDEX}")
    return _unquantized(folder, arrays, next(iter(shards.values())).metadata)


def _refuse_shared_shards(folder: Path, names: Iterable[str]) -> None:
    """Refuse several names for one file: its header would be read and kept once for each name."""
    seen: dict[tuple[int, int], str] = {}
    for name in names:
        try:
            found = (folder / name).stat()
        except OSError:
            continue  # reading it gives a better message
        first = seen.setdefault((found.st_dev, found.st_ino), name)
        if first != name:
            raise BadFileError(f"{folder / INDEX}: {first} and {name} are links to one file")


def _unquantized(
    folder: Path, stored: dict[str, Tensor], metadata: dict[str, str]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of the parameter table, from stored tensors that may be quantized."""
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
    """Write a model folder atomically, one tensor at a time.

    arrays: by name, as arrays or as tensors read on demand; storage types are kept.
    metadata: strings for the header of the weights.  shard_size: maximum size of a file, bytes (a larger
    tensor gets its own file); None for one file.  card: the text of `README.md`.
    Raises ValueError if names or shapes differ from the spec, or if the folder exists (unless `force` is
    set and it is a model folder).
    """
    target = Path(folder)
    tensors = as_tensors(arrays)
    checked_model(spec, tensors, {}, target)
    check_new(target, force=force)
    with new_folder(target, replace=force) as draft:
        write_weights(draft, {name: tensors[name] for name in parameter_table(spec)}, metadata, shard_size)
        write_text(draft / CONFIG, json.dumps(to_json(spec), indent=2) + "\n")
        if card is not None:
            write_text(draft / CARD, card)
        check_new(
            target, force=force
        )  # again: writing takes time, and another process may have written there
    return target


def write_weights(
    folder: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None, shard_size: int | None
) -> None:
    """Write tensors as one file, or as shards with an index if they exceed `shard_size` bytes."""
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
    """Raise ValueError if `target` exists, unless it is an empty folder.

    force: also accept a model folder that contains nothing else.
    """
    if not target.name:
        raise ValueError(f"{target}: expected the name of a new folder")
    if not target.exists() and not target.is_symlink():
        return
    if target.is_symlink() or not target.is_dir():
        raise ValueError(f"{target}: exists and is not a model folder; remove it, or choose another folder")
    items = sorted(target.iterdir())
    if not items:
        return
    if not force:
        raise ValueError(f"{target}: already exists; choose another folder or pass --force to replace it")
    if foreign := [item.name for item in items if not _OURS.fullmatch(item.name) or not _is_plain(item)]:
        raise ValueError(f"{target}: --force replaces model folders only; this one holds {foreign[0]!r}")
    try:
        read_config(target)
    except (ValueError, OSError):
        raise ValueError(
            f"{target}: --force replaces model folders only; this one has no {CONFIG} of a model"
        ) from None


def _is_plain(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()
