"""Small checkpoints in foreign formats, made without torch, for the converter tests."""

from __future__ import annotations

import argparse
import io
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np

from arm_convert.official import official_mask, official_view
from arm_core.model.parameters import initial_parameters
from arm_core.model.spec import ClassifierSpec, EncoderSpec, ModelSpec, Pooling, PretrainSpec

TINY = EncoderSpec(width=8, depth=6, patch=4)
PRETRAIN = PretrainSpec(
    encoder=TINY, image_size=(24, 24), cluster=(2, 2), decoder_width=8, decoder_depth=2, decoder_heads=1
)
CLASSIFIER = ClassifierSpec(encoder=TINY, classes=3, image_size=(16, 16), pooling=Pooling.CLS)

STORAGES = {"float32": "FloatStorage", "int64": "LongStorage", "float16": "HalfStorage"}


def official_state(spec: ModelSpec, seed: int = 0) -> dict[str, np.ndarray]:
    """Initial values under official names, the mask included."""
    state = official_view(spec, initial_parameters(spec, seed))
    return {**state, "mask": official_mask(spec)} if isinstance(spec, PretrainSpec) else state


class Global:
    """Pickles as a reference to `module.name`, which need not exist."""

    def __init__(self, module: str, name: str) -> None:
        self.module, self.name = module, name


class Call:
    """Pickles as a call of a global; if `state` is given, it also sets attributes."""

    def __init__(self, function: Global, *arguments: Any, state: Any = None) -> None:
        self.function, self.arguments, self.state = function, arguments, state


class Storage:
    """The values of a tensor; `count` and `kind` may be wrong."""

    def __init__(self, array: np.ndarray, *, count: int | None = None, kind: str | None = None) -> None:
        self.array = array
        self.count = array.size if count is None else count
        self.kind = kind or STORAGES[array.dtype.name]


def tensor(storage: Storage, offset: int, shape: tuple[int, ...], stride: tuple[int, ...]) -> Call:
    """A view of a storage, in torch's format."""
    hooks = Call(Global("collections", "OrderedDict"))
    return Call(Global("torch._utils", "_rebuild_tensor_v2"), storage, offset, shape, stride, False, hooks)


class _Pickler(pickle._Pickler):
    """The standard library's pickler, with arrays written as torch writes tensors."""

    def __init__(self, file: io.BytesIO, protocol: int) -> None:
        super().__init__(file, protocol)
        self.storages: list[np.ndarray] = []

    def persistent_id(self, obj: Any) -> Any:
        if not isinstance(obj, Storage):
            return None
        self.storages.append(obj.array)
        return "storage", Global("torch", obj.kind), str(len(self.storages) - 1), "cpu", obj.count

    def save(self, obj: Any, save_persistent_id: bool = True) -> None:
        if isinstance(obj, Global):
            self.write(pickle.GLOBAL + f"{obj.module}\n{obj.name}\n".encode())
        elif isinstance(obj, Call):
            self.save(obj.function)
            self.save(obj.arguments)
            self.write(pickle.REDUCE)
            if obj.state is not None:
                self.save(obj.state)
                self.write(pickle.BUILD)
        elif isinstance(obj, np.ndarray):
            strides = tuple(int(np.prod(obj.shape[i + 1 :])) for i in range(obj.ndim))
            self.save(tensor(Storage(obj), 0, obj.shape, strides))
        elif isinstance(obj, argparse.Namespace):
            self.save(Call(Global("argparse", "Namespace"), state=vars(obj)))
        else:
            super().save(obj, save_persistent_id)


def pickled(value: Any, protocol: int = 2) -> tuple[bytes, list[np.ndarray]]:
    """The pickle of `value` as torch would write it, and its storages."""
    file = io.BytesIO()
    pickler = _Pickler(file, protocol)
    pickler.dump(value)
    return file.getvalue(), pickler.storages


def torch_zip(value: Any, protocol: int = 2) -> bytes:
    """The bytes that `torch.save(value)` writes."""
    return zip_of(*pickled(value, protocol))


def zip_of(description: bytes, storages: list[np.ndarray], **options: Any) -> bytes:
    """The archive around a pickle."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", **options) as archive:
        archive.writestr("archive/data.pkl", description)
        archive.writestr("archive/byteorder", "little")
        for key, array in enumerate(storages):
            archive.writestr(f"archive/data/{key}", array.tobytes())
        archive.writestr("archive/version", "3\n")
    return file.getvalue()


def torch_legacy(value: Any, protocol: int = 2) -> bytes:
    """The bytes that `torch.save(value, _use_new_zipfile_serialization=False)` writes."""
    return legacy_of(*pickled(value, protocol))


def legacy_of(description: bytes, storages: list[np.ndarray]) -> bytes:
    """The stream around a pickle."""
    system = {"protocol_version": 1001, "little_endian": True}
    head = b"".join(pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, system))
    keys = pickle.dumps([str(i) for i in range(len(storages))], 2)
    body = b"".join(array.size.to_bytes(8, "little") + array.tobytes() for array in storages)
    return head + description + keys + body


def checkpoint(spec: ModelSpec, seed: int = 0, **args: Any) -> dict[str, Any]:
    """An official checkpoint without an optimizer."""
    return {
        "model": OrderedDict(official_state(spec, seed)),
        "epoch": 3,
        "args": argparse.Namespace(**args),
    }


def save(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path
