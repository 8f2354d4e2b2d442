"""What is in a file, from its header alone: kind, size, types, names, and what importing it would do."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

from arm_convert.checkpoint_source import CheckpointSource
from arm_convert.importing import Resolved, resolve
from arm_core.model.parameters import count_parameters
from arm_core.model.presets import PRESETS
from arm_core.model.spec import kind_of, to_json


@dataclass(frozen=True)
class Description:
    """A source in plain values."""

    source: CheckpointSource
    resolved: Resolved | None
    problem: str | None
    """Why it is no model that could be imported."""

    @property
    def types(self) -> dict[str, int]:
        """How many tensors of each type."""
        return dict(Counter(tensor.dtype for tensor in self.source.tensors.values()))

    @property
    def values(self) -> int:
        return sum(math.prod(tensor.shape) for tensor in self.source.tensors.values())

    @property
    def size(self) -> str:
        """The preset of that size, or width x depth."""
        if self.resolved is None:
            return "unknown"
        encoder = self.resolved.spec.encoder
        names = [name for name, p in PRESETS.items() if (p.width, p.depth) == (encoder.width, encoder.depth)]
        return names[0] if names else f"width {encoder.width}, depth {encoder.depth}"

    def facts(self) -> dict[str, str]:
        """One line each, for people."""
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
        """Everything, for programs."""
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
    """Describe a source; one that is no ARM model is described too, with the reason."""
    try:
        return Description(source, resolve(source), None)
    except ValueError as error:
        return Description(source, None, str(error).removeprefix(f"{source.path}: "))
