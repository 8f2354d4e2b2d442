"""`arm info`: parameters and cost of a model, from its spec."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from arm_cli.options import json_option
from arm_cli.show import echo, print_json, print_table, scaled

if TYPE_CHECKING:
    from arm_core.files.model_folder import Model
    from arm_core.model.spec import ModelSpec

WORD = 100
"""Characters of a metadata entry that are printed; --json prints all."""


@click.command(short_help="Parameters, multiply-adds and memory of a model.")
@click.argument("name", metavar="PRESET|MODEL")
@json_option
def info(name: str, as_json: bool) -> None:
    """Print parameters, multiply-adds and activation memory of a model by part.

    PRESET is digits, tiny, small, base, large or huge: prints the pretraining model and the classifier.
    MODEL is a model folder, a run or a checkpoint.
    """
    model, specs = _find(name)
    report: dict[str, Any] = {"name": name, "models": [describe(spec) for spec in specs]}
    if model is not None:
        report["dtype"] = sorted({tensor.dtype for tensor in model.arrays.values()})
        report["metadata"] = model.metadata
    if as_json:
        print_json(report)
        return
    for key in ("dtype", "metadata"):
        if found := report.get(key):
            echo(f"{key}: {_plain(found)}")
    for spec, described in zip(specs, report["models"], strict=True):
        _print(spec, described)


def _find(name: str) -> tuple[Model | None, list[ModelSpec]]:
    from arm_cli.opening import find_model
    from arm_core.model.checks import near_match
    from arm_core.model.presets import PRESETS, classifier_preset, pretrain_preset

    if name in PRESETS:
        return None, [pretrain_preset(name), classifier_preset(name)]
    if not Path(name).exists():
        raise ValueError(f"{name!r} is neither a preset nor a model on disk{near_match(name, PRESETS)}")
    model = find_model(name).model
    return model, [model.spec]


def describe(spec: ModelSpec) -> dict[str, Any]:
    """The report on one model as plain values; bytes are for float32."""
    from dataclasses import asdict

    from arm_core.model.cost import OPTIMIZER_BYTES, cost_table
    from arm_core.model.spec import to_json

    parts = cost_table(spec)
    trainable = sum(part.parameters for part in parts)
    fixed = sum(part.fixed for part in parts)
    return {
        "config": to_json(spec),
        "tokens": spec.tokens,
        "parameters": {"trainable": trainable, "fixed": fixed, "total": trainable + fixed},
        "multiply_adds_per_image": sum(part.multiply_adds for part in parts),
        "activation_bytes_per_image": 4 * sum(part.activations for part in parts),
        "training_state_bytes": OPTIMIZER_BYTES * trainable + 4 * fixed,
        "parts": [asdict(part) for part in parts],
    }


def _print(spec: ModelSpec, report: dict[str, Any]) -> None:
    from arm_core.model.spec import PretrainSpec

    encoder, (rows, columns) = spec.encoder, spec.grid
    kind = "Pretraining" if isinstance(spec, PretrainSpec) else "Classifier"
    echo(f"\n{kind}", bold=True)
    echo(
        f"  image {spec.image_size[0]}x{spec.image_size[1]}, {rows}x{columns} patches of {encoder.patch}x"
        f"{encoder.patch}; encoder {encoder.width} wide, {encoder.depth} deep, {encoder.state} states"
    )
    if isinstance(spec, PretrainSpec):
        echo(
            f"  {spec.clusters} clusters of {spec.cluster[0]}x{spec.cluster[1]} patches, predicted in "
            f"{spec.prediction_order} order; decoder {spec.decoder_width} wide, {spec.decoder_depth} deep"
        )
    else:
        echo(
            f"  {spec.classes} classes; scans {', '.join(spec.scan_directions)}; pooling by "
            f"{spec.pooling}; {spec.tokens} tokens"
        )
    count = report["parameters"]
    fixed = f" ({count['total']:,} with the fixed position tables)" if count["fixed"] else ""
    state = scaled(report["training_state_bytes"], "B")
    echo(f"  trainable parameters  {count['trainable']:,}{fixed}")
    echo(f"  multiply-adds         {scaled(report['multiply_adds_per_image'])} per image, forward")
    echo(
        f"  activations           {scaled(report['activation_bytes_per_image'], 'B')} per image, kept in "
        "float32 by a training step"
    )
    echo(f"  training state        {state}: weight, gradient, two moments of AdamW, float32")
    total = count["trainable"] + count["fixed"]
    print_table(
        ("part", "parameters", "share", "multiply-adds", "activations"),
        [
            (
                part["name"],
                f"{part['parameters'] + part['fixed']:,}",
                f"{100 * (part['parameters'] + part['fixed']) / total:.1f} %",
                scaled(part["multiply_adds"]),
                scaled(4 * part["activations"], "B"),
            )
            for part in report["parts"]
        ],
        total=(
            "all",
            f"{total:,}",
            "",
            scaled(report["multiply_adds_per_image"]),
            scaled(report["activation_bytes_per_image"], "B"),
        ),
    )


def _plain(value: Any) -> str:
    """Values as text, truncated if long: there can be thousands of class names."""
    words = [f"{k}={v}" for k, v in value.items()] if isinstance(value, dict) else value
    return ", ".join(word if len(word) <= WORD else f"{word[:WORD]}..." for word in words)
