"""Files of torch.save: read exactly, without torch, and without running anything in them."""

from __future__ import annotations

import argparse
import os
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path

import foreign
import numpy as np
import pytest

from arm_convert.pickle_machine import Attributes
from arm_convert.torch_file import read_torch
from arm_convert.torch_writer import write_torch
from arm_core.files.errors import BadFileError
from arm_core.files.safetensors import Tensor

VALUE = {
    "model": OrderedDict(a=np.arange(6, dtype=np.float32).reshape(2, 3), b=np.array(7, np.int64)),
    "args": argparse.Namespace(lr=0.1, name="x", nested=[1, (2, None)]),
    "epoch": 5,
}


def read(path: Path, content: bytes):
    return read_torch(foreign.save(path / "file.pth", content)).value


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("make", [foreign.torch_zip, foreign.torch_legacy])
def test_both_formats_read_back_at_every_pickle_protocol(tmp_path, make, protocol):
    value = read(tmp_path, make(VALUE, protocol))
    assert np.array_equal(value["model"]["a"].read(), VALUE["model"]["a"])
    assert value["model"]["b"].read() == 7
    assert value["args"] == Attributes(lr=0.1, name="x", nested=[1, (2, None)])
    assert value["epoch"] == 5


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("new", [True, False])
def test_files_of_torch_are_read_exactly(tmp_path, new, protocol):
    torch = pytest.importorskip("torch")
    x = torch.randn(6, 4)
    saved = {
        "whole": x,
        "transposed": x.t(),
        "rows": x[1:3],
        "column": x[:, 2],
        "parameter": torch.nn.Parameter(x.bfloat16()),
        "half": x.half(),
        "double": x.double(),
        "integers": torch.arange(5),
        "flag": torch.tensor(True),
        "empty": torch.zeros(0, 3),
        "args": argparse.Namespace(a=1),
    }
    path = tmp_path / "file.pth"
    torch.save(saved, path, pickle_protocol=protocol, _use_new_zipfile_serialization=new)
    value = read_torch(path).value
    for name, tensor in saved.items():
        if isinstance(tensor, torch.Tensor):
            expected = tensor.detach()
            expected = expected.float() if expected.dtype in (torch.bfloat16, torch.half) else expected
            found = value[name].read()
            assert np.array_equal(found, expected.numpy()), name
            assert found.shape == tuple(tensor.shape)
    assert value["parameter"].dtype == "BF16"
    assert value["args"] == {"a": 1}


def test_a_module_saved_with_its_state_reads_with_shared_storage_once(tmp_path):
    torch = pytest.importorskip("torch")
    x = torch.randn(4)
    torch.save({"a": x, "b": x}, tmp_path / "file.pth")
    value = read_torch(tmp_path / "file.pth").value
    assert np.array_equal(value["a"].read(), value["b"].read())


def test_torch_loads_our_files_even_with_weights_only(tmp_path):
    torch = pytest.importorskip("torch")
    arrays = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.array(2.5, np.float32)}
    tensors = {name: Tensor.of(array) for name, array in arrays.items()}
    tensors["c"] = Tensor.of(arrays["a"]).cast("BF16")
    write_torch(tmp_path / "file.pth", tensors, {"key": "wörd"})
    loaded = torch.load(tmp_path / "file.pth", weights_only=True)
    assert isinstance(loaded["model"], OrderedDict)
    assert all(np.array_equal(loaded["model"][name].numpy(), arrays[name]) for name in arrays)
    assert loaded["model"]["c"].dtype == torch.bfloat16
    assert loaded["arm_vision"] == {"key": "wörd"}
    ours = read_torch(tmp_path / "file.pth").value["model"]
    assert np.array_equal(ours["c"].bits(), tensors["c"].bits())


def test_equal_content_gives_equal_bytes(tmp_path):
    for name in ("a", "b"):
        write_torch(tmp_path / name, {"x": Tensor.of(np.ones(3, np.float32))}, {})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


# -- attacks -------------------------------------------------------------------------------------------


class Command:
    """Runs a command when a careless reader unpickles it."""

    def __init__(self, function, *arguments):
        self._made = (function, arguments)

    def __reduce__(self):
        return self._made


def marker_command(path: Path) -> str:
    return f"touch {path}"


