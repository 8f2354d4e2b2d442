"""Shared fixtures: two small models, a fresh interpreter, and skips that name the hardware."""

import importlib.util
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache

import pytest

from arm_core.model.spec import ClassifierSpec, EncoderSpec, PretrainSpec

# The first run of a checkout compiles the kernels in the middle of other output, which tests compare.
logging.getLogger("arm_core.cpu_kernels").setLevel(logging.ERROR)

TINY = EncoderSpec(width=32, depth=6, patch=4)


@cache
def _no_metal() -> str | None:
    if importlib.util.find_spec("mlx") is None:
        return "needs an Apple GPU and MLX; MLX is not installed"
    import mlx.core as mx

    return None if mx.metal.is_available() else "needs an Apple GPU: MLX finds no Metal device here"


@cache
def _no_nvidia() -> str | None:
    if importlib.util.find_spec("torch") is None:
        return "needs an NVIDIA GPU and torch; torch is not installed"
    import torch

    return None if torch.cuda.is_available() else "needs an NVIDIA GPU: torch finds no CUDA device here"


HARDWARE: dict[str, Callable[[], str | None]] = {"metal": _no_metal, "gpu": _no_nvidia}
"""Markers of tests that need a device, and the reason why it is not available."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for marker, missing in HARDWARE.items():
            if item.get_closest_marker(marker) and (reason := missing()):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def pretrain_spec() -> PretrainSpec:
    """Nine clusters as in the paper, of 2x2 patches: 36 patches, 32 tokens."""
    return PretrainSpec(
        encoder=TINY,
        image_size=(24, 24),
        cluster=(2, 2),
        decoder_width=16,
        decoder_depth=2,
        decoder_heads=2,
    )


@pytest.fixture
def classifier_spec() -> ClassifierSpec:
    """Ten classes, four directions, 36 patches and the class token."""
    return ClassifierSpec(encoder=TINY, classes=10, image_size=(24, 24))


def _run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="session")
def fresh_python() -> Callable[[str], str]:
    """Run code in a new interpreter and return its output."""
    return _run


@pytest.fixture(scope="module")
def one_torch_thread() -> Iterator[None]:
    """Models this small run faster on one thread, and several times faster on a busy machine."""
    if importlib.util.find_spec("torch") is None:
        yield
        return
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
