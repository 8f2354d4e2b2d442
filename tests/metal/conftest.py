"""Runs the kernels on an Apple GPU, or in the emulator if there is none."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for pytest's other import modes


@pytest.fixture
def emulator(monkeypatch: pytest.MonkeyPatch) -> Any:
    """An `Emulator` in place of Metal. Skips the test if it cannot run."""
    if importlib.util.find_spec("mlx") is None:
        pytest.skip("needs MLX")
    from emulator import Emulator, missing

    from arm_mlx.metal import launch

    if reason := missing():
        pytest.skip(reason)
    emulator = Emulator()
    monkeypatch.setattr(launch, "execute", emulator.execute)
    return emulator


@pytest.fixture
def metal(request: pytest.FixtureRequest) -> Any:
    """None if the kernels run on an Apple GPU, else an `Emulator` in its place."""
    if importlib.util.find_spec("mlx") is None:
        pytest.skip("needs MLX")
    import mlx.core as mx

    return None if mx.metal.is_available() else request.getfixturevalue("emulator")