def attacks(marker: Path) -> dict[str, bytes]:
    """Pickles that would create `marker`, or worse, if anything in them ran."""
    code = f"open({str(marker)!r}, 'w').close()"
    command = marker_command(marker)

    def proto(*parts: bytes) -> bytes:
        return b"\x80\x02" + b"".join(parts) + b"."

    def text(value: str) -> bytes:
        return b"X" + len(value.encode()).to_bytes(4, "little") + value.encode()

    quoted = text(command)
    return {
        "os.system": pickle.dumps(Command(os.system, command), 2),
        "os.system, protocol 4": pickle.dumps(Command(os.system, command), 4),
        "os.system, protocol 0": pickle.dumps(Command(os.system, command), 0),
        "builtins.eval": pickle.dumps(Command(eval, code), 2),
        "builtins.exec": pickle.dumps(Command(exec, code), 2),
        "__builtin__.eval of Python 2": proto(b"c__builtin__\neval\n", text(code), b"\x85R"),
        "builtins.__import__": pickle.dumps(Command(__import__, "antigravity"), 2),
        "builtins.getattr chain": proto(
            b"cbuiltins\ngetattr\n", b"cos\n\n", text("system"), b"\x86R", quoted, b"\x85R"
        ),
        "subprocess": proto(b"csubprocess\ncheck_output\n", quoted, b"\x85R"),
        "reduce hidden in an argument": pickle.dumps([{"a": Command(os.system, command)}], 2),
        "a call of an OrderedDict's class": proto(
            b"ccollections\nOrderedDict\n", b"(", b"(", quoted, b"K\x01tlt", b"R"
        ),
        "INST": proto(b"(", quoted, b"ios\nsystem\n"),
        "OBJ": proto(b"(cos\nsystem\n", quoted, b"o"),
        "NEWOBJ": proto(b"cos\nsystem\n", quoted, b"\x85\x81"),
        "NEWOBJ_EX": b"\x80\x04cos\nsystem\n" + quoted + b"\x85}\x92.",
        "EXT1": proto(b"\x82\x01", quoted, b"\x85R"),
        "BUILD with __setstate__": proto(
            b"cargparse\nNamespace\n)R", b"}", text("__class__"), b"cos\nsystem\n", b"sb"
        ),
        "BUILD on a function": proto(b"ccollections\nOrderedDict\n", b"}", text("__call__"), b"Nsb"),
        "dotted name": b"\x80\x04" + text("collections") + text("abc.sys.modules") + b"\x93.",
        "torch.load": proto(b"ctorch\nload\n", quoted, b"\x85R"),
        "torch.hub.load": proto(b"ctorch.hub\nload\n", text("user/repo"), quoted, b"\x86R"),
        "torch.jit": proto(b"ctorch.jit\nload\n", quoted, b"\x85R"),
        "torch._utils function that is not needed": proto(
            b"ctorch._utils\n_import_dotted_name\n", quoted, b"\x85R"
        ),
        "torch.utils.cpp_extension": proto(b"ctorch.utils.cpp_extension\nload_inline\n", quoted, b"\x85R"),
        "torch storage called": proto(b"ctorch\nFloatStorage\n", b"K\x09\x85R"),
        "numpy.load": proto(b"cnumpy\nload\n", quoted, b"\x85R"),
        "pickle in a pickle": proto(b"c_pickle\nloads\n", quoted, b"\x85R"),
        "functools.partial": proto(b"cfunctools\npartial\n", b"cos\nsystem\n", quoted, b"\x86R)R"),
        "Namespace subclass by path": proto(b"cargparse\n_sys.modules\n", b"."),
    }


@pytest.mark.parametrize("form", ["zip", "legacy", "bare"])
@pytest.mark.parametrize("name", attacks(Path("marker")))
def test_a_malicious_pickle_is_refused_by_name_and_nothing_runs(tmp_path, name, form):
    marker = tmp_path / "marker"
    attack = attacks(marker)[name]
    content = {"zip": foreign.zip_of(attack, []), "legacy": foreign.legacy_of(attack, []), "bare": attack}[
        form
    ]
    with pytest.raises(BadFileError, match=r"file\.pth"):
        read(tmp_path, content)
    assert not marker.exists()


@pytest.mark.parametrize("name", ["os.system", "builtins.eval"])
def test_the_attacks_would_run_if_they_were_unpickled(tmp_path, name):
    marker = tmp_path / "marker"
    pickle.loads(attacks(marker)[name])
    assert marker.exists()


def test_a_refusal_names_the_global(tmp_path):
    with pytest.raises(
        BadFileError, match=r"references posix\.system, which no checkpoint needs.*nothing was executed"
    ):
        read(tmp_path, foreign.zip_of(pickle.dumps(Command(os.system, "true"), 2), []))


