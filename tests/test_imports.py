"""Import rules: the core loads no framework, and imports between folders point one way."""

import ast
import json
import pkgutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = {
    "arm_core": ROOT / "arm_core",
    "arm_mlx": ROOT / "backends/mlx/arm_mlx",
    "arm_cuda": ROOT / "backends/cuda/arm_cuda",
    "arm_convert": ROOT / "convert/arm_convert",
    "arm_vision": ROOT / "arm_vision",
    "arm_cli": ROOT / "cli/arm_cli",
}
MAY_IMPORT = {
    "arm_core": set(),
    # A backend's `load_model` calls that of the package, imported when it is called.
    "arm_mlx": {"arm_core", "arm_vision"},
    "arm_cuda": {"arm_core", "arm_vision"},
    "arm_convert": {"arm_core"},
    "arm_vision": {"arm_convert", "arm_core"},
    "arm_cli": {"arm_vision", "arm_convert", "arm_core"},
}
ROOMS = {
    "model": set(),
    "cpu_kernels": set(),
    "files": {"model"},
    "engine": {"model", "files"},
    "data": {"engine", "model", "files"},
    "recipe": {"data", "engine", "model", "files"},
    "training": {"recipe", "data", "engine", "model", "files"},
    "explain": {"cpu_kernels", "engine", "model"},
}
"""Rooms of arm_core, and the rooms that each may import."""
FRAMEWORKS = {"torch", "mlx", "triton", "mamba_ssm"}
HEAVY = {"numba", "pyarrow", "matplotlib", "huggingface_hub", "onnx", "onnxruntime"}
"""Packages that are slow to import; help texts must not load them."""


def modules(package: str) -> list[str]:
    found = pkgutil.walk_packages([str(FOLDERS[package])], prefix=f"{package}.")
    return [package, *(module.name for module in found)]


def loaded_after(fresh_python, code: str) -> set[str]:
    """Top-level names in `sys.modules` of a new interpreter that ran the code."""
    path = [str(folder.parent) for folder in FOLDERS.values()]
    out = fresh_python(
        f"import sys; sys.path[:0] = {path!r}\n{code}\n"
        "import json; print('\\n' + json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    )
    return set(json.loads(out.splitlines()[-1]))


def imports(file: Path) -> set[str]:
    """Top-level packages that a file imports anywhere, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(str(node.module).split(".")[0])
    return found


def rooms(file: Path) -> set[str]:
    """Rooms of arm_core that a file imports anywhere."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{name}" for name in names]
        found |= {name.split(".")[1] for name in names if name.startswith("arm_core.")}
    return found


@pytest.mark.parametrize("package", ["arm_core", "arm_convert", "arm_vision"])
def test_no_module_of_the_core_or_the_converters_loads_a_framework(fresh_python, package):
    loaded = loaded_after(fresh_python, f"import {', '.join(modules(package))}")
    assert package in loaded
    assert not loaded & (FRAMEWORKS | {"onnx", "onnxruntime"})


@pytest.mark.parametrize("package", ["arm_mlx", "arm_cuda"])
def test_a_backend_is_found_without_loading_its_framework(fresh_python, package):
    assert not loaded_after(fresh_python, f"from {package} import backend; backend.name") & FRAMEWORKS


def test_the_check_for_frameworks_can_fail(fresh_python):
    assert loaded_after(fresh_python, "import sys, types; sys.modules['torch.nn'] = types") & FRAMEWORKS


def test_no_help_text_loads_a_framework_or_anything_slow(fresh_python):
    loaded = loaded_after(
        fresh_python,
        """
import click
from click.testing import CliRunner
from arm_cli.main import main

def visit(command, words):
    result = CliRunner().invoke(main, [*words, "--help"])
    assert result.exit_code == 0, (words, result.output)
    assert result.output.startswith("Usage:"), result.output
    if isinstance(command, click.Group):
        for name in command.list_commands(None):
            visit(command.get_command(None, name), [*words, name])

visit(main, [])
""",
    )
    assert not loaded & (FRAMEWORKS | HEAVY)


@pytest.mark.parametrize("package", FOLDERS)
def test_imports_between_the_folders_point_one_way(package):
    files = list(FOLDERS[package].rglob("*.py"))
    assert files
    for file in files:
        others = (imports(file) & set(FOLDERS)) - {package}
        assert others <= MAY_IMPORT[package], f"{file} imports {others - MAY_IMPORT[package]}"


@pytest.mark.parametrize("room", ROOMS)
def test_imports_between_the_rooms_of_the_core_point_one_way(room):
    for file in (ROOT / "arm_core" / room).rglob("*.py"):
        others = rooms(file) - {room}
        assert others <= ROOMS[room], f"{file} imports {others - ROOMS[room]}"


def test_every_module_of_the_core_is_in_a_room():
    found = {path.name for path in (ROOT / "arm_core").iterdir() if path.name != "__pycache__"}
    assert found == {"__init__.py", "py.typed", *ROOMS}


def test_the_check_of_directions_sees_imports_inside_functions(tmp_path):
    file = tmp_path / "module.py"
    file.write_text(
        "def f():\n    import arm_mlx.scan\n    from arm_cuda import engine\n    from . import near\n"
    )
    assert imports(file) == {"arm_mlx", "arm_cuda"}


def test_the_wheel_holds_the_six_packages_and_nothing_else(tmp_path):
    pytest.importorskip("hatchling", reason="needs hatchling, part of the dev extra")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {*FOLDERS, "arm_vision-0.1.0.dist-info"}
    for package, folder in FOLDERS.items():
        shipped = {name for name in names if name.startswith(f"{package}/")}
        sources = [file for file in folder.rglob("*") if file.suffix in (".py", ".metal")]
        present = {str(file.relative_to(folder.parent)) for file in sources}
        assert present <= shipped


def test_the_check_of_rooms_sees_every_form_of_import(tmp_path):
    file = tmp_path / "module.py"
    file.write_text(
        "import arm_core.data.loader\nfrom arm_core import cpu_kernels\nfrom arm_core.files import bfloat16\n"
    )
    assert rooms(file) == {"data", "cpu_kernels", "files"}
