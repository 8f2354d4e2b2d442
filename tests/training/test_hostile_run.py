"""Run folders with foreign, invalid or special files, which are reported or skipped without waiting."""

import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
from test_run_folder import no_warning, save_step

from arm_core.recipe.recipe import Recipe, load_recipe, override
from arm_core.training import checkpoint as ck
from arm_core.training.records import read_rows
from arm_core.training.run_folder import RunFolder, resume_command, resume_run, start_run


@pytest.fixture
def recipe() -> Recipe:
    small = ["model.width=8", "model.depth=6", "model.decoder_width=8", "data.source=synthetic"]
    return override(load_recipe("pretrain-digits"), small)


@pytest.fixture
def run(tmp_path, recipe) -> RunFolder:
    with start_run(tmp_path / "run", recipe, recipe.spec()) as run:
        for step in (0, 5):
            save_step(run, step)
            run.append_metrics({"step": step, "loss": 1.0, "score": 0.5})
            run.record_session({"step": step})
    return run


@contextmanager
def within(seconds: int):
    """Fail if something waits forever."""

    def late(number, frame):
        raise AssertionError(f"not finished after {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def resume(run: RunFolder) -> tuple[RunFolder, list[str]]:
    warnings: list[str] = []
    with within(20), resume_run(run.path, warn=warnings.append) as opened:
        opened.truncate_metrics(5)
        opened.record_session({"step": 5})
    return opened, warnings


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("[]", "expected an object with a whole number 'step', found '[]'"),
        ("5", "expected an object with a whole number 'step'"),
        ('{"loss": 1}', "expected an object with a whole number 'step'"),
        ('{"step": true}', "expected an object with a whole number 'step'"),
        ('{"step": 3, "score": "high"}', "score: expected a number, found 'high'"),
        ("[" * 100_000, "not valid JSON: '[[["),
        ('{"step": 3, "lo', "not valid JSON"),
        ("\udcff", "not valid JSON"),
        ("1" * 5000, "not valid JSON"),
    ],
)
def test_foreign_lines_of_the_metrics_are_skipped_with_a_warning(run, line, reason):
    path = run.path / "metrics.jsonl"
    content = path.read_text().splitlines()
    content.insert(1, line)
    path.write_bytes(("\n".join([*content, "{}"]) + "\n").encode(errors="surrogateescape"))
    _, warnings = resume(run)
    assert len(warnings) == 1
    assert f"metrics.jsonl, line 2: {reason}" in warnings[0]
    assert warnings[0].endswith("and 1 more lines; skipped")
    assert len(warnings[0]) < 300
    assert [row["step"] for row in read_rows(path)] == [0, 5]


def test_an_incomplete_last_line_of_the_sessions_is_removed(run):
    path = run.path / "sessions.jsonl"
    with path.open("a") as file:
        file.write('{"step": 5, "started": "2026-01-01T00:0')
    resume(run)
    assert [row["step"] for row in read_rows(path)] == [0, 5, 5]


def rewrite_state(folder: Path, **changes) -> None:
    """Change `state.json`, with a manifest that matches."""
    state = {**json.loads((folder / "state.json").read_text()), **changes}
    text = json.dumps({name: value for name, value in state.items() if value is not ...}).encode()
    (folder / "state.json").write_bytes(text)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["state.json"] = {"bytes": len(text), "sha256": hashlib.sha256(text).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"step": "5"}, "state.step: expected a whole number"),
        ({"step": -5}, "state.step: expected a whole number"),
        ({"step": 10**400}, "state.step: expected a whole number"),
        ({"step": 7}, "found step 7, expected that of the folder step-00000005"),
        ({"position": 1.5}, "state.position: expected a whole number"),
        ({"position": None}, "state.position: expected a whole number"),
        ({"losses": 3}, "losses: expected a list of numbers"),
        ({"losses": "abc"}, "losses: expected a list of numbers"),
        ({"grad_norms": [1, "x"]}, "grad_norms: expected a list of numbers"),
        ({"engine": ["torch"]}, "engine: expected names and texts"),
        ({"engine": {"backend": 3}}, "engine: expected names and texts"),
        ({"recipe": 3}, "recipe: expected a hash"),
        ({"recipe": ...}, "recipe is missing"),
        ({"stp": 3}, "unknown key stp; did you mean 'step'?"),
    ],
)
def test_a_state_with_wrong_types_is_a_corrupt_checkpoint(run, changes, reason):
    rewrite_state(run.path / "checkpoints" / "step-00000005", **changes)
    opened, warnings = resume(run)
    assert opened.resumed.progress.step == 0
    assert len(warnings) == 1
    assert f"state.json: {reason}" in warnings[0]