def nested(depth: int) -> bytes:
    """Lists that contain the previous one twice: a traversal visits 2 ** depth leaves."""
    steps = [b"]q\x00"]
    for i in range(depth):
        below = b"h" + bytes([i])
        steps.append(b"0](" + below * 2 + b"eq" + bytes([i + 1]))
    return b"\x80\x02" + b"".join(steps) + b"."


BOMBS = (
    *("doubling lists", "marks", "huge long", "long string", "longer string", "no such memo", "no end"),
    *("a key twice", "a tuple as key", "two values", "a list in itself"),
)


@pytest.mark.parametrize(
    ("attack", "message"),
    [
        (nested(200), "expected a checkpoint"),
        (b"\x80\x02" + b"(" * 200_000 + b".", "stack is empty"),
        (b"\x80\x02" + b"]" + b"]a" * 3 + b"\x8b" + (2**31 - 1).to_bytes(4, "little") + b"1.", "pickle"),
        (b"\x80\x02X" + (2**32 - 1).to_bytes(4, "little") + b"abc.", "pickle"),
        (b"\x80\x04\x8d" + (2**62).to_bytes(8, "little") + b"abc.", "pickle"),
        (b"\x80\x02}h\xff.", "pickle"),
        (b"\x80\x02", "pickle"),
        (b"\x80\x02}(K\x01K\x02K\x01K\x03u.", "1 appears twice"),
        (b"\x80\x02}((K\x01tK\x02u.", "expected plain keys, found a tuple"),
        (b"\x80\x02K\x01K\x02.", "values left on the stack"),
        (b"\x80\x02]q\x00h\x00a.", "expected a checkpoint"),
    ],
    ids=BOMBS,
)
def test_a_pickle_bomb_is_refused_immediately(tmp_path, attack, message):
    from arm_convert.checkpoint_source import open_checkpoint_source

    path = foreign.save(tmp_path / "file.pth", foreign.zip_of(attack, []))
    with pytest.raises(BadFileError, match=message):
        open_checkpoint_source(path, warn=print)


# -- tensors that do not fit ---------------------------------------------------------------------------


VALUES = np.arange(4, dtype=np.float32)


def one_tensor(offset=0, shape=(2,), stride=(1,), count=4, kind="FloatStorage") -> bytes:
    storage = foreign.Storage(VALUES, count=count, kind=kind)
    return foreign.torch_zip({"a": foreign.tensor(storage, offset, shape, stride)})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"offset": 3}, "does not fit"),
        ({"offset": -1}, "without a storage"),
        ({"shape": (5,)}, "does not fit"),
        ({"shape": (2,), "stride": (4,)}, "does not fit"),
        ({"shape": (-2,)}, "sizes and strides of 0 or more"),
        ({"shape": (2**40, 2**40), "stride": (0, 0)}, "does not fit"),
        ({"shape": (2**64,)}, "sizes and strides of 0 or more"),
        ({"shape": (2, 2)}, "equally many"),
        ({"shape": (1,) * 40, "stride": (1,) * 40}, "equally many"),
        ({"shape": (True,)}, "sizes and strides of 0 or more"),
        ({"stride": (-1,)}, "sizes and strides of 0 or more"),
        ({"count": 2**62}, "storage 0: expected 4611686018427387904 values of F32, found 16 bytes"),
        ({"count": 5}, "expected 5 values of F32, found 16 bytes"),
        ({"kind": "DoubleStorage"}, "expected 4 values of F64, found 16 bytes"),
        ({"kind": "QUInt8Storage"}, "references torch.QUInt8Storage"),
    ],
    ids=str,
)
def test_a_tensor_that_does_not_fit_its_storage_is_refused(tmp_path, changes, message):
    ok = read(tmp_path, one_tensor())
    assert np.array_equal(ok["a"].read(), VALUES[:2])
    with pytest.raises(BadFileError, match=message):
        read(tmp_path, one_tensor(**changes))


# -- damaged and tricky archives -----------------------------------------------------------------------


def archive(entries: list[tuple[str, bytes]], compression: int = zipfile.ZIP_STORED) -> bytes:
    import io

    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as out:
        for name, data in entries:
            out.writestr(zipfile.ZipInfo(name), data, compress_type=compression)
    return file.getvalue()


EMPTY = pickle.dumps({}, 2)
GOOD = [("archive/data.pkl", EMPTY), ("archive/version", b"3\n")]


