"""`arm convert to-classifier`, `resize`, `cast`, `quantize`, `average`: models made from models."""

from __future__ import annotations

import click

from arm_cli.convert.options import (
    changes_model,
    image_size_option,
    resolve_model,
    write_changed,
    writing_options,
)
from arm_cli.options import EngineChoice, engine_options, weights_option

TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


@click.command("to-classifier")
@click.argument("model")
@click.argument("out")
@click.option("--classes", type=click.IntRange(min=1), help="Number of classes of a new head.")
@image_size_option
@click.option("--directions", type=click.Choice(("1", "2", "4")), help="Scan directions. [default: 4]")
@click.option("--pooling", type=click.Choice(("mean", "cls")), help="How tokens are pooled. [default: mean]")
@click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the new parameters."
)
@click.option(
    "--head-std", type=float, help="Standard deviation of the new head. [default: 2e-5, the official one]"
)
@weights_option
@writing_options
@changes_model
def to_classifier(
    model: str,
    out: str,
    classes: int | None,
    image_size: tuple[int, int] | None,
    directions: str | None,
    pooling: str | None,
    seed: int,
    head_std: float | None,
    weights: str,
    force: bool,
    shard_size: int,
) -> None:
    """Turn MODEL into the classifier OUT, ready to be finetuned.

    A pretraining model gives its trunk: its one direction is copied to all, its position table resized
    (to 224x224 by default), class token, last norm and head are new. A classifier keeps everything that no
    option changes; --classes replaces its head.
    """
    from dataclasses import replace

    from arm_convert import adapt
    from arm_core.files.metadata import CLASSES, with_history, without
    from arm_core.model.spec import DIRECTIONS, ClassifierSpec, Pooling

    found = resolve_model(model, weights)
    changes = {
        "classes": classes,
        "image_size": image_size,
        "scan_directions": DIRECTIONS[int(directions)] if directions else None,
        "pooling": Pooling(pooling) if pooling else None,
    }
    given = {name: value for name, value in changes.items() if value is not None}
    if isinstance(found.spec, ClassifierSpec):
        target = replace(found.spec, **given)  # type: ignore[arg-type]
    elif classes is None:
        raise ValueError("a pretraining model knows no classes: say how many with --classes N")
    else:
        target = ClassifierSpec(encoder=found.spec.encoder, **given)  # type: ignore[arg-type]
    tensors = adapt.to_classifier(
        found.spec,
        found.tensors,
        target,
        seed=seed,
        head_std=adapt.OFFICIAL_HEAD_STD if head_std is None else head_std,
        keep_head=classes is None,
    )
    metadata = found.metadata if classes is None else without(found.metadata, CLASSES)
    sentence = (
        f"made a classifier of {target.classes} classes at {target.image_size[0]}x{target.image_size[1]}"
    )
    write_changed(out, target, tensors, with_history(metadata, sentence), force=force, shard_size=shard_size)


@click.command()
@click.argument("model")
@click.argument("out")
@image_size_option
@weights_option
@writing_options
@changes_model
def resize(
    model: str, out: str, image_size: tuple[int, int] | None, weights: str, force: bool, shard_size: int
) -> None:
    """Write MODEL for another image size as OUT.

    A classifier's position table is resized (bicubic) with the class token's row kept apart; a
    pretraining model's tables are computed for the new size.
    """
    from arm_convert import adapt
    from arm_core.files.metadata import with_history

    if image_size is None:
        raise ValueError("say the new size with --image-size")
    found = resolve_model(model, weights)
    spec, tensors = adapt.resize(found.spec, found.tensors, image_size)
    metadata = with_history(found.metadata, f"resized to {image_size[0]}x{image_size[1]} pixels")
    write_changed(out, spec, tensors, metadata, force=force, shard_size=shard_size)


@click.command()
@click.argument("model")
@click.argument("out")
@click.option("--dtype", type=click.Choice(tuple(TYPES)), required=True, help="Type of the stored weights.")
@weights_option
@writing_options
@changes_model
def cast(model: str, out: str, dtype: str, weights: str, force: bool, shard_size: int) -> None:
    """Store MODEL in another type as OUT.

    The scan's A_log, D and dt bias stay float32.
    """
    from arm_convert import adapt
    from arm_core.files.metadata import with_history

    found = resolve_model(model, weights)
    tensors = adapt.cast(found.tensors, TYPES[dtype])
    metadata = with_history(found.metadata, f"stored as {dtype}")
    write_changed(out, found.spec, tensors, metadata, force=force, shard_size=shard_size)


@click.command()
@click.argument("model")
@click.argument("out")
@click.option("--bits", type=click.Choice(("4", "8")), default="4", show_default=True)
@click.option(
    "--group-size", type=click.Choice(("32", "64", "128")), default="64", show_default=True, help="Values."
)
@click.option("--data", metavar="FOLDER", help="Images to measure accuracy on, or `digits`.")
@weights_option
@writing_options
@engine_options
@changes_model
def quantize(
    model: str,
    out: str,
    bits: str,
    group_size: str,
    data: str | None,
    weights: str,
    force: bool,
    shard_size: int,
    engine: EngineChoice,
) -> None:
    """Store a classifier's large matrices in 4 or 8 bits.

    MLX multiplies them as they are; other engines restore the rounded values. Reports what the rounding
    changed: the accuracy on --data, else the outputs of a fixed batch of noise.
    """
    from pathlib import Path

    from arm_cli.convert.report import report_change
    from arm_cli.evaluate import DIGITS
    from arm_convert.quantize import quantize_model
    from arm_core.files.metadata import with_history

    if data is not None and data != DIGITS and not Path(data).is_dir():
        raise ValueError(f"{data}: no such folder of images")
    found = resolve_model(model, weights)
    spec = found.spec
    tensors, done = quantize_model(spec, found.tensors, bits=int(bits), group_size=int(group_size))
    metadata = with_history(found.metadata, f"quantized to {bits} bits in groups of {group_size}")
    write_changed(out, spec, tensors, metadata, force=force, shard_size=shard_size)
    report_change(found, out, done, data=data, engine=engine)


@click.command()
@click.argument("models", nargs=-1, required=True)
@click.argument("out")
@weights_option
@writing_options
@changes_model
def average(models: tuple[str, ...], out: str, weights: str, force: bool, shard_size: int) -> None:
    """Average the weights of several models into OUT.

    They must have the same specification.
    """
    from pathlib import Path

    from arm_convert import adapt
    from arm_core.files.metadata import with_history

    if len(models) < 2:
        raise ValueError("an average needs two models or more, and OUT after them")
    found = [resolve_model(name, weights) for name in models]
    for name, other in zip(models[1:], found[1:], strict=True):
        if other.spec != found[0].spec:
            raise ValueError(f"{name} is another model than {models[0]}: {other.spec} and {found[0].spec}")
    tensors = adapt.average([model.tensors for model in found])
    names = ", ".join(Path(name).name for name in models)
    metadata = with_history(found[0].metadata, f"averaged over {names}")
    write_changed(out, found[0].spec, tensors, metadata, force=force, shard_size=shard_size)
