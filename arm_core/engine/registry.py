"""How backends are found: through an entry point, so that a further one can be a package of its own."""

from __future__ import annotations

import os
import platform
from importlib.metadata import entry_points

from arm_core.engine.protocol import Backend

ENTRY_POINTS = "arm_vision.backends"


def installed_backends() -> dict[str, Backend]:
    """All backends that are registered, usable or not, by name."""
    return {point.name: point.load() for point in entry_points(group=ENTRY_POINTS)}


def preferred_order() -> tuple[str, ...]:
    """Names in the order that `auto` tries: MLX on Apple Silicon and under `mlx.launch`, torch elsewhere."""
    apple = platform.system() == "Darwin" and platform.machine() == "arm64"
    return ("mlx", "cuda") if apple or "MLX_RANK" in os.environ else ("cuda", "mlx")


def choose_backend(name: str = "auto") -> Backend:
    """The backend of that name, or for `auto` the first usable one; a ValueError says what to install."""
    known = installed_backends()
    if name != "auto":
        if name not in known:
            raise ValueError(f"unknown backend {name!r}; known are auto, {', '.join(sorted(known))}")
        if reason := known[name].missing():
            raise ValueError(f"backend {name!r} cannot run here: {reason}")
        return known[name]
    order = [n for n in preferred_order() if n in known] + [n for n in known if n not in preferred_order()]
    reasons = {n: known[n].missing() for n in order}
    for n in order:
        if reasons[n] is None:
            return known[n]
    raise ValueError("no backend can run here: " + "; ".join(f"{n}: {why}" for n, why in reasons.items()))
