"""The MLX engine: Apple GPUs, and any CPU. Importing this package does not import MLX."""

from __future__ import annotations

from typing import Any

from arm_mlx.backend import MlxBackend

backend = MlxBackend()
"""The object that the entry point `arm_vision.backends` names."""


def load_model(source: Any, device: Any = None, dtype: Any = None, **options: Any) -> Any:
    """`arm_vision.load_model` with backend `mlx`."""
    from arm_vision import load_model as load

    return load(source, "mlx", device, dtype, **options)
