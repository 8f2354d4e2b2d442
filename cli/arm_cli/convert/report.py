"""What quantizing a classifier changed: its size, and its accuracy or its outputs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from arm_cli.options import EngineChoice
    from arm_convert.importing import Resolved
    from arm_core.engine.protocol import Engine

NOISE_IMAGES = 8
"""Images of the fixed batch that stands in for data."""


def report_change(
    before: Resolved, out: str, done: list[str], *, data: str | None, engine: EngineChoice
) -> None:
    """Print size and the change in accuracy on `data`, or without it in the logits of a fixed batch."""
    import numpy as np

    from arm_cli.models import open_model
    from arm_convert.verify import fixed_batch

    after = open_model(out)
    old_bytes = sum(tensor.nbytes for tensor in before.tensors.values())
    new_bytes = sum(path.stat().st_size for path in after.folder.glob("*.safetensors"))
    click.echo(
        f"{len(done)} of {len(before.tensors)} tensors quantized, {old_bytes:,} -> {new_bytes:,} bytes"
    )
    parameters = {name: np.asarray(tensor.read(), np.float32) for name, tensor in before.tensors.items()}
    engines = [engine.create(before.spec, values) for values in (parameters, after.parameters)]
    if data is not None:
        old, new = (_accuracy(runner, out, data) for runner in engines)
        click.echo(f"top-1 accuracy on {data}: {100 * old:.2f} % -> {100 * new:.2f} %")
        return
    images = fixed_batch(before.spec, NOISE_IMAGES, 0).images
    first, second = (runner.forward(images)["logits"] for runner in engines)
    change = np.abs(first - second).max() / max(float(np.abs(first).max()), 1e-30)
    same = int((first.argmax(1) == second.argmax(1)).sum())
    click.echo(
        f"on {NOISE_IMAGES} images of noise: logits change by {change:.1e} of the largest, "
        f"{same} keep their class (--data FOLDER measures accuracy)"
    )


def _accuracy(runner: Engine, out: str, data: str) -> float:
    from arm_cli.evaluate import open_data
    from arm_cli.models import open_model
    from arm_cli.progress import ProgressBar
    from arm_core.data.loader import EvalLoader
    from arm_core.training.evaluation import evaluate

    opened = open_model(out)
    source = open_data(data, opened)
    loader = EvalLoader(source, opened.transform, size=opened.spec.image_size, batch_size=64, workers=0)
    with ProgressBar("evaluate", len(source), "images") as counter:
        return evaluate(runner, loader, seen=counter.advance).top1 or 0.0
