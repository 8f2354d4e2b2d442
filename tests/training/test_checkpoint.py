"""Checkpoints: saving and loading, corruption, and failures at any point of a write."""

import io
import json
import os
import pathlib
from dataclasses import replace

import numpy as np
import pytest

from arm_core.engine.protocol import TrainingState
from arm_core.files.errors import BadFileError
from arm_core.files.model_folder import read_model
from arm_core.files.safetensors import read_tensors, write_tensors
from arm_core.model.parameters import initial_parameters, parameter_table
from arm_core.model.spec import ClassifierSpec, EncoderSpec, ModelSpec, PretrainSpec
from arm_core.training import checkpoint as ck
from arm_core.training.model_source import Weights, open_folder

SMALL = ClassifierSpec(encoder=EncoderSpec(width=4, depth=1, patch=4, state=2), classes=3, image_size=(8, 8))
WITH_TABLES = PretrainSpec(
    encoder=EncoderSpec(width=4, depth=6, patch=2, state=2),
    image_size=(8, 8),
    cluster=(2, 2),
    decoder_width=4,
    decoder_depth=1,
    decoder_heads=1,
)


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def trainable(spec: ModelSpec) -> list[str]:
    return [name for name, row in parameter_table(spec).items() if row.trainable]


def make_checkpoint(step: int, *, ema: bool = True, spec: ModelSpec = SMALL) -> ck.Checkpoint:
    parameters = initial_parameters(spec, seed=step)
    moments = {name: parameters[name] * np.float32(0.5) for name in trainable(spec)}
    return ck.Checkpoint(
        spec=spec,
        progress=ck.Progress(
            step=step,
            position=3 * step,
            recipe="abc",
            engine={"backend": "toy", "device": "CPU"},
            losses=(1.5, 0.1),
            grad_norms=(2.0, 1e-30),
        ),
        state=TrainingState(
            parameters=parameters,
            exp_avg=moments,
            exp_avg_sq={name: m * m for name, m in moments.items()},
            ema={name: parameters[name] + np.float32(1) for name in moments} if ema else {},
        ),
    )


def assert_same(found: ck.Checkpoint | None, expected: ck.Checkpoint) -> None:
    assert found is not None
    assert (found.spec, found.progress) == (expected.spec, expected.progress)
    for kind in ("parameters", "exp_avg", "exp_avg_sq", "ema"):
        one, other = getattr(found.state, kind), getattr(expected.state, kind)
        assert sorted(one) == sorted(other)
        for name in one:
            assert one[name].tobytes() == other[name].tobytes(), f"{kind}/{name}"


def no_warning(sentence: str) -> None:
    raise AssertionError(sentence)


def newest_step(run) -> int:
    found = ck.newest_checkpoint(run, lambda sentence: None)
    return -1 if found is None else found.progress.step


def test_a_checkpoint_is_restored_bit_for_bit(tmp_path):
    for ema in (True, False):
        saved = make_checkpoint(7, ema=ema)
        folder = ck.save_checkpoint(tmp_path, saved)
        assert folder == tmp_path / "checkpoints" / "step-00000007"
        assert_same(ck.load_checkpoint(folder), saved)
        assert_same(ck.newest_checkpoint(tmp_path, no_warning), saved)
        assert (tmp_path / "LAST").read_text() == "step-00000007\n"
        assert (folder / "ema.safetensors").exists() == ema


def test_files_are_readable_by_others_and_named_as_documented(tmp_path):
    mask = os.umask(0o022)
    try:
        folder = ck.save_checkpoint(tmp_path, make_checkpoint(1))
    finally:
        os.umask(mask)
    assert {path.stat().st_mode & 0o777 for path in [*folder.iterdir(), tmp_path / "LAST"]} == {0o644}
    names = set(read_tensors(folder / "optimizer.safetensors").tensors)
    assert names == {f"{kind}/{name}" for kind in ("exp_avg", "exp_avg_sq") for name in trainable(SMALL)}
    assert json.loads((folder / "state.json").read_text())["position"] == 3


