"""The commands of README and docs run in order, on small models and recipes.

Every indented block is classified: shell commands run here or have a reason in `NOT_RUN`, Python runs, and
other text is listed in `TEXT`.
"""

from __future__ import annotations

import re
import shlex
import shutil
import textwrap
import warnings
from importlib.util import find_spec
from pathlib import Path

import foreign
import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from arm_cli.main import main
from arm_convert.browser import runtime
from arm_core.data.digits import Digits
from arm_core.engine.registry import installed_backends
from arm_core.files.model_folder import write_model
from arm_core.model.parameters import initial_parameters
from arm_core.model.spec import ClassifierSpec, EncoderSpec

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md")])

NOT_RUN = {
    "make": "builds an environment or downloads onnxruntime-web",
    "pip install": "installs packages",
    ".venv/bin/pre-commit": "changes the hooks of the repository",
    "torchrun": "8 processes; tests/torch_engine/test_distributed.py runs torchrun with 2 and 3",
    "mlx.launch": "needs MLX's launcher; tests/mlx_engine/test_mlx_ranks.py runs it",
    "arm sweep": "trains many models; tests/cli/test_cli_sweep.py runs small ones",
    "arm evaluate MODEL --data VAL --data imagenet-real": "needs variants of ImageNet; "
    "tests/cli/test_cli_robustness.py runs small ones",
    "arm models": "needs a network; tests/library/test_published.py runs it with a local hub",
    "arm pull": "needs a network; tests/library/test_published.py runs it with a local hub",
    "arm convert push": "needs a network; tests/convert/test_convert_hub.py runs it with a local hub",
    "arm convert import hf://": "needs a network; tests/convert/test_convert_hub.py runs it with a local hub",
    "arm convert import checkpoint-1600.pth runs/official": "tests/convert/test_convert_run.py imports one",
    "arm export MODEL compiled.pt2 --compile": "compiles for a minute; tests/export/test_program.py runs it",
    "arm pretrain --resume runs/official": "trains for days; tests/convert/test_convert_run.py resumes one",
}  # fmt: skip
"""Commands that are not run, by their first words, and why."""

OPTIONAL = {"arm export": "onnxruntime", "--log tensorboard": "tensorboard"}
"""Parts of commands, and the optional packages that they need."""

TEXT = ("photos/", "options:", "u   = ", "o_t = ", "I_k[")
"""First words of blocks that are neither shell nor Python: folders, options of the page, formulas."""

SHORT = {
    "pretrain": ["--steps", "1", "--batch-size", "4", "--workers", "0", "--device", "cpu"],
    "finetune": ["--steps", "1", "--batch-size", "4", "--workers", "0", "--device", "cpu",
                 "--set", "optimizer.ema_decay=0.9"],
    "sweep": ["--steps", "1", "--batch-size", "4", "--workers", "0", "--device", "cpu"],
    "bench": ["--model", "digits", "--batch-size", "1", "--repeats", "1", "--device", "cpu"],
    "export": ["--threads", "1", "--runtime", "runtime", "--force"],
}  # fmt: skip
"""Options that make a command cheap."""

ENCODER = EncoderSpec(width=64, depth=2, patch=4)
CLASSIFIER = ClassifierSpec(encoder=ENCODER, classes=10, image_size=(24, 24))

STAND_INS = {
    "README.md": {"CHECKPOINT.pth": "checkpoint.pth"},
    "explain.md": {"MODEL": "PRETRAINED", "DIR": "IMAGES"},
    "convert.md": {"MODEL": "CLASSIFIER"},
    "export.md": {"MODEL": "CLASSIFIER"},
}
"""Names of a page and the files that are used for them."""


FIRST = {
    "training.md": [
        "arm finetune tiny --data TRAIN --out RUN2",
        "arm pretrain tiny --data IMAGES --out runs/a",
    ],
}
"""Commands before those of a page: runs that it names before it makes them."""


def blocks_of(page: Path) -> list[str]:
    """The indented blocks of a page outside of fences."""
    text = re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    return [textwrap.dedent(found).strip() for found in re.findall(r"(?:^(?: {4}.*)?\n)+", text, re.MULTILINE)
            if found.strip()]  # fmt: skip


