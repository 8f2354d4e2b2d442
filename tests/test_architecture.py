"""docs/architecture.md matches the tree."""

import re
from pathlib import Path

import pytest
from test_imports import MAY_IMPORT, ROOMS

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/architecture.md").read_text()
ONLY = re.findall(r"`arm_(mlx|cuda)/(\w+)`", PAGE)
"""Modules that the page says only one engine has."""


def modules(engine: str) -> set[str]:
    folder = ROOT / f"backends/{engine}/arm_{engine}"
    return {path.stem for path in folder.iterdir() if path.stem not in ("__init__", "__pycache__")}


def test_every_room_and_package_has_its_line():
    assert {name for name in ROOMS if f"| `{name}` |" in PAGE} == set(ROOMS)
    assert {name for name in MAY_IMPORT if re.search(rf"^\| `[\w/]*{name}/` \|", PAGE, re.M)} == set(
        MAY_IMPORT
    )


def test_every_path_on_the_page_exists():
    for path in re.findall(
        r"`((?:arm_core|backends|convert|cli|tests|docs|arm_vision|benchmarks)/[\w./]*)`", PAGE
    ):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("engine", ["mlx", "cuda"])
def test_modules_of_one_engine_are_those_of_the_other_and_those_that_the_page_names(engine):
    shared = modules("mlx") & modules("cuda")
    own = {name for other, name in ONLY if other == engine}
    assert modules(engine) - shared == own
    listed = set(re.findall(r"`(\w+)`", "\n".join(re.findall(r"^\| (`\w+`(?:, `\w+`)*) \|", PAGE, re.M))))
    assert shared <= listed


@pytest.mark.parametrize("folder", ["arm_core", "arm_vision", "backends", "cli", "convert"])
def test_no_module_has_more_than_350_lines(folder):
    long = {
        str(path.relative_to(ROOT)): lines
        for path in (ROOT / folder).rglob("*.py")
        if (lines := len(path.read_text().splitlines())) > 350
    }
    assert not long
