"""The Triton kernels on an NVIDIA GPU if there is one, else in Triton's interpreter on the CPU.

Triton selects one of the two when it is imported. Therefore this file requests the interpreter before any
test module is imported, and then removes the request, so that no other test and no child process sees it.
"""

import importlib.util
import os
import sys
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import pytest


def _missing() -> str | None:
    """The reason why the kernels cannot run at all."""
    for name in ("torch", "triton"):
        if importlib.util.find_spec(name) is None:
            return f"{name} is not installed"
    return None


def _load_interpreted_kernels() -> None:
    assert "triton" not in sys.modules, "Triton was imported before its interpreter could be requested"
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        from arm_cuda.triton import operators

        _read_one_element_arrays()
        one = torch.ones(1, 1, 1)  # the first launch imports the rest of Triton
        operators.directional_conv(one, one, one[0], torch.zeros(1, 1, dtype=torch.int32))
    finally:
        if before is None:
            del os.environ["TRITON_INTERPRET"]
        else:
            os.environ["TRITON_INTERPRET"] = before


def _read_one_element_arrays() -> None:
    """Triton 3.6's interpreter converts arrays of one element with int(), which NumPy 2.4 refuses."""
    from triton.runtime import interpreter

    if version("triton").startswith("3.6."):
        patch = interpreter._patch_lang_tensor

        def patched(tensor: Any, scope: Any) -> None:
            patch(tensor, scope)
            scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

        interpreter._patch_lang_tensor = patched


REASON = _missing()
if REASON is None:
    import torch

    if not torch.cuda.is_available():
        _load_interpreted_kernels()


def pytest_configure(config: pytest.Config) -> None:
    # From the float64 loop on a GPU, while unwritten memory is NaN.
    config.addinivalue_line("filterwarnings", "ignore:.*deterministic:UserWarning")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests with the fixture `device` run the kernels."""
    for item in items:
        if REASON and "device" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.skip(reason=f"needs Triton and torch: {REASON}"))


@pytest.fixture(scope="session")
def device() -> str:
    """Where the kernels run: `cuda`, or `cpu` for the interpreter."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def unwritten_is_nan() -> Iterator[None]:
    """New memory is NaN, so that an unwritten element is detected."""
    import torch

    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(1).isnan().all()
    assert torch.ones(1).new_empty((1,)).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def short_chunks(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that are not about the kernels: the interpreter executes every step of a chunk."""
    from arm_cuda.triton import launch

    if device == "cpu":
        monkeypatch.setattr(launch, "CHUNK", 4)
