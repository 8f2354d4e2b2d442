"""The registry of hostile files: a case builds files in a folder and names the `arm` command to run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import foreign

from arm_core.files.model_folder import write_model
from arm_core.model.parameters import initial_parameters

Words = list[str]
CASES: dict[str, Callable[[Path], Words]] = {}


def case(make: Callable[[Path], Words]) -> Callable[[Path], Words]:
    CASES[make.__name__] = make
    return make


def variants(name: str, options: dict[str, object]) -> Callable[[Callable], Callable]:
    """One case for each option, which is passed to the function after the folder."""

    def add(make: Callable[[Path, object], Words]) -> Callable[[Path, object], Words]:
        for key, value in options.items():
            CASES[f"{name} {key}"] = lambda folder, value=value: make(folder, value)
        return make

    return add


def importing(path: Path) -> Words:
    return ["convert", "import", str(path), str(path.parent / "out")]


def model_folder(folder: Path, **metadata: str) -> Path:
    values = initial_parameters(foreign.CLASSIFIER, 0)
    return write_model(folder / "m", foreign.CLASSIFIER, values, metadata=metadata)