def test_a_checkpoint_is_a_model_folder_with_an_average(tmp_path):
    saved = make_checkpoint(2, spec=WITH_TABLES)
    folder = ck.save_checkpoint(tmp_path, saved)
    model = read_model(folder)
    assert model.spec == WITH_TABLES
    source = open_folder(folder, warn=print)
    assert source.model.spec == WITH_TABLES
    average = source.load(Weights.EMA)
    for name, row in parameter_table(WITH_TABLES).items():
        expected = saved.state.ema[name] if row.trainable else saved.state.parameters[name]
        np.testing.assert_array_equal(average[name], expected)
    plain = ck.save_checkpoint(tmp_path, make_checkpoint(3, ema=False))
    with pytest.raises(ValueError, match=r"no moving average of the weights .*optimizer\.ema_decay"):
        open_folder(plain, warn=print).load(Weights.EMA)


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "optimizer.safetensors", "ema.safetensors", "state.json"]
)
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_corrupt_file_is_named_and_the_previous_checkpoint_is_loaded(tmp_path, name, damage):
    before = make_checkpoint(1)
    ck.save_checkpoint(tmp_path, before)
    path = ck.save_checkpoint(tmp_path, make_checkpoint(2)) / name
    content = bytearray(path.read_bytes())
    if damage == "remove":
        path.unlink()
    elif damage == "truncate":
        path.write_bytes(content[:-1])
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    warnings: list[str] = []
    assert_same(ck.newest_checkpoint(tmp_path, warnings.append), before)
    assert len(warnings) == 1
    assert f"step-00000002/{name}" in warnings[0]
    with pytest.raises(BadFileError, match=name):
        ck.load_checkpoint(path.parent)


def test_a_checkpoint_with_a_missing_or_invalid_manifest_is_skipped(tmp_path):
    ck.save_checkpoint(tmp_path, make_checkpoint(1))
    for content in (None, "{", "[]", "{}", '{"config.json": 3}'):
        manifest = ck.save_checkpoint(tmp_path, make_checkpoint(2)) / "manifest.json"
        manifest.unlink()
        if content is not None:
            manifest.write_text(content)
        assert newest_step(tmp_path) == 1


def test_only_corrupt_checkpoints_are_an_error_but_no_checkpoint_is_not(tmp_path):
    assert ck.newest_checkpoint(tmp_path, no_warning) is None
    folder = ck.save_checkpoint(tmp_path, make_checkpoint(1))
    (folder / "state.json").write_text("{}")
    with pytest.raises(BadFileError, match="all 1 checkpoints are corrupt"):
        ck.newest_checkpoint(tmp_path, lambda sentence: None)


def test_pruning_keeps_the_newest_and_the_best(tmp_path):
    saved = make_checkpoint(0)
    for step in range(6):
        ck.save_checkpoint(tmp_path, replace(saved, progress=replace(saved.progress, step=step)))
    (tmp_path / "checkpoints" / "step-00000009.tmp").mkdir()
    ck.prune(tmp_path, keep=2, also=[1])
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "step-00000001",
        "step-00000004",
        "step-00000005",
    ]


class Crash(BaseException):
    """The machine stops: no code runs after this, not even cleanup."""


