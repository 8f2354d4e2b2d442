"""Model cards: size, provenance, results and usage of a model, as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from arm_convert.checkpoint_source import CheckpointSource
from arm_core.files.errors import printable
from arm_core.files.metadata import CLASSES, HISTORY, RESULTS, TRAINING_ARGS, read_json
from arm_core.model.parameters import count_parameters
from arm_core.model.presets import PRESETS
from arm_core.model.spec import ClassifierSpec, ModelSpec, PretrainSpec


def model_card(spec: ModelSpec, metadata: Mapping[str, str], *, recipe: str | None = None) -> str:
    """Markdown for `README.md`, with the metadata header of the Hugging Face hub.

    recipe: TOML of the run that trained the model, if known.
    """
    classifier = isinstance(spec, ClassifierSpec)
    task = "image-classification" if classifier else "image-feature-extraction"
    parts = [
        f"---\nlibrary_name: arm-vision\npipeline_tag: {task}\ntags:\n- vision-mamba\n- arm\n---\n",
        f"# {_title(spec)}\n",
        "A Vision Mamba of [ARM](https://arxiv.org/abs/2406.07537), "
        + ("finetuned to classify images.\n" if classifier else "pretrained by autoregressive prediction.\n"),
        _table(("", ""), _facts(spec)),
        "## Use\n",
        _usage(classifier),
    ]
    if results := read_json(metadata, RESULTS, {}):
        parts += ["## Results\n", _table(("what", "value"), results.items())]
    if history := read_json(metadata, HISTORY, []):
        parts += ["## Provenance\n", "".join(f"1. {_plain(step)}\n" for step in history)]
    if recipe is not None:
        parts += ["## Recipe\n", f"```toml\n{_lines(recipe)}\n```\n"]
    if args := read_json(metadata, TRAINING_ARGS, {}):
        parts += [
            "## Official training arguments\n",
            _table(("name", "value"), args.items()),
        ]
    if names := read_json(metadata, CLASSES, []):
        parts += [f"## Classes\n\n{len(names)}: {_plain(', '.join(map(str, names)))[:2000]}\n"]
    return "\n".join(parts)


def run_recipe(source: CheckpointSource) -> str | None:
    """The recipe of the run that a source belongs to, without paths of data."""
    from arm_core.recipe.recipe import load_recipe, override, to_toml
    from arm_core.training.run_folder import RECIPE

    if source.run is None or not (source.run / RECIPE).is_file():
        return None
    return to_toml(override(load_recipe(source.run / RECIPE), ["data.path=none", "data.eval_path=none"]))


def _title(spec: ModelSpec) -> str:
    encoder = spec.encoder
    size = next((n for n, p in PRESETS.items() if (p.width, p.depth) == (encoder.width, encoder.depth)), None)
    kind = "classifier" if isinstance(spec, ClassifierSpec) else "pretraining model"
    return f"ARM {size or f'{encoder.width}x{encoder.depth}'} {kind}"


def _facts(spec: ModelSpec) -> Iterable[tuple[str, Any]]:
    encoder, (height, width) = spec.encoder, spec.image_size
    yield "trainable parameters", f"{count_parameters(spec):,}"
    yield "image size", f"{height} x {width} pixels, patches of {encoder.patch}"
    yield "encoder", f"{encoder.depth} blocks of width {encoder.width}, {encoder.state} states"
    if isinstance(spec, PretrainSpec):
        yield "clusters", f"{spec.clusters} of {spec.cluster[0]} x {spec.cluster[1]} patches"
        yield "prediction order", spec.prediction_order
        yield (
            "decoder",
            f"{spec.decoder_depth} blocks of width {spec.decoder_width}, {spec.decoder_heads} heads",
        )
        yield "target", f"{spec.target} pixels"
    else:
        yield "classes", spec.classes
        yield "scan directions", ", ".join(spec.scan_directions)
        yield "pooling", spec.pooling


def _usage(classifier: bool) -> str:
    example = "arm predict MODEL image.jpg" if classifier else "arm embed MODEL image.jpg --out features.npz"
    note = "`MODEL` is this folder. It loads into both MLX and PyTorch."
    return f"```\npip install arm-vision\n{example}\n```\n\n{note}\n"


def _lines(text: str) -> str:
    """Text without control characters, except for line breaks."""
    return "\n".join(printable(line) for line in text.strip().split("\n"))


def _table(head: tuple[str, str], rows: Iterable[tuple[str, Any]]) -> str:
    lines = [f"| {head[0]} | {head[1]} |", "|---|---|"]
    lines += [f"| {_plain(name)} | {_plain(value)} |" for name, value in rows]
    return "\n".join(lines) + "\n"


def _plain(value: Any) -> str:
    """A value from a file as text that contains neither markup nor control characters."""
    text = printable(" ".join(str(value)[:4000].split()))
    for character in "\\`*_[]<>|":
        text = text.replace(character, f"\\{character}")
    return text
