"""Keys of the metadata in safetensors headers, and reading of their JSON values.

The model card is made from the same metadata. Values are strings; those below hold JSON unless noted.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

HISTORY = "history"
"""List: a sentence for each step from the original file to this one."""
TRAINING_ARGS = "training_args"
"""Object: the training arguments of an official checkpoint."""
RESULTS = "results"
"""Object: measured results by name."""
CLASSES = "classes"
"""List: class names in the order of the logits, as in class folders."""
CLASS_NAMES = "class_names"
"""List: human-readable names of the same classes, if they differ."""
EVAL_TRANSFORM = "eval_transform"
"""Object: fields of `EvalTransform`, the preprocessing of images for evaluation."""
QUANTIZATION = "quantization"
"""Plain text, in files of quantized weights: `affine, 4 bits`."""
LAYOUT = "arm.layout"
"""Plain text, in exported files: whose names and tensor layouts the file uses."""
CONFIG = "arm.config"
"""Object, in exported files: the content of `config.json`."""
FRAMEWORK = "format"
"""Plain text: the framework that a safetensors file is meant for (`pt`, `mlx`), by common convention."""


def read_json(metadata: Mapping[str, str], key: str, default: Any) -> Any:
    """The JSON value of a key, of the type of `default`; `default` if the key is missing.

    A ValueError names the key if its value is not valid JSON or has another type.
    """
    try:
        value = json.loads(metadata[key]) if key in metadata else default
    except (ValueError, RecursionError):
        raise ValueError(f"metadata {key!r} is not valid JSON") from None
    expected, found = type(default).__name__, type(value).__name__
    if expected != found:
        raise ValueError(f"metadata {key!r}: expected a {expected}, found a {found}")
    return value


def with_history(metadata: Mapping[str, str], sentence: str) -> dict[str, str]:
    """Metadata with a sentence added to the model's history."""
    return {**metadata, HISTORY: json.dumps([*read_json(metadata, HISTORY, []), sentence])}


def without(metadata: Mapping[str, str], *keys: str) -> dict[str, str]:
    """Metadata without the given keys."""
    return {key: value for key, value in metadata.items() if key not in keys}
