"""Special files, links and junk in the places where models, arrays and runs are read."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import foreign
from hostile_cases import Words, case, importing, model_folder, variants

from arm_core.engine.protocol import TrainingState
from arm_core.model.parameters import initial_parameters
from arm_core.training.checkpoint import Checkpoint, Progress, save_checkpoint

# -- special files and links ---------------------------------------------------------------------------

CHECKPOINT_FILES = ("manifest.json", "state.json", "ema.safetensors")
RUN_FILES = ("metrics.jsonl", "recipe.toml", *CHECKPOINT_FILES)

SPECIAL: dict[str, Callable[[Path], None]] = {
    "a named pipe": os.mkfifo,
    "an endless device": lambda path: path.symlink_to("/dev/zero"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a folder": lambda path: path.mkdir(),
    "a sparse terabyte": lambda path: path.touch() or os.truncate(path, 2**40),
}


@variants(
    "special",
    {
        f"{place} is {kind}": (place, make)
        for place in ("config.json", "model.safetensors", "model.safetensors.index.json")
        for kind, make in SPECIAL.items()
    },
)
def a_special_file_in_a_model_folder(folder: Path, option) -> Words:
    place, make = option
    path = model_folder(folder) / place
    path.unlink(missing_ok=True)
    make(path)
    if place.endswith("index.json"):
        (folder / "m" / "model.safetensors").unlink()
    return ["info", str(folder / "m")]


@variants("special source", SPECIAL)
def a_special_file_as_a_checkpoint(folder: Path, make) -> Words:
    make(folder / "x.pth")
    return importing(folder / "x.pth")


@variants("special array", SPECIAL)
def a_special_file_as_an_array(folder: Path, make) -> Words:
    make(folder / "x.npy")
    model = model_folder(folder)
    return ["embed", str(model), "--array", str(folder / "x.npy"), "--out", str(folder / "o.npz")]


@case
def an_array_that_claims_terabytes(folder: Path) -> Words:
    text = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000, 3, 16, 16), }\n"
    (folder / "x.npy").write_bytes(b"\x93NUMPY\1\0" + len(text).to_bytes(2, "little") + text)
    return [
        "embed",
        str(model_folder(folder)),
        "--array",
        str(folder / "x.npy"),
        "--out",
        str(folder / "o.npz"),
    ]


# -- runs ----------------------------------------------------------------------------------------------


def _a_run(folder: Path) -> Path:
    values = initial_parameters(foreign.CLASSIFIER, 0)
    state = TrainingState(parameters=values, exp_avg=values, exp_avg_sq=values)
    progress = Progress(step=4, position=4, recipe="", engine={})
    (folder / "run").mkdir()
    save_checkpoint(folder / "run", Checkpoint(spec=foreign.CLASSIFIER, progress=progress, state=state))
    return folder / "run"


@variants("special in a run", {f"{p} is {k}": (p, m) for p in RUN_FILES for k, m in SPECIAL.items()})
def a_special_file_in_a_run(folder: Path, option) -> Words:
    place, make = option
    run = _a_run(folder)
    path = run / place if place not in CHECKPOINT_FILES else run / "checkpoints/step-00000004" / place
    path.unlink(missing_ok=True)
    make(path)
    return importing(run)


@variants(
    "metrics of",
    {
        "a list": "[]\n",
        "a number": "5\n",
        "a step of text": '{"step": "4", "eval_loss": 1}\n',
        "a loss of text": '{"step": 4, "eval_loss": "x\\u001b[2J"}\n',
        "deep lists": "[" * 10**6 + "\n",
        "a step of many digits": '{"step": ' + "9" * 4000 + "}\n",
        "bytes that are not text": "\udcff\udcfe\n",
        "millions of rows": '{"step": 1}\n' * 1_000_000,
    },
)
def odd_metrics(folder: Path, text) -> Words:
    run = _a_run(folder)
    (run / "metrics.jsonl").write_bytes(text.encode(errors="surrogateescape"))
    return importing(run)


@case
def junk_among_the_checkpoints(folder: Path) -> Words:
    run = _a_run(folder)
    for name in ("step-", "step-00000009", "step-99999999999999999999", "step-00000005.tmp", "x", "step-1"):
        (run / "checkpoints" / name).mkdir()
    (run / "checkpoints" / "step-00000008").symlink_to(".")
    os.mkfifo(run / "checkpoints" / "step-00000007")
    return ["info", str(run)]
