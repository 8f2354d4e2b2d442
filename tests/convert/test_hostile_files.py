"""Hostile files end in one printable line within bounded memory and time; terminals are not controlled."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import foreign
import hostile
import numpy as np
import pytest
from PIL import Image

from arm_core.files.model_folder import write_model
from arm_core.model.parameters import initial_parameters

ROOT = Path(__file__).parents[2]
PATHS = [".", "tests", "backends/mlx", "backends/cuda", "convert", "cli"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(str(ROOT / path) for path in PATHS)}
NAMES = [name for name in hostile.CASES if os.environ.get("ARM_LONG_TESTS") or name not in hostile.LONG]


@pytest.fixture(scope="module")
def outcomes() -> dict[str, list[str]]:
    """Problem, cost and output of each case. The cases fork, so they run in a process without threads."""
    words = [sys.executable, str(ROOT / "tests/hostile.py"), *NAMES]
    done = subprocess.run(words, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    return {name: rest for name, *rest in rows}


@pytest.mark.parametrize("name", NAMES)
def test_a_hostile_file_ends_in_one_line_within_bounded_memory_and_time(outcomes, name):
    problem, cost, output = outcomes[name]
    assert problem is None, f"{cost}: {output}"


@pytest.mark.parametrize(
    ("program", "problem"),
    [
        ("x = bytearray(900 * 2**20)", "MiB of memory"),
        ("x = bytearray(9 * 2**30)", "a traceback"),
        ("import os; os.kill(os.getpid(), 9)", "exit code -9"),
        ("print('Error: a'); print('b'); raise SystemExit(2)", "not one line"),
        ("print('a' * 30000)", "output of 30001 characters"),
        ("print(chr(27) + '[2J')", "control characters in the output"),
    ],
)
def test_the_limits_detect_violations(tmp_path, program, problem):
    harness = (
        "import hostile, pathlib\n"
        f"hostile.arm = lambda *_, **__: exec({program!r})\n"
        f"print(hostile._run([], pathlib.Path({str(tmp_path / 'output')!r})).problem)\n"
    )
    words = [sys.executable, "-c", harness]
    done = subprocess.run(words, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=100)
    assert problem in done.stdout, done.stdout + done.stderr


# -- terminals -----------------------------------------------------------------------------------------

ESCAPES = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202e"


def on_a_terminal(*words: object) -> str:
    """The output of `arm` on a pseudo-terminal."""
    reader, writer = pty.openpty()
    program = "from arm_cli.main import main; main(prog_name='arm')"
    arguments = [sys.executable, "-c", program, *map(str, words)]
    with subprocess.Popen(arguments, env=ENVIRONMENT, stdin=writer, stdout=writer, stderr=writer) as child:
        os.close(writer)
        written = b""
        while True:
            try:
                data = os.read(reader, 65536)
            except OSError:  # the last writer has closed the terminal
                break
            if not data:
                break
            written += data
        child.wait(timeout=100)
    os.close(reader)
    return written.decode(errors="replace")


@pytest.fixture(scope="module")
def hostile_model(tmp_path_factory) -> Path:
    """A model folder whose name, class names and metadata hold escape sequences."""
    metadata = {
        "classes": json.dumps([f"{i}{ESCAPES}" for i in range(3)]),
        "history": json.dumps([ESCAPES]),
        f"key{ESCAPES}": ESCAPES,
    }
    folder = tmp_path_factory.mktemp("escapes") / f"m{ESCAPES.replace('/', '')}"
    values = initial_parameters(foreign.CLASSIFIER, 0)
    return write_model(folder, foreign.CLASSIFIER, values, metadata=metadata)


COMMANDS = {
    "info": ("info",),
    "inspect": ("convert", "inspect"),
    "inspect as JSON": ("convert", "inspect", "--json"),
    "import": ("convert", "import"),
    "predict": ("predict", "--device", "cpu"),
    "an error": ("convert", "import", "--kind", "pretrain"),
    "a missing file": ("info",),
    "an unknown command": (),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_escape_sequences_of_files_do_not_reach_the_terminal(hostile_model, tmp_path, name):
    model: Path = hostile_model
    words = [*COMMANDS[name], model]
    if name in ("import", "an error"):
        words.append(tmp_path / "out")
    if name == "a missing file":
        words[-1] = model / "missing"
    if name == "predict":
        image = tmp_path / f"{ESCAPES}.png"
        Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(image)
        words.append(image)
    written = on_a_terminal(*words)
    assert "owned" in written
    assert "Traceback" not in written
    for sequence in ("\x1b]", "\x07", "\x1b[2J", "\x9b", "\u202e"):
        assert sequence not in written


def test_escape_sequences_do_not_reach_the_model_card(hostile_model, tmp_path):
    on_a_terminal("convert", "cast", hostile_model, tmp_path / "out", "--dtype", "float32")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "owned" in card
    assert not [c for c in card if not c.isprintable() and c != "\n"]