def overlapping() -> bytes:
    """Two names for one record: the directory's second entry points at the first one's bytes."""
    content = bytearray(archive([("archive/data.pkl", EMPTY), ("archive/data.pkk", EMPTY)]))
    second = content.rfind(b"PK\1\2")
    content[second + 42 : second + 46] = (0).to_bytes(4, "little")
    return bytes(content).replace(b"archive/data.pkk", b"archive/data.pkl")


def nested() -> bytes:
    """A record that contains another one, with its header."""
    inner = archive([("archive/data.pkk", EMPTY)])
    content = bytearray(archive([("archive/data.pkl", inner[: inner.find(b"PK\1\2")])]))
    directory, end = content.find(b"PK\1\2", 60), content.rfind(b"PK\5\6")
    entry = bytearray(inner[inner.find(b"PK\1\2") : inner.rfind(b"PK\5\6")])
    entry[42:46] = content.find(b"PK\3\4", 4).to_bytes(4, "little")
    content[end:end] = entry
    end += len(entry)
    content[end + 8 : end + 12] = b"\2\0\2\0"
    content[end + 12 : end + 16] = (end - directory).to_bytes(4, "little")
    return bytes(content)


def beyond() -> bytes:
    """A record of 16 bytes whose directory entry claims a gigabyte."""
    content = bytearray(one_tensor(count=2**28))
    entry = content.find(b"PK\1\2", content.find(b"PK\1\2", content.find(b"PK\1\2") + 4) + 4)
    content[entry + 20 : entry + 28] = (2**30).to_bytes(4, "little") * 2
    return bytes(content)


def twice() -> bytes:
    return archive([("archive/data.pkl", EMPTY), ("archive/data.pkk", EMPTY)]).replace(b".pkk", b".pkl")


TRICKS = (
    *("nested", "twice", "beyond", "compressed", "zip bomb", "path up", "absolute path", "no pickle"),
    *("two pickles", "TorchScript", "big-endian", "overlap", "cut off", "hole", "flipped bit", "empty"),
    "four bytes",
)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (nested(), "the record 'archive/data.pkk' overlaps another one"),
        (beyond(), "the record 'archive/data/0' extends beyond the file"),
        (twice(), "'archive/data.pkl' appears twice in the zip directory"),
        (archive(GOOD, zipfile.ZIP_DEFLATED), "is compressed"),
        (archive([("archive/data.pkl", bytes(10**7))], zipfile.ZIP_DEFLATED), "is compressed"),
        (archive([("../../etc/data.pkl", EMPTY)]), "not one that torch.save writes"),
        (archive([("/etc/data.pkl", EMPTY)]), "not one that torch.save writes"),
        (archive([("a/b.txt", b"")]), r"expected one \*/data.pkl"),
        (archive([*GOOD, ("other/data.pkl", EMPTY)]), r"expected one \*/data.pkl"),
        (archive([*GOOD, ("archive/constants.pkl", EMPTY)]), "TorchScript"),
        (archive([*GOOD, ("archive/byteorder", b"big")]), "little-endian"),
        (overlapping(), "appears twice|overlap"),
        (archive(GOOD)[:-30], "corrupt or truncated zip archive"),
        (archive(GOOD)[:60] + archive(GOOD)[90:], "corrupt"),
        (archive(GOOD).replace(EMPTY, EMPTY[:-2] + b"x."), "checksum"),
        (b"PK\3\4" + bytes(100), "corrupt or truncated zip archive"),
        (b"PK\3\4", "corrupt or truncated zip archive"),
    ],
    ids=TRICKS,
)
def test_a_tricky_archive_is_refused(tmp_path, content, message):
    assert read(tmp_path, archive(GOOD)) == {}
    with pytest.raises(BadFileError, match=message):
        read(tmp_path, content)


def test_a_flipped_bit_in_a_tensor_is_detected_when_it_is_read(tmp_path):
    content = bytearray(foreign.torch_zip({"a": np.arange(100, dtype=np.float32)}))
    place = content.find(np.float32(50).tobytes() + np.float32(51).tobytes())
    content[place] ^= 1
    value = read(tmp_path, bytes(content))
    with pytest.raises(BadFileError, match=r"archive/data/0: the checksum does not match"):
        value["a"].read()


@pytest.mark.parametrize("cut", [1, 100, 395, 405, 500])
def test_a_truncated_legacy_file_is_refused(tmp_path, cut):
    content = foreign.torch_legacy({"a": np.arange(100, dtype=np.float32)})
    with pytest.raises(BadFileError, match=r"file\.pth"):
        read(tmp_path, content[:-cut])
