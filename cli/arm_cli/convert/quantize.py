"""`arm convert quantize`: a classifier in 4 or 8 bits, and the effect of the rounding."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from arm_cli.convert.options import changes_model, resolve_model, write_changed, writing_options
from arm_cli.options import EngineChoice, engine_options, weights_option
from arm_cli.show import echo

if TYPE_CHECKING:
    from arm_convert.importing import Resolved
    from arm_core.engine.protocol import Engine

NOISE_IMAGES = 8
"""Images of noise that are compared if no data is given."""


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
    """Store the large matrices of a classifier in 4 or 8 bits.

    MLX multiplies the quantized matrices; other engines use the rounded values. Prints the effect of the
    rounding: on the accuracy on --data, or on the outputs of a fixed batch of noise.
    """
    from pathlib import Path

    from arm_convert.quantize import quantize_model
    from arm_core.data.digits import PLACINGS
    from arm_core.files.metadata import with_history

    if data is not None and data not in PLACINGS and not Path(data).is_dir():
        raise ValueError(f"{data}: no such folder of images")
    found = resolve_model(model, weights)
    spec = found.spec
    tensors, done = quantize_model(spec, found.tensors, bits=int(bits), group_size=int(group_size))
    metadata = with_history(found.metadata, f"quantized to {bits} bits in groups of {group_size}")
    write_changed(out, spec, tensors, metadata, force=force, shard_size=shard_size)
    _report_change(found, out, done, data=data, engine=engine)


def _report_change(
    before: Resolved, out: str, done: list[str], *, data: str | None, engine: EngineChoice
) -> None:
    """Print the size, and the change in accuracy on `data` or in the logits of a fixed batch."""
    import numpy as np

    from arm_cli.opening import open_model
    from arm_convert.verify import fixed_batch

    after = open_model(out)
    old_bytes = sum(tensor.nbytes for tensor in before.tensors.values())
    new_bytes = sum(path.stat().st_size for path in after.folder.glob("*.safetensors"))
    echo(f"{len(done)} of {len(before.tensors)} tensors quantized, {old_bytes:,} -> {new_bytes:,} bytes")
    parameters = {name: np.asarray(tensor.read(), np.float32) for name, tensor in before.tensors.items()}
    engines = [engine.create(before.spec, values) for values in (parameters, after.parameters)]
    if data is not None:
        old, new = (_accuracy(runner, out, data) for runner in engines)
        echo(f"top-1 accuracy on {data}: {100 * old:.2f} % -> {100 * new:.2f} %")
        return
    images = fixed_batch(before.spec, NOISE_IMAGES, 0).images
    first, second = (runner.forward(images)["logits"] for runner in engines)
    change = np.abs(first - second).max() / max(float(np.abs(first).max()), 1e-30)
    same = int((first.argmax(1) == second.argmax(1)).sum())
    echo(
        f"on {NOISE_IMAGES} images of noise: logits change by {change:.1e} of the largest, "
        f"{same} keep their class (--data FOLDER measures accuracy)"
    )


def _accuracy(runner: Engine, out: str, data: str) -> float:
    from arm_cli.evaluation_job import open_data
    from arm_cli.opening import open_model
    from arm_cli.progress import ProgressBar
    from arm_core.data.loader import EvalLoader
    from arm_core.training.evaluation import evaluate

    opened = open_model(out)
    source = open_data(data, opened)
    loader = EvalLoader(source, opened.transform, size=opened.spec.image_size, batch_size=64, workers=0)
    with ProgressBar("evaluate", len(source), "images") as bar:
        return evaluate(runner, loader, seen=bar.advance).top1 or 0.0
