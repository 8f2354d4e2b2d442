"""`arm convert to-classifier`: a classifier from a pretraining model or another classifier."""

from __future__ import annotations

import click

from arm_cli.convert.options import (
    changes_model,
    image_size_option,
    resolve_model,
    write_changed,
    writing_options,
)
from arm_cli.options import weights_option


@click.command("to-classifier")
@click.argument("model")
@click.argument("out")
@click.option("--classes", type=click.IntRange(min=1), help="Number of classes of a new head.")
@image_size_option
@click.option("--directions", type=click.Choice(("1", "2", "4")), help="Scan directions. [default: 4]")
@click.option("--pooling", type=click.Choice(("mean", "cls")), help="Pooling of tokens. [default: mean]")
@click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of the new parameters."
)
@click.option(
    "--head-std",
    type=float,
    help="Standard deviation of the new head. [default: 2e-5, as in the official code]",
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

    From a pretraining model, the encoder is kept. Its single direction is copied to all directions, and its
    position table is resized (to 224x224 by default). The class token, last norm and head are new. A
    classifier keeps everything that no option changes; --classes replaces its head.
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
        raise ValueError(f"{model}: a pretraining model has no classes; pass --classes N")
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
