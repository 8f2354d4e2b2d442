"""Files of `arm_cuda.program`: compiled by AOTInductor, and opened again."""

from __future__ import annotations

import json
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from arm_core.engine.protocol import Array
from arm_core.model.spec import from_json
from arm_cuda import cpu_operators  # registers them  # noqa: F401

SPEC, OUTPUTS = "spec", "outputs"
"""Names of the metadata: the content of `config.json`, and the names of the outputs."""

_COMPILED = "/data/aotinductor/"
"""Part of the names in a package of AOTInductor."""


def require_compiler() -> None:
    """Raise a ValueError if AOTInductor finds no C++ compiler."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        raise ValueError(
            "AOTInductor needs a C++ compiler and found none; install g++ or clang++, or set CXX"
        ) from None


def compile_program(program: torch.export.ExportedProgram, path: Path, strings: dict[str, str]) -> None:
    """Write a program as a package of AOTInductor: machine code with the weights.

    strings: metadata.
    """
    from torch._inductor import aoti_compile_and_package

    with tempfile.TemporaryDirectory() as folder:
        package = str(Path(folder) / "model.pt2")  # AOTInductor wants this suffix
        configs = {"aot_inductor.metadata": strings}
        aoti_compile_and_package(program, package_path=package, inductor_configs=configs)
        path.write_bytes(Path(package).read_bytes())


class ProgramFile:
    """A .pt2 file of `write_program`, opened as `arm_convert.exported.ExportedFile`.

    Raises ValueError for a file that torch cannot load, or that `arm export` did not write.
    """

    raw_pixels = False
    precision = "float32"

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise ValueError(f"{path}: no such file")
        began = time.perf_counter()
        self.compiled = _is_compiled(path)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch's own deprecations
                self._module, strings = (_load_compiled if self.compiled else _load)(path)
        except Exception as error:  # whatever a damaged archive raises
            what = "AOTInductor" if self.compiled else "torch.export"
            raise ValueError(f"{path}: {what} cannot load this file ({error})") from error
        if not strings.get(SPEC):
            raise ValueError(f"{path}: holds no model specification; expected a file of `arm export`")
        self.path = path
        self.spec = from_json(json.loads(strings[SPEC]))
        self.outputs: tuple[str, ...] = tuple(json.loads(strings[OUTPUTS]))
        seconds = time.perf_counter() - began
        self.facts: dict[str, Any] = {"bytes": path.stat().st_size, "load_seconds": seconds}

    def run(self, images: npt.NDArray[Any]) -> dict[str, Array]:
        """images: (B, H, W, 3), normalised float32."""
        pixels = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
        with torch.no_grad():
            results = self._module(pixels)
        return {name: result.numpy() for name, result in zip(self.outputs, results, strict=True)}


def _is_compiled(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any(_COMPILED in name for name in archive.namelist())
    except zipfile.BadZipFile:
        return False


def _load(path: Path) -> tuple[Callable[..., Any], dict[str, Any]]:
    strings: dict[str, Any] = {SPEC: "", OUTPUTS: ""}
    with path.open("rb") as file:
        return torch.export.load(file, extra_files=strings).module(), strings


def _load_compiled(path: Path) -> tuple[Callable[..., Any], dict[str, Any]]:
    from torch._inductor import aoti_load_package

    module = aoti_load_package(str(path))
    return module, module.get_metadata()
