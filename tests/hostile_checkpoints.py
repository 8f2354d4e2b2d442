"""Hostile checkpoints: bombs, and files and configs that lie about sizes."""

from __future__ import annotations

import json
import struct
import zipfile
from pathlib import Path

import foreign
import numpy as np
from hostile_cases import Words, case, importing, model_folder, variants

from arm_core.files.safetensors import write_tensors
from arm_core.model.spec import to_json

# -- files of torch.save -------------------------------------------------------------------------------


@case
def a_memoized_dictionary_is_copied_into_many_objects(folder: Path) -> Words:
    keys = b"".join(b"X\5\0\0\0%05dK\1" % i for i in range(30_000))
    name = b"cargparse\nNamespace\nq\2"
    build = b"h\2)Rh\1b"
    attack = (
        b"\x80\2}(X\5\0\0\0model}(" + keys + b"uq\1X\4\0\0\0args](" + name + b"0" + build * 20_000 + b"eu."
    )
    (folder / "x.pth").write_bytes(foreign.zip_of(attack, []))
    return importing(folder / "x.pth")


@case
def millions_of_memoized_dictionaries(folder: Path) -> Words:
    attack = b"\x80\4]" + b"}\x94a" * 5_000_000 + b"."
    (folder / "x.pth").write_bytes(foreign.zip_of(attack, []))
    return importing(folder / "x.pth")


@case
def a_zip_directory_of_gigabytes(folder: Path) -> Words:
    path = folder / "x.pth"
    size = 3 * 2**30
    with path.open("wb") as file:
        file.write(b"PK\3\4")
        file.truncate(size)
        file.seek(size)
        file.write(struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 9, 9, size - 100, 100, 0))
    return importing(path)


@case
def half_a_million_records(folder: Path) -> Words:
    entry = struct.pack("<4s6H3L5H2L", b"PK\1\2", 20, 20, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0) + b"a"
    count = 500_000
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, count * len(entry), 4, 0)
    (folder / "x.pth").write_bytes(b"PK\3\4" + entry * count + end)
    return importing(folder / "x.pth")


@case
def records_inside_of_records(folder: Path) -> Words:
    """The bytes of each record hold all following ones: a chain of 1,000 would read 1,000 times the file."""
    path = folder / "x.pth"
    names = [b"archive/data/%d" % i for i in range(1000)]
    local = [struct.pack("<4s5H3L2H", b"PK\3\4", 20, 0, 0, 0, 0, 0, 0, 0, len(n), 0) + n for n in names]
    body, offsets = b"", []
    for header in local:
        offsets.append(len(body))
        body += header
    total = len(body)
    directory = b""
    for name, offset, header in zip(names, offsets, local, strict=True):
        size = total - offset - len(header)
        fields = (20, 20, 0, 0, 0, 0, 0, size, size, len(name), 0, 0, 0, 0, 0, offset)
        directory += struct.pack("<4s6H3L5H2L", b"PK\1\2", *fields) + name
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, len(names), len(names), len(directory), total, 0)
    path.write_bytes(body + directory + end)
    return importing(path)


@case
def a_compressed_record_of_zeros(folder: Path) -> Words:
    with zipfile.ZipFile(folder / "x.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(2 * 10**8))
    return importing(folder / "x.pth")


@case
def a_number_of_millions_of_digits(folder: Path) -> Words:
    attack = b"\x80\2}(X\5\0\0\0modelI" + b"9" * 10**7 + b"\nu."
    (folder / "x.pth").write_bytes(foreign.zip_of(attack, []))
    return ["convert", "inspect", str(folder / "x.pth")]


@case
def names_of_megabytes(folder: Path) -> Words:
    state = {"x" * 5_000_000: np.zeros(1, np.float32)}
    (folder / "x.pth").write_bytes(foreign.torch_zip({"model": state, "y" * 5_000_000: 1}))
    return ["convert", "inspect", str(folder / "x.pth")]


@variants(
    "a tensor of the official checkpoint is",
    {
        "scalar": lambda value: value.reshape(-1)[:1].reshape(()),
        "empty": lambda value: value.reshape(-1)[:0],
        "flat": lambda value: value.reshape(-1),
        "deep": lambda value: value.reshape((1,) * 20 + value.shape),
    },
)
def an_odd_shape(folder: Path, change) -> Words:
    content = foreign.checkpoint(foreign.CLASSIFIER)
    for name in ("patch_embed.proj.weight", "head.weight", "pos_embed", "layers.0.mixer.A_log"):
        content["model"][name] = np.ascontiguousarray(change(content["model"][name]))
    (folder / "x.pth").write_bytes(foreign.torch_zip(content))
    return ["convert", "inspect", str(folder / "x.pth")]


@case
def weights_of_a_hundred_billion_classes(folder: Path) -> Words:
    classes = 10**11
    header = {"head.weight": {"dtype": "U8", "shape": [classes], "data_offsets": [0, classes]}}
    position = classes
    for name, shape in {"patch_embed.proj.weight": [8, 3, 4, 4], "layers.0.mixer.A_log": [8, 16]}.items():
        size = 4 * int(np.prod(shape))
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [position, position + size]}
        position += size
    return importing(_sparse(folder / "x.safetensors", header, position))


