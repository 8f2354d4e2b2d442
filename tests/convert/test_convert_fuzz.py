"""Thousands of damaged files: each is read as it is or refused with the one typed error, in little memory.

If atheris is installed, tests/convert/fuzz_atheris.py continues from the same seeds, guided by coverage.
"""

from __future__ import annotations

import importlib.util
import random
import re
import subprocess
import sys
import tempfile
import tracemalloc
from pathlib import Path

import foreign
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from arm_convert.checkpoint_source import open_checkpoint_source
from arm_convert.importing import resolve
from arm_convert.official_run import optimizer_state
from arm_core.files.errors import BadFileError
from arm_core.files.model_folder import read_model, write_model
from arm_core.files.safetensors import read_tensors, write_tensors
from arm_core.model.parameters import initial_parameters

FUZZER = Path(__file__).with_name("fuzz_atheris.py")
EXAMPLES = 2000
MEMORY = 64 * 2**20
"""More than any of these small files may take, bytes; a header that is believed takes gigabytes."""

SMALL = {
    "model": {"a": np.arange(12, dtype=np.float32).reshape(3, 4), "b": np.ones(5, np.float16)},
    "optimizer": {"state": {0: {"step": np.array(2.0, np.float32)}}, "param_groups": [{"params": [0]}]},
    "args": foreign.Call(foreign.Global("argparse", "Namespace"), state={"lr": 0.1, "aa": "rand"}),
    "epoch": 3,
}
PICKLE, STORAGES = foreign.pickled(SMALL)


def _safetensors() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x"
        write_tensors(
            path, {"a": SMALL["model"]["a"], "b": SMALL["model"]["b"]}, {"arm.layout": "mlx", "k": "v"}
        )
        return path.read_bytes()


SEEDS = {
    "zip": foreign.torch_zip(SMALL),
    "pickle": PICKLE,
    "legacy": foreign.torch_legacy(SMALL),
    "safetensors": _safetensors(),
    "header": _safetensors()[8 : 8 + int.from_bytes(_safetensors()[:8], "little")],
}
WRAPPED = {
    "pickle": lambda data: foreign.zip_of(data, STORAGES),
    "header": lambda data: len(data).to_bytes(8, "little") + data + bytes(58),
}
"""Damage inside a file with correct checksums and lengths, so that the code behind them is reached."""

INTERESTING = (b"\x00", b"\xff", b"\x7f", b"\x80", b"0", b"9", b"-", b'"', b"{", b"[", b"q", b"R", b".", b"(")


VALUES = (
    *(b"0", b"-1", b"1", b"true", b"null", b'"x"', b"[]", b"[1]", b"{}", b"1.5", b"1e999", b"NaN"),
    *(b"4294967295", b"9223372036854775807", b"99999999999999999999999", b"1" + b"0" * 400),
)


def mutated(seed: bytes, number: int) -> bytes:
    """The seed with one to four changes drawn from `number`: bits flipped, bytes set, inserted, removed or
    copied, the end cut off, a length made huge, a JSON value replaced."""
    draw = random.Random(number)
    data = bytearray(seed)
    for _ in range(draw.randint(1, 4)):
        at, kind = draw.randrange(len(data) + 1), draw.randrange(9)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << draw.randrange(8)
        elif kind == 1 and at < len(data):
            data[at] = draw.randrange(256)
        elif kind == 2:
            data[at:at] = draw.choice(INTERESTING)
        elif kind == 3:
            del data[at : at + draw.randint(1, 64)]
        elif kind == 4:
            start = draw.randrange(len(data) + 1)
            data[at:at] = data[start : start + 32]
        elif kind == 5:
            del data[at:]
        elif kind == 6:
            width = draw.choice((4, 8))
            data[at : at + width] = b"\xff" * (width - 1) + b"\x7f"
        elif spans := [found.span() for found in re.finditer(rb"\d+|true|false|null|\[\]", data)]:
            start, stop = draw.choice(spans)
            data[start:stop] = draw.choice(VALUES)
    return bytes(data)


def try_to_read(path: Path) -> bool:
    """Read everything in a file; False if it was refused with the typed error."""
    try:
        source = open_checkpoint_source(path, warn=print)
        for tensor in (*source.tensors.values(), *(source.average or {}).values()):
            tensor.read()
        resolved = resolve(source)
        optimizer_state(source, resolved.spec)
    except BadFileError:
        return False
    return True


def within_memory(action) -> object:
    tracemalloc.start()
    try:
        result = action()
        assert tracemalloc.get_traced_memory()[1] < MEMORY
    finally:
        tracemalloc.stop()
    return result


numbers = st.integers(0, 2**64 - 1)
fuzzed = settings(
    max_examples=EXAMPLES,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz") / "file"


@pytest.mark.parametrize("name", list(SEEDS))
def test_the_seeds_themselves_are_read(scratch, name):
    content = WRAPPED.get(name, bytes)(SEEDS[name])
    scratch.write_bytes(content)
    if name in ("safetensors", "header"):
        assert set(read_tensors(scratch).tensors) == {"a", "b"}
    else:
        assert set(open_checkpoint_source(scratch, warn=print).tensors) == {"a", "b"}


@pytest.mark.parametrize("name", list(SEEDS))
def test_damaged_files_are_only_refused_with_the_typed_error(scratch, name):
    @fuzzed
    @given(numbers)
    def fuzz(number):
        scratch.write_bytes(WRAPPED.get(name, bytes)(mutated(SEEDS[name], number)))
        within_memory(lambda: try_to_read(scratch))

    fuzz()


def folder_is_read_or_refused(folder: Path) -> None:
    try:
        read_model(folder).load()
    except ValueError as error:
        # check_parameters raises the plain kind; either way the message leads with the folder.
        if not str(error).startswith(str(folder)):
            raise


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    target = tmp_path_factory.mktemp("model") / "m"
    write_model(target, foreign.CLASSIFIER, initial_parameters(foreign.CLASSIFIER, 0), shard_size=60_000)
    return target


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_damaged_model_folders_are_only_refused_with_the_typed_error(folder, name):
    seed = (folder / name).read_bytes()

    @fuzzed
    @given(numbers)
    def fuzz(number):
        (folder / name).write_bytes(mutated(seed, number))

        within_memory(lambda: folder_is_read_or_refused(folder))

    fuzz()
    (folder / name).write_bytes(seed)
    assert read_model(folder).spec == foreign.CLASSIFIER


@pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="needs atheris")
@pytest.mark.parametrize("name", list(SEEDS))
def test_atheris_finds_nothing_in_a_few_thousand_runs(name):
    done = subprocess.run(
        [sys.executable, FUZZER, name, "-runs=5000"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
