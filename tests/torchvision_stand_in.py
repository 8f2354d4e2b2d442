"""timm imports names of torchvision, whose wheel does not load beside every torch: modules with those names.

`install()` puts them into `sys.modules` where torchvision cannot be imported. Nothing in them computes.
"""

from __future__ import annotations

import enum
import importlib
import sys
import types

MODULES = (
    "torchvision",
    "torchvision.datasets",
    "torchvision.models",
    "torchvision.models.feature_extraction",
    "torchvision.ops",
    "torchvision.ops.misc",
    "torchvision.transforms",
    "torchvision.transforms.functional",
    "torchvision.utils",
)


class InterpolationMode(enum.Enum):
    """The names that timm maps to Pillow's filters."""

    NEAREST = "nearest"
    NEAREST_EXACT = "nearest-exact"
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"
    BOX = "box"
    HAMMING = "hamming"
    LANCZOS = "lanczos"


class _Names(types.ModuleType):
    """A module in which every name is a separate class."""

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        made = type(name, (), {})
        setattr(self, name, made)
        return made


def install() -> None:
    """Make `import timm` work; does nothing where torchvision loads."""
    try:
        importlib.import_module("torchvision")
    except (ImportError, RuntimeError):
        for name in MODULES:
            module = _Names(name)
            module.__path__ = []  # a package
            sys.modules[name] = module
            parent, _, child = name.rpartition(".")
            if parent:
                setattr(sys.modules[parent], child, module)
        for name in ("torchvision.transforms", "torchvision.transforms.functional"):
            sys.modules[name].InterpolationMode = InterpolationMode  # type: ignore[attr-defined]
