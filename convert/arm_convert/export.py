"""Exports models to other programs: the official code, and plain `torch.nn` or `mlx.nn` modules.

The metadata of an exported file states its layout and specification (`arm.layout`, `arm.config`), so
importing it gives the same bytes again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path

from arm_convert.layouts import to_foreign
from arm_convert.official import SUFFIXES, to_official
from arm_convert.plain import Framework, plain_table
from arm_convert.torch_writer import write_torch
from arm_core.files.atomic import new_file
from arm_core.files.metadata import CONFIG, FRAMEWORK, LAYOUT
from arm_core.files.safetensors import Tensor, write_tensors
from arm_core.model.presets import DECODER_HEAD_WIDTH
from arm_core.model.spec import ClassifierSpec, ModelSpec, PredictionOrder, PretrainSpec, Target, to_json


class Format(StrEnum):
    """The target of an export."""

    OFFICIAL = "official"
    TORCH = "torch"
    MLX = "mlx"


SUFFIXES_OF = {
    Format.OFFICIAL: (".safetensors", ".pth"),
    Format.TORCH: (".safetensors", ".pth"),
    Format.MLX: (".safetensors",),
}
"""File types of each format, by file extension."""


def export_model(
    spec: ModelSpec,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    out: Path,
    to: Format,
    *,
    force: bool = False,
) -> None:
    """Write a model in a foreign format, one tensor at a time; the extension of `out` selects the file type.

    Raises ValueError for an extension that the format does not support, and for a model that the official
    code cannot build.
    """
    if out.suffix not in SUFFIXES_OF[to]:
        raise ValueError(f"{out}: expected a file name that ends in {' or '.join(SUFFIXES_OF[to])} for {to}")
    if to is Format.OFFICIAL:
        _check_official(spec)
        foreign = to_official(spec, tensors)
    else:
        foreign = to_foreign(plain_table(spec, Framework(to)), tensors)
    about = {**metadata, LAYOUT: str(to), CONFIG: json.dumps(to_json(spec))}
    with new_file(out, force=force) as draft:
        if out.suffix == ".pth":
            write_torch(draft, foreign, about)
        else:
            framework = "mlx" if to is Format.MLX else "pt"
            write_tensors(draft, foreign, {FRAMEWORK: framework, **about})


def _check_official(spec: ModelSpec) -> None:
    """Refuse settings that are fixed in the official code."""
    if isinstance(spec, ClassifierSpec):
        fixed: dict[str, tuple[object, object]] = {
            "scan directions": (list(spec.scan_directions), list(SUFFIXES)),
        }
    else:
        fixed = _fixed_in_pretraining(spec)
    for what, (found, expected) in fixed.items():
        if found != expected:
            raise ValueError(
                f"the official code has {what} {_words(expected)}, this model has {_words(found)}; "
                "export it with --to torch or --to mlx"
            )


def _fixed_in_pretraining(spec: PretrainSpec) -> dict[str, tuple[object, object]]:
    return {
        "target": (spec.target, Target.NORMALIZED),
        "prediction order": (spec.prediction_order, PredictionOrder.ROW),
        "decoder heads": (spec.decoder_heads, max(1, spec.decoder_width // DECODER_HEAD_WIDTH)),
    }


def _words(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