class FaultyDisk:
    """Patches every call that changes the disk, so that number `fail_at` fails.

    `kind` is what happens there: `crash` stops the process half-way through a write, and everything that
    was not flushed is lost, renames included; `full` raises OSError once, and the program continues.
    """

    def __init__(self, monkeypatch, fail_at: int, kind: str) -> None:
        self.fail_at, self.kind, self.calls, self.dead = fail_at, kind, 0, False
        self.unsynced: set[int] = set()  # files whose content was not flushed, by inode
        self.unlisted: dict[int, int] = {}  # new files whose folder was not flushed: its inode
        self.renames: list[tuple[pathlib.Path, pathlib.Path]] = []
        self.replaced: list[tuple[pathlib.Path, bytes]] = []
        self.real_rename = pathlib.Path.rename
        real_write, real_open = os.write, pathlib.Path.open
        real_replace = pathlib.Path.replace

        def write(descriptor, data):
            if self.strikes():
                real_write(descriptor, bytes(data)[: len(data) // 2])
                self.fail()
            return real_write(descriptor, data)

        def sync(descriptor):
            if self.strikes():
                self.fail()
            flushed = os.fstat(descriptor).st_ino
            self.unsynced.discard(flushed)
            self.unlisted = {file: folder for file, folder in self.unlisted.items() if folder != flushed}
            self.renames = [pair for pair in self.renames if pair[1].parent.stat().st_ino != flushed]
            self.replaced = [pair for pair in self.replaced if pair[0].parent.stat().st_ino != flushed]

        def open_path(path, mode="r", *args, **kwargs):
            if "w" not in mode:
                return real_open(path, mode, *args, **kwargs)
            if self.strikes():
                self.fail()
            file = real_open(path, "wb", buffering=0)
            self.unsynced.add(os.fstat(file.fileno()).st_ino)
            self.unlisted[os.fstat(file.fileno()).st_ino] = path.parent.stat().st_ino
            return file if "b" in mode else TextThroughWrite(file)

        def rename(path, target):
            if self.strikes():
                self.fail()
            self.renames.append((path, pathlib.Path(target)))
            return self.real_rename(path, target)

        def replace_(path, target):
            if self.strikes():
                self.fail()
            self.replaced.append((target, target.read_bytes()))
            return real_replace(path, target)

        monkeypatch.setattr(os, "write", write)
        monkeypatch.setattr(os, "fsync", sync)
        monkeypatch.setattr(pathlib.Path, "open", open_path)
        monkeypatch.setattr(pathlib.Path, "rename", rename)
        monkeypatch.setattr(pathlib.Path, "replace", replace_)

    def strikes(self) -> bool:
        assert not self.dead, "the process is dead, who is still writing?"
        self.calls += 1
        return self.calls == self.fail_at

    def fail(self) -> None:
        if self.kind == "full":
            raise OSError(28, "No space left on device")
        self.dead = True
        raise Crash

    def lose_what_was_not_flushed(self, run: pathlib.Path) -> None:
        for source, target in reversed(self.renames):
            self.real_rename(target, source)
        for path in run.rglob("*"):
            if path.is_file() and path.stat().st_ino in self.unlisted:
                path.unlink()
            elif path.is_file() and path.stat().st_ino in self.unsynced:
                os.truncate(path, 0)
        for path, content in self.replaced:
            path.write_bytes(content)


class TextThroughWrite(io.TextIOWrapper):
    """A text file whose bytes go through `os.write`, where `FaultyDisk` sees them."""

    def __init__(self, raw) -> None:
        super().__init__(raw, encoding="utf-8", write_through=True)
        self.raw = raw

    def write(self, text: str) -> int:
        os.write(self.raw.fileno(), text.encode())
        return len(text)


@pytest.mark.parametrize("kind", ["crash", "full"])
def test_a_failure_at_any_write_flush_or_rename_leaves_the_previous_checkpoint(tmp_path, kind):
    before, after = make_checkpoint(1), make_checkpoint(2)
    outcomes, fail_at, failed = [], 0, True
    while failed:
        fail_at += 1
        run = tmp_path / f"run-{fail_at}"
        run.mkdir()
        ck.save_checkpoint(run, before)
        with pytest.MonkeyPatch.context() as patch:
            disk = FaultyDisk(patch, fail_at, kind)
            try:
                ck.save_checkpoint(run, after)
                failed = False
            except (Crash, OSError):
                pass
        if kind == "crash":  # including directly after the end
            disk.lose_what_was_not_flushed(run)
        found = ck.newest_checkpoint(run, no_warning)
        assert_same(found, after if found and found.progress.step == 2 else before)
        outcomes.append(found.progress.step)
        assert (run / "checkpoints" / (run / "LAST").read_text().strip() / "manifest.json").exists()
        if kind == "full" and found.progress.step == 1:
            assert not list((run / "checkpoints").glob("*.tmp"))
        # The run continues, whatever files remain.
        ck.save_checkpoint(run, after)
        ck.prune(run, keep=2)
        assert_same(ck.newest_checkpoint(run, no_warning), after)
        assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
            "step-00000001",
            "step-00000002",
        ]
    # Both cases occurred, and after the rename is on the disk the new checkpoint is used.
    assert outcomes == sorted(outcomes)
    assert set(outcomes) == {1, 2}
    assert fail_at > 30


@pytest.mark.parametrize(
    ("file", "kind"), [("optimizer", "exp_avg/"), ("optimizer", "exp_avg_sq/"), ("ema", "")], ids=str
)
@pytest.mark.parametrize("change", ["missing", "reshaped", "unexpected", "emptied"])
def test_moments_or_an_average_of_another_shape_are_refused_by_name(tmp_path, file, kind, change):
    folder = ck.save_checkpoint(tmp_path, make_checkpoint(2))
    path = folder / f"{file}.safetensors"
    arrays = {name: tensor.read() for name, tensor in read_tensors(path).tensors.items()}
    name = next(name for name in arrays if name.startswith(kind) and name.endswith("norm_f.weight"))
    value = arrays.pop(name)
    if change == "reshaped":
        arrays[name] = value.reshape(-1, 1)
    elif change == "unexpected":
        arrays |= {name: value, f"{kind}surplus": value}
    elif change == "emptied":
        arrays = {other: v for other, v in arrays.items() if kind and not other.startswith(kind)}
    write_tensors(path, arrays)
    files = json.loads((folder / "manifest.json").read_text())
    files[path.name] = ck._digest(path)
    (folder / "manifest.json").write_text(json.dumps(files))
    with pytest.raises(ValueError, match=f"{file}.safetensors.*(missing|expected)"):
        ck.load_checkpoint(folder)