def _sparse(path: Path, header: dict, size: int) -> Path:
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + size)
    return path


# -- safetensors and metadata --------------------------------------------------------------------------


@variants(
    "metadata claim",
    {
        "65536 pixels": {"image_size": [65536, 65536]},
        "16384 pixels": {"image_size": [16384, 16384], "cluster": [4, 4]},
        "4096 pixels, 16384 wide": {
            "image_size": [1024, 1024],
            "encoder": {"width": 16384, "depth": 6, "patch": 4},
        },
        "a deep model": {"encoder": {"width": 8, "depth": 600_000_000, "patch": 4}},
        "a long number": {"decoder_width": 10**400},
    },
)
def a_lying_config(folder: Path, changes) -> Words:
    config = to_json(foreign.PRETRAIN)
    config["encoder"] = {**config["encoder"], **changes.get("encoder", {})}
    config |= {name: value for name, value in changes.items() if name != "encoder"}
    about = {"arm.layout": "official", "arm.config": json.dumps(config)}
    write_tensors(folder / "x.safetensors", {"a": np.zeros(2, np.float32)}, about)
    return ["convert", "inspect", str(folder / "x.safetensors")]


@case
def a_header_of_the_largest_size(folder: Path) -> Words:
    entry = b'"%07d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},'
    text = b"{" + b"".join(entry % i for i in range(250_000))[:-1] + b"}"
    (folder / "x.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    return importing(folder / "x.safetensors")


@case
def a_header_beyond_the_largest_size(folder: Path) -> Words:
    return importing(_huge_header(folder / "x.safetensors"))


def _huge_header(path: Path) -> Path:
    with path.open("wb") as file:
        file.write((2**33).to_bytes(8, "little") + b'{"a":1')
        file.truncate(2**33 + 8)
    return path


@variants(
    "config.json",
    {
        "with one side of a cluster": {"cluster": [1]},
        "with text for a size": {"image_size": "ab"},
        "with fractions": {"image_size": [24.0, 24.5]},
        "with a long number": {"classes": 10**400},
        "with a large float": {"norm_eps": 1e300},
        "with a deep encoder": {"encoder": [[[]]] * 5},
        "with nested lists": {"scan_directions": [[["row"]]]},
        "with a million directions": {"scan_directions": ["row"] * 10**6},
        "with a kind that is a list": {"kind": ["classifier"]},
        "with a key of megabytes": {"k" * 10**7: 1},
    },
)
def an_odd_config(folder: Path, changes) -> Words:
    path = model_folder(folder) / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return ["info", str(folder / "m")]


@variants(
    "metadata of",
    {
        "deep classes": {"classes": "[" * 10**6},
        "many classes": {"classes": json.dumps(["x"] * 10**6)},
        "classes of other types": {"classes": json.dumps([{"a": []}, None, 1e308])},
        "an evaluation transform with a tiny crop": {"eval_transform": '{"crop_fraction": 1e-5}'},
        "an evaluation transform of text": {"eval_transform": '{"mean": "abc", "std": {}}'},
        "an evaluation transform of a list": {"eval_transform": "[1]"},
        "an evaluation transform with infinity": {"eval_transform": '{"crop_fraction": 1e999}'},
        "an evaluation transform with a long number": {
            "eval_transform": '{"crop_fraction": ' + "9" * 400 + "}"
        },
    },
)
def odd_metadata(folder: Path, metadata) -> Words:
    model = model_folder(folder, **metadata)
    np.save(folder / "x.npy", np.zeros((1, 3, 4, 4), np.float32))
    return ["embed", str(model), "--array", str(folder / "x.npy"), "--out", str(folder / "o.npz")]