def is_python(command: str) -> bool:
    return command.startswith("import ")


def commands_of(page: Path) -> list[str]:
    """Shell commands and Python blocks in order, without the explanations beside them."""
    found: list[str] = []
    for block in blocks_of(page):
        shell, *python = re.split(r"^(?=import )", block, maxsplit=1, flags=re.MULTILINE)
        if not block.startswith(TEXT):
            found += [re.split(r"\s{2,}", line)[0] for line in shell.splitlines() if line.strip()]
        found += python
    return found


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """Digits under every name of a folder of images, models, a checkpoint, and the files of a runtime."""
    folder = tmp_path_factory.mktemp("template")
    source = Digits("train", size=(24, 24), labels_per_class=2)
    for index in range(len(source)):
        item = source.item(index)
        for name in ("IMAGES", "TRAIN", "VAL", "photos/train", "photos/val"):
            target = folder / name / source.classes[item.label]
            target.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.asarray(item.image)).save(target / f"{index}.jpg")
    (folder / "IMAGE").mkdir()
    for name in ("IMAGE/0.png", "cat.jpg"):
        Image.fromarray(np.asarray(source.item(0).image)).save(folder / name)
    write_model(folder / "PRETRAINED", foreign.PRETRAIN, initial_parameters(foreign.PRETRAIN, 0))
    for name in ("CLASSIFIER", "A", "B", "C"):
        write_model(folder / name, CLASSIFIER, initial_parameters(CLASSIFIER, 0))
    official = foreign.torch_zip(foreign.checkpoint(foreign.PRETRAIN, 1))
    for name in ("checkpoint-1600.pth", "checkpoint.pth"):
        foreign.save(folder / name, official)
    (folder / "runtime").mkdir()
    (folder / "runtime" / runtime.SCRIPT).write_text("export const fake = 1;")
    (folder / "runtime" / runtime.WASM).write_bytes(b"\0asm")
    return folder


def words_of(command: str, page: str, number: int) -> list[str]:
    """The words of an `arm` command with stand-ins, and the options that make it cheap."""
    names = {"IMAGE...": "IMAGE", "OUT": f"OUT-{number}", **STAND_INS.get(page, {})}
    words = [names.get(word, word).split("|")[0] for word in shlex.split(command)[1:]]
    if words[0] in ("pretrain", "finetune"):
        words[1] = {"tiny": "digits", "base": "digits"}.get(words[1], words[1])
    if words[0] in ("pretrain", "finetune") and "--out" in words:
        shutil.rmtree(words[words.index("--out") + 1], ignore_errors=True)  # a page shows alternatives
    return words if {"--resume", "--estimate"} & set(words) else words + SHORT.get(words[0], [])


@pytest.mark.parametrize("page", [page for page in PAGES if commands_of(page)], ids=lambda page: page.name)
def test_the_commands_of_a_page_run_in_order(page, template, tmp_path, monkeypatch):
    shutil.copytree(template, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    for number, command in enumerate([*FIRST.get(page.name, []), *commands_of(page)]):
        if command.startswith(tuple(NOT_RUN)):
            continue
        if is_python(command):
            if installed_backends()["torch"].missing() is None:
                exec(compile(command, str(page), "exec"), {})
            continue
        assert command.startswith("arm "), f"{page.name}: {command}: not an arm command; see NOT_RUN and TEXT"
        if any(part in command and find_spec(name) is None for part, name in OPTIONAL.items()):
            continue
        words = words_of(command, page.name, number)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # those of torch.export
            result = CliRunner().invoke(main, words)
        assert result.exit_code == 0, (command, words, result.output, result.exception)


def test_every_reason_is_needed():
    commands = [command for page in PAGES for command in commands_of(page)]
    for start in NOT_RUN:
        assert any(command.startswith(start) for command in commands), f"no page has {start}"
    assert sum(command.startswith("arm ") for command in commands) > 60


def test_blocks_are_found_outside_of_fences(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "Text\n\n    arm info base      its parts\n    arm doctor\n\n    import arm_vision  # Python\n\n"
        "Text\n\n```python\n    arm x\n```\n\n    u   = silu(x)\n    v\n"
    )
    assert commands_of(page) == ["arm info base", "arm doctor", "import arm_vision  # Python"]
