"""The Python blocks of the documentation run unchanged, in order and in one namespace."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from arm_core.engine.protocol import EngineOptions, TrainingState
from arm_core.engine.registry import installed_backends
from arm_core.files.model_folder import write_model
from arm_core.model.parameters import initial_parameters
from arm_core.model.spec import ClassifierSpec, EncoderSpec

DOCS = Path(__file__).parents[2] / "docs"

SPEC = ClassifierSpec(encoder=EncoderSpec(width=16, depth=1, patch=8), classes=2, image_size=(32, 32))


def blocks(name: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (DOCS / name).read_text("utf-8"), re.DOTALL)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Photos of two classes, and a classifier of them in place of a run."""
    for split in ("train", "val"):
        for i, name in enumerate(("cat", "dog")):
            (tmp_path / f"photos/{split}/{name}").mkdir(parents=True)
            pixels = np.full((40, 50, 3), 90 + 60 * i, np.uint8)
            Image.fromarray(pixels).save(tmp_path / f"photos/{split}/{name}/9.jpg")
    metadata = {"classes": json.dumps(["cat", "dog"])}
    (tmp_path / "runs").mkdir()
    write_model(tmp_path / "runs/cats-dogs", SPEC, initial_parameters(SPEC, 0), metadata=metadata)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(block: str, page: str, namespace: dict[str, object]) -> None:
    exec(compile(block, f"docs/{page}", "exec"), namespace)


def test_the_quickstart_runs(folder, capsys):
    torch_block, mlx_block = blocks("quickstart.md")
    for backend, block in (("torch", torch_block), ("mlx", mlx_block)):
        if installed_backends()[backend].missing() is None:
            run(block, "quickstart.md", {})
    assert set(eval(capsys.readouterr().out)) == {"cat", "dog"}


def test_the_page_on_models_in_python_runs(folder):
    pytest.importorskip("torch", reason="needs torch")
    pytest.importorskip("sklearn", reason="needs scikit-learn, part of the dev extra")
    import torchvision_stand_in

    torchvision_stand_in.install()
    pytest.importorskip("timm", reason="needs timm, part of the dev extra")
    found = blocks("library.md")
    assert len(found) >= 10
    namespace: dict[str, object] = {}
    for block in found:
        run(block, "library.md", namespace)


def test_the_example_of_influence_maps_runs():
    backend = next((b for b in installed_backends().values() if b.missing() is None), None)
    if backend is None:
        pytest.skip("needs an engine")
    state = TrainingState(parameters=initial_parameters(SPEC, 0))
    engine = backend.create_engine(SPEC, state, options=EngineOptions(device="cpu"))
    images = np.random.default_rng(0).standard_normal((2, 32, 32, 3)).astype(np.float32)
    (example,) = blocks("explain.md")
    namespace: dict[str, object] = {"engine": engine, "images": images, "row": 1, "column": 2}
    run(example, "explain.md", namespace)
    assert namespace["found"].maps.shape == (2, 1, 4, 17, 17)


def test_every_python_block_is_run_by_a_test():
    """Here, and in tests/convert/test_convert_docs.py and tests/export/test_docs.py."""
    pages = {page.name for page in DOCS.glob("*.md") if blocks(page.name)}
    assert pages == {"quickstart.md", "library.md", "explain.md", "convert.md", "export.md"}


def test_every_page_is_in_the_navigation_and_every_link_has_a_target():
    navigation = (DOCS.parent / "mkdocs.yml").read_text()
    for page in DOCS.glob("*.md"):
        assert f" {page.name}" in navigation, f"{page.name} is not in mkdocs.yml"
        text = re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.DOTALL)
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
            assert (DOCS / target).exists(), f"{page.name}: link to {target}"
