"""The strings that a model folder carries in the header of its weights, and that its card is made from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

HISTORY = "history"
"""JSON list: one sentence for each step from the original file to this one."""
TRAINING_ARGS = "training_args"
"""JSON object: the training arguments of an official checkpoint."""
RESULTS = "results"
"""JSON object: what was measured, by name."""
CLASSES = "classes"
"""JSON list: class names in the order of the logits."""


def read_json(metadata: Mapping[str, str], key: str, default: Any) -> Any:
    """A JSON value of the metadata, `default` where there is none; a damaged one is refused by name."""
    try:
        value = json.loads(metadata[key]) if key in metadata else default
    except (ValueError, RecursionError):
        raise ValueError(f"metadata {key!r} is not valid JSON") from None
    if not isinstance(value, type(default)):
        raise ValueError(f"metadata {key!r}: expected a {type(default).__name__}, found {str(value)[:60]}")
    return value


def with_history(metadata: Mapping[str, str], sentence: str) -> dict[str, str]:
    """Metadata with one more step of the model's history."""
    return {**metadata, HISTORY: json.dumps([*read_json(metadata, HISTORY, []), sentence])}


def without(metadata: Mapping[str, str], *keys: str) -> dict[str, str]:
    """Metadata without what a conversion made untrue."""
    return {key: value for key, value in metadata.items() if key not in keys}
