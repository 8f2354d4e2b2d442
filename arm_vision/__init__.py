"""Vision Mamba with autoregressive pretraining (ARM), in PyTorch and MLX.

    import arm_vision

    model = arm_vision.load_model("models/arm-b")       # a torch.nn.Module, or an mlx.nn.Module on a Mac
    logits = model(model.transform()("cat.jpg")[None])

This package only collects the public names; each is loaded on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from arm_convert.library import load_model as load_model
    from arm_convert.published import list_models as list_models
    from arm_convert.published import pull as pull
    from arm_core.data.imagenet import imagenet_names as imagenet_names
    from arm_core.data.imagenet import imagenet_synsets as imagenet_synsets
    from arm_core.training.probe import knn_probe as knn_probe
    from arm_core.training.probe import linear_probe as linear_probe

_PUBLIC = {
    "load_model": "arm_convert.library",
    "list_models": "arm_convert.published",
    "pull": "arm_convert.published",
    "knn_probe": "arm_core.training.probe",
    "linear_probe": "arm_core.training.probe",
    "imagenet_names": "arm_core.data.imagenet",
    "imagenet_synsets": "arm_core.data.imagenet",
}
__all__ = [*_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'arm_vision' has no attribute {name!r}; it has {', '.join(_PUBLIC)}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
