"""The MLX engine: refusals, and the choice of its BLAS."""

import ctypes.util
import logging
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from arm_core import cpu_kernels
from arm_core.engine.optimizer import OptimizerSettings
from arm_core.engine.protocol import Batch, EngineOptions, TrainingState
from arm_core.model.parameters import initial_parameters
from arm_core.model.spec import (
    ClassifierSpec,
    ModelSpec,
    PretrainSpec,
)
from arm_mlx import backend, blas

mx = pytest.importorskip("mlx.core", reason="needs MLX")

from arm_mlx import engine as engines  # noqa: E402


def make(spec: ModelSpec, *, optimizer: OptimizerSettings | None = None, **options: Any) -> engines.MlxEngine:
    state = TrainingState(parameters=initial_parameters(spec, 3))
    return backend.create_engine(spec, state, optimizer=optimizer, options=EngineOptions(**options))


def batch(spec: ModelSpec, images: int = 4, seed: int = 0) -> Batch:
    rng = np.random.default_rng(seed)
    pixels = rng.standard_normal((images, *spec.image_size, 3)).astype(np.float32)
    if isinstance(spec, PretrainSpec):
        return Batch(images=pixels)
    return Batch(images=pixels, targets=rng.dirichlet(np.ones(spec.classes), images).astype(np.float32))


# refusals


def test_auto_decides_once_and_is_never_recorded(pretrain_spec: PretrainSpec) -> None:
    engine = make(pretrain_spec, device="cpu")
    assert (engine.scan, engine.device) == ("cpu", "CPU")


def test_mistaken_options_are_refused_in_one_line(pretrain_spec: PretrainSpec) -> None:
    with pytest.raises(ValueError, match="expected auto, cpu or gpu, found 'cuda'"):
        make(pretrain_spec, device="cuda")
    with pytest.raises(
        ValueError, match="unknown scan 'fast' for this backend; expected auto, metal, cpu, reference"
    ):
        make(pretrain_spec, device="cpu", scan="fast")
    if not mx.metal.is_available():
        with pytest.raises(ValueError, match="device 'gpu' is not available: MLX finds no Metal GPU"):
            make(pretrain_spec, device="gpu")


def test_a_classifier_refuses_to_train_without_targets(classifier_spec: ClassifierSpec) -> None:
    with pytest.raises(ValueError, match=r"batches with targets \(B, classes\), found None"):
        make(classifier_spec).loss_and_gradients(Batch(images=batch(classifier_spec).images))


# the choice of the BLAS, and missing parts


def test_without_mlx_the_backend_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert backend.missing() is None
    module = sys.modules["arm_mlx.backend"]
    bindings = ModuleSpec("mlx", None, is_package=True)
    bindings.submodule_search_locations = [str(tmp_path)]
    for found, sentence in (
        (None, "MLX is not installed"),
        (bindings, "MLX is installed without its library"),
    ):
        monkeypatch.setattr(module, "find_spec", lambda name, found=found: found)
        monkeypatch.setattr(sys, "platform", "linux")
        reason = backend.missing()
        assert reason is not None
        assert reason.startswith(sentence)
        assert reason.endswith("pip install 'arm-vision[mlx]'")


on_linux = pytest.mark.skipif(
    sys.platform != "linux", reason="needs Linux: a Mac's products run on Accelerate"
)

PRODUCT = """
import numpy as np
from arm_mlx import backend, blas
devices = backend.devices()
import mlx.core as mx
a, b = (np.random.default_rng(i).standard_normal((70, 70)).astype(np.float32) for i in range(2))
error = np.abs(np.array(mx.array(a) @ mx.array(b)) - a @ b).max()
maps = open("/proc/self/maps").read()
print(blas.load().library, blas.load().advice, devices, error < 1e-4, "openblas" in maps, sep="|")
"""


@on_linux
def test_openblas_is_loaded_before_mlx_if_the_system_has_it(fresh_python: Callable[[str], str]) -> None:
    library, advice, _, right, mapped = fresh_python(PRODUCT).strip().split("|")
    assert right == "True"
    if name := ctypes.util.find_library("openblas"):
        assert (library, advice, mapped) == (f"OpenBLAS ({name})", "None", "True")
    else:
        assert (library, advice) == (blas.BUNDLED, blas.INSTALL)


@on_linux
def test_without_openblas_products_work_and_the_advice_says_what_to_install(
    fresh_python: Callable[[str], str],
) -> None:
    hidden = "import ctypes.util; ctypes.util.find_library = lambda name: None\n"
    library, advice, _, right, _ = fresh_python(hidden + PRODUCT).strip().split("|")
    assert (library, advice, right) == (blas.BUNDLED, blas.INSTALL, "True")


@on_linux
def test_mlx_imported_first_is_reported(fresh_python: Callable[[str], str]) -> None:
    library, advice, *_ = fresh_python("import mlx.core\n" + PRODUCT).strip().split("|")
    assert library == blas.BUNDLED
    assert "import arm_mlx first" in advice


def test_threads_reach_the_scan_and_the_products(
    pretrain_spec: PretrainSpec, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked: list[tuple[str, int]] = []
    monkeypatch.setattr(cpu_kernels, "set_threads", lambda n: asked.append(("scan", n)))
    monkeypatch.setattr(blas, "set_threads", lambda n: asked.append(("products", n)) or True)
    make(pretrain_spec, threads=2)
    assert asked == [("scan", 2), ("products", 2)]
    assert not caplog.records

    monkeypatch.setattr(blas, "set_threads", lambda n: False)
    with caplog.at_level(logging.WARNING, "arm_mlx"):
        make(pretrain_spec, threads=2)
    assert "threads=2 applies to the CPU kernels only" in caplog.text
