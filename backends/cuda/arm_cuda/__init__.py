"""The torch engine: NVIDIA GPUs, and any CPU. Importing this package does not import torch."""

from __future__ import annotations

from typing import Any

from arm_cuda.backend import TorchBackend

backend = TorchBackend()
"""The object that the entry point `arm_vision.backends` names."""


def load_model(source: Any, device: Any = None, dtype: Any = None, **options: Any) -> Any:
    """`arm_vision.load_model` with backend `torch`."""
    from arm_vision import load_model as load

    return load(source, "torch", device, dtype, **options)
