"""Finds backends through an entry point, so that another backend can be a separate package."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import entry_points
from typing import Any

from arm_core.engine.optimizer import OptimizerSettings
from arm_core.engine.protocol import Array, Backend, Engine, EngineOptions, TrainingState
from arm_core.engine.ranks import ALONE, Ranks
from arm_core.engine.scan_timing import ScanTimer
from arm_core.model.spec import ModelSpec

ENTRY_POINTS = "arm_vision.backends"


@dataclass(frozen=True)
class Alias:
    """Another name for a backend, which limits it to one type of device."""

    backend: str
    device: str
    """Device type; `auto` means this device."""
    meaning: str
    """Description for messages."""


ALIASES = {"cuda": Alias("torch", "cuda", "the torch engine on an NVIDIA GPU")}
"""Names that `choose_backend` takes in addition to those of the installed backends."""


def installed_backends() -> dict[str, Backend]:
    """All registered backends by name, usable or not, sorted by name."""
    found = (point.load() for point in entry_points(group=ENTRY_POINTS))
    return {backend.name: backend for backend in sorted(found, key=lambda backend: str(backend.name))}


def preferred_order() -> tuple[str, ...]:
    """Names in the order of `auto`: MLX first on Apple Silicon and under `mlx.launch`, else torch."""
    apple = platform.system() == "Darwin" and platform.machine() == "arm64"
    return ("mlx", "torch") if apple or "MLX_RANK" in os.environ else ("torch", "mlx")


def choose_backend(name: str = "auto") -> Backend:
    """The backend with this name or alias, or for `auto` the first usable one.

    Raises ValueError if the name is unknown or the backend cannot run here; the message says what to install.
    """
    known = installed_backends()
    if name == "auto":
        return _first_usable(known)
    alias = ALIASES.get(name)
    own_name = alias.backend if alias else name
    if own_name not in known:
        raise ValueError(f"unknown backend {name!r}; expected auto, {', '.join(sorted(known))}")
    if reason := known[own_name].missing():
        raise ValueError(f"backend {name!r} cannot run here: {reason}")
    if alias is None:
        return known[own_name]
    chosen = OnDevice(known[own_name], name, alias)
    if not chosen.devices():
        raise ValueError(
            f"backend {name!r} cannot run here: it is {alias.meaning}, and no such device is available; "
            f"pass --backend {own_name}"
        )
    return chosen


def _first_usable(known: Mapping[str, Backend]) -> Backend:
    order = [n for n in preferred_order() if n in known] + [n for n in known if n not in preferred_order()]
    reasons = {n: known[n].missing() for n in order}
    for n in order:
        if reasons[n] is None:
            return known[n]
    raise ValueError("no backend can run here: " + "; ".join(f"{n}: {why}" for n, why in reasons.items()))


class OnDevice:
    """A backend that an alias limits to one type of device; everything else is delegated to the backend."""

    def __init__(self, backend: Backend, requested: str, alias: Alias) -> None:
        self._backend, self._requested, self._alias = backend, requested, alias
        self.name = backend.name

    def missing(self) -> str | None:
        return self._backend.missing()

    def version(self) -> str:
        return self._backend.version()

    def devices(self) -> list[str]:
        return [device for device in self._backend.devices() if self._matches(device)]

    def cpu_products(self) -> tuple[str, str | None]:
        return self._backend.cpu_products()

    def bfloat16_units(self) -> str | None:
        return self._backend.bfloat16_units()

    def scans(self, device: str) -> Mapping[str, str | None]:
        return self._backend.scans(self._checked(device))

    def scan_timer(self, device: str) -> ScanTimer:
        return self._backend.scan_timer(self._checked(device))

    def join(self, device: str) -> Ranks:
        return self._backend.join(self._checked(device))

    def create_engine(
        self,
        spec: ModelSpec,
        state: TrainingState,
        *,
        optimizer: OptimizerSettings | None = None,
        options: EngineOptions | None = None,
        ranks: Ranks = ALONE,
    ) -> Engine:
        options = options or EngineOptions()
        options = replace(options, device=self._checked(options.device))
        return self._backend.create_engine(spec, state, optimizer=optimizer, options=options, ranks=ranks)

    def create_module(
        self, spec: ModelSpec, parameters: Mapping[str, Array], config: Any, **options: Any
    ) -> Any:
        options["device"] = self._checked(str(options.get("device") or "auto"))
        return self._backend.create_module(spec, parameters, config, **options)

    def _checked(self, device: str) -> str:
        if device == "auto":
            return self._alias.device
        if not self._matches(device):
            raise ValueError(
                f"backend {self._requested!r} is {self._alias.meaning}, found device {device!r}; "
                f"pass --backend {self.name} --device {device}"
            )
        return device

    def _matches(self, device: str) -> bool:
        return device.partition(":")[0] == self._alias.device
