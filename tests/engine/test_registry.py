"""Finding a backend by name: aliases, `auto`, and the messages."""

from collections.abc import Mapping

import pytest

from arm_core.engine import registry
from arm_core.engine.protocol import EngineOptions
from arm_core.engine.registry import choose_backend, installed_backends, preferred_order


class Fake:
    """A backend that only records the requested device."""

    def __init__(self, name: str, *devices: str, missing: str | None = None) -> None:
        self.name, self._devices, self._missing = name, list(devices), missing
        self.asked: list[str] = []

    def missing(self) -> str | None:
        return self._missing

    def devices(self) -> list[str]:
        return self._devices

    def version(self) -> str:
        return f"{self.name} 1.0"

    def scans(self, device: str) -> Mapping[str, str | None]:
        self.asked.append(device)
        return {"reference": None}

    def join(self, device: str) -> None:
        self.asked.append(device)

    def create_engine(self, spec: object, parameters: object, *, options: EngineOptions, **others: object):
        self.asked.append(options.device)
        return "engine"


class Point:
    """An entry point, under any name that an older installation registered."""

    def __init__(self, name: str, backend: Fake) -> None:
        self.name, self._backend = name, backend

    def load(self) -> Fake:
        return self._backend


@pytest.fixture
def register(monkeypatch: pytest.MonkeyPatch):
    def install(*backends: Fake) -> None:
        monkeypatch.setattr(registry, "entry_points", lambda group: [Point("any", b) for b in backends])

    return install


def test_backends_have_their_own_name_and_not_that_of_the_entry_point(register):
    torch, mlx = Fake("torch", "cpu"), Fake("mlx", "cpu")
    register(mlx, torch)
    assert installed_backends() == {"mlx": mlx, "torch": torch}
    assert choose_backend("torch") is torch


def test_cuda_is_the_torch_engine_on_an_nvidia_gpu(register):
    torch = Fake("torch", "cuda:0", "cuda:1", "cpu")
    register(torch)
    chosen = choose_backend("cuda")
    assert (chosen.name, chosen.version()) == ("torch", "torch 1.0")
    assert chosen.devices() == ["cuda:0", "cuda:1"]
    chosen.join("auto")
    chosen.create_engine(None, {})
    chosen.create_engine(None, {}, options=EngineOptions(device="cuda:1"))
    assert torch.asked == ["cuda", "cuda", "cuda:1"]


def test_cuda_is_refused_without_an_nvidia_gpu(register):
    register(Fake("torch", "cpu"))
    expected = (
        "^backend 'cuda' cannot run here: it is the torch engine on an NVIDIA GPU, and no such device is "
        "available; pass --backend torch$"
    )
    with pytest.raises(ValueError, match=expected):
        choose_backend("cuda")


def test_cuda_on_a_cpu_is_refused_with_the_command_that_works(register):
    register(Fake("torch", "cuda:0", "cpu"))
    chosen = choose_backend("cuda")

    def create(device: str):
        return chosen.create_engine(None, {}, options=EngineOptions(device=device))

    for use in (chosen.join, chosen.scans, create):
        with pytest.raises(ValueError, match=r"found device 'cpu'; pass --backend torch --device cpu$"):
            use("cpu")


def test_cuda_without_torch_says_what_to_install(register):
    register(Fake("torch", missing="torch is not installed"))
    with pytest.raises(ValueError, match=r"^backend 'cuda' cannot run here: torch is not installed$"):
        choose_backend("cuda")


def test_an_unknown_backend_is_refused_with_the_known_names(register):
    register(Fake("torch"), Fake("mlx"))
    with pytest.raises(ValueError, match=r"^unknown backend 'jax'; expected auto, mlx, torch$"):
        choose_backend("jax")


def test_auto_takes_the_first_usable_backend_or_lists_all_reasons(register):
    first, second = preferred_order()
    usable = Fake(second)
    register(Fake(first, missing="not installed"), usable)
    assert choose_backend("auto") is usable
    register(Fake("torch", missing="no torch"), Fake("other", missing="no other"))
    with pytest.raises(ValueError, match=r"^no backend can run here: torch: no torch; other: no other$"):
        choose_backend("auto")


def test_an_installed_third_backend_is_found_after_the_preferred_ones(register):
    other, torch = Fake("other"), Fake("torch")
    register(other, torch)
    assert choose_backend("auto") is torch
    register(other)
    assert choose_backend("auto") is other