@pytest.mark.parametrize(
    "name",
    [
        "step-000000005",
        "step-00000005.bak",
        "step-" + "\u0660" * 8,
        "step-" + "9" * 200,
        "notes.txt",
        "step-7",
    ],
)
def test_other_names_among_the_checkpoints_are_ignored(run, name):
    (run.path / "checkpoints" / name).mkdir()
    assert ck.saved_steps(run.path) == [0, 5]
    ck.prune(run.path, keep=1)
    assert ck.saved_steps(run.path) == [5]
    assert (run.path / "checkpoints" / name).exists()
    assert resume(run)[1] == []


def test_incomplete_checkpoints_do_not_count_as_kept_checkpoints(run):
    (run.path / "checkpoints" / "step-00000009").mkdir()
    (run.path / "checkpoints" / "step-00000008").write_text("a file")
    ck.prune(run.path, keep=1)
    assert ck.saved_steps(run.path) == [5, 9]
    opened, warnings = resume(run)
    assert opened.resumed.progress.step == 5
    assert len(warnings) == 1
    assert "step-00000009 is corrupt; skipped" in warnings[0]


SPECIAL = {
    "fifo": os.mkfifo,
    "endless": lambda path: path.symlink_to("/dev/zero"),
    "folder": Path.mkdir,
}


@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.parametrize(
    "name", ["metrics.jsonl", "sessions.jsonl", "recipe.toml", "config.json", ".lock", "LAST"]
)
def test_special_files_in_a_run_are_refused_in_one_line(run, name, kind):
    path = run.path / name
    path.unlink()
    SPECIAL[kind](path)
    if name == "LAST":  # is not read
        assert resume(run)[1] == []
        return
    with pytest.raises((ValueError, OSError)) as error:
        resume(run)
    assert str(path) in str(error.value)
    assert "expected a file" in str(error.value)


@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.parametrize(
    "name", ["manifest.json", "state.json", "model.safetensors", "optimizer.safetensors"]
)
def test_special_files_in_a_checkpoint_make_it_corrupt(run, name, kind):
    path = run.path / "checkpoints" / "step-00000005" / name
    path.unlink()
    SPECIAL[kind](path)
    opened, warnings = resume(run)
    assert opened.resumed.progress.step == 0
    assert len(warnings) == 1


def test_a_deleted_run_is_reported_as_such(run, tmp_path):
    with resume_run(run.path, warn=no_warning) as opened:
        shutil.rmtree(run.path)
        with pytest.raises(OSError, match=r"run: the run was deleted during training"):
            opened.append_metrics({"step": 1})


def test_resume_commands_are_quoted_for_the_shell(tmp_path, recipe):
    folder = tmp_path / "my runs" / "it's $HOME"
    with start_run(folder, recipe, recipe.spec()) as run:
        assert shlex.split(run.resume_command) == ["arm", "pretrain", "--resume", str(folder)]
        save_step(run, 0)
    with pytest.raises(ValueError, match="already contains a run") as error:
        start_run(folder, recipe, recipe.spec())
    assert resume_command("pretrain", folder) in str(error.value)


def test_data_paths_become_absolute(tmp_path, recipe, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = override(recipe, ["data.source=folder", "data.path=images", "data.eval_path=/val"])
    with start_run("run", recipe, recipe.spec()) as run:
        save_step(run, 0)
        assert run.recipe.data.path == str(tmp_path / "images")
        assert run.recipe.data.eval_path == "/val"
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    with resume_run("../run", warn=no_warning) as run:
        assert run.recipe.data.path == str(tmp_path / "images")
    with resume_run("../run", ["data.path=other"], warn=no_warning) as run:
        assert run.recipe.data.path == str(tmp_path / "elsewhere" / "other")
    stored = load_recipe(tmp_path / "run" / "recipe.toml")
    assert stored.data.path == str(tmp_path / "elsewhere" / "other")


def test_a_path_that_the_locale_cannot_represent_leaves_no_folder(tmp_path):
    code = (
        "import sys; from arm_core.recipe.recipe import load_recipe, override;"
        "from arm_core.training.run_folder import start_run;"
        "r = override(load_recipe('pretrain-digits'), ['data.source=folder', 'data.path=' + sys.argv[1]]);"
        "start_run(sys.argv[2], r, r.spec())"
    )
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code, "bilder-é", "new"],
        cwd=tmp_path,
        env={**environment, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert (
        "ValueError: path: a path with characters that this locale cannot represent; set LC_ALL=C.UTF-8"
        in (done.stderr)
    )
    assert not (tmp_path / "new").exists()
