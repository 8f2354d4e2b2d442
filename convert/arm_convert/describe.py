"""Describes a file from its header: kind, size, types, names, and the choices of an import."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

from arm_convert.checkpoint_source import CheckpointSource
from arm_convert.importing import Resolved, resolve
from arm_core.model.parameters import count_parameters
from arm_core.model.presets import PRESETS
from arm_core.model.spec import ModelSpec, kind_of, to_json


@dataclass(frozen=True)
class Description:
    """A source and what is known about it."""

    source: CheckpointSource
    resolved: Resolved | None
    problem: str | None
    """The reason why it cannot be imported."""

    @property
    def types(self) -> dict[str, int]:
        """Number of tensors of each type."""
        return dict(Counter(tensor.dtype for tensor in self.source.tensors.values()))

    @property
    def values(self) -> int:
        return sum(math.prod(tensor.shape) for tensor in self.source.tensors.values())

    @property
    def size(self) -> str:
        """The name of the preset with this size, or width and depth."""
        if self.resolved is None:
            return "unknown"
        encoder = self.resolved.spec.encoder
        names = [name for name, p in PRESETS.items() if (p.width, p.depth) == (encoder.width, encoder.depth)]
        return names[0] if names else f"width {encoder.width}, depth {encoder.depth}"

    def facts(self) -> dict[str, str]:
        """Human-readable lines, by topic."""
        source, resolved = self.source, self.resolved
        layout = f", {source.layout} names" if resolved else ""
        prefix = f", prefix {source.prefix!r}" if source.prefix else ""
        facts = {
            "file": str(source.path),
            "format": f"{source.format}{layout}{prefix}",
            "tensors": f"{len(source.tensors)}, {self.values:,} values, "
            + ", ".join(f"{count} {dtype}" for dtype, count in self.types.items()),
        }
        if resolved is None:
            return {**facts, "model": f"none: {self.problem}"}
        spec = resolved.spec
        height, width = spec.image_size
        kind = "classifier" if kind_of(spec) == "classifier" else "pretraining model"
        return {
            **facts,
            "model": f"{kind}, {self.size}, {height}x{width} pixels, {count_parameters(spec):,} parameters",
            **{f"choice {i}": text for i, text in enumerate(resolved.choices, 1)},
            **{f"left out {i}": text for i, text in enumerate(resolved.left_out, 1)},
            **{f"metadata {key}": value[:200] for key, value in resolved.metadata.items()},
        }

    def as_json(self) -> dict[str, Any]:
        """All values, for programs."""
        source, resolved = self.source, self.resolved
        return {
            "file": str(source.path),
            "format": source.format,
            "layout": str(source.layout),
            "prefix": source.prefix,
            "kind": kind_of(resolved.spec) if resolved else None,
            "size": self.size,
            "config": to_json(resolved.spec) if resolved else None,
            "problem": self.problem,
            "values": self.values,
            "types": self.types,
            "tensors": {n: {"shape": list(t.shape), "dtype": t.dtype} for n, t in source.tensors.items()},
            "metadata": source.metadata,
            "choices": resolved.choices if resolved else [],
            "left_out": resolved.left_out if resolved else [],
        }


def describe(source: CheckpointSource) -> Description:
    """Describe a source; for one that is not an ARM model, the description holds the reason."""
    try:
        return Description(source, resolve(source), None)
    except ValueError as error:
        return Description(source, None, str(error).removeprefix(f"{source.path}: "))


def differing_fields(first: ModelSpec, second: ModelSpec) -> str:
    """The fields in which two specifications differ, with both values; empty if they are equal."""
    a, b = (_fields(to_json(spec)) for spec in (first, second))
    if kind_of(first) != kind_of(second):
        return f"{kind_of(first)} and {kind_of(second)}"
    return ", ".join(f"{name} {a[name]} and {b[name]}" for name in a if a[name] != b[name])


def _fields(config: dict[str, Any]) -> dict[str, str]:
    """The values of a config as text, nested ones by dotted names; lists as 192x192 or row/column."""
    fields: dict[str, str] = {}
    for name, value in config.items():
        if isinstance(value, dict):
            fields |= {f"{name}.{key}": text for key, text in _fields(value).items()}
        elif isinstance(value, list):
            fields[name] = ("x" if all(isinstance(item, int) for item in value) else "/").join(
                map(str, value)
            )
        else:
            fields[name] = str(value)
    return fields
