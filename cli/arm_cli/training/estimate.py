"""`--dry-run --estimate h200:8`: time and memory of a run on another machine, by the cost model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from arm_cli.progress import duration
from arm_cli.show import echo, scaled

if TYPE_CHECKING:
    from arm_cli.training.run import Prepared
    from arm_core.engine.protocol import EngineOptions
    from arm_core.model.machines import Estimate
    from arm_core.recipe.recipe import Recipe

IMAGES, CLASSES = 1_281_167, 1000
"""ImageNet-1k, which is assumed if the recipe names no images."""
IMAGE_BYTES = 110e3
"""Mean size of its JPEG files."""
CORE_IMAGES = 350
"""Images per second that a core decodes and augments (`data_loading` in `benchmarks/results/`)."""


def assumed(recipe: Recipe) -> Prepared:
    """The recipe with as many images and classes as ImageNet-1k has; none of them is read."""
    from arm_cli.training.run import Prepared
    from arm_core.data.sources import Synthetic
    from arm_core.recipe.sections import ClassifierModel
    from arm_core.training.plan import Plan

    model = recipe.model
    classes = (model.classes or CLASSES) if isinstance(model, ClassifierModel) else CLASSES
    spec = recipe.spec(classes)
    source = Synthetic(IMAGES, spec.image_size, classes=classes)
    plan = Plan(recipe, spec, source)
    return Prepared(recipe=recipe, spec=spec, train=source, evaluation=None, plan=plan)


def print_estimate(prepared: Prepared, text: str, options: EngineOptions, *, step: int = 0) -> None:
    """Print time, speed, memory and data rate of the run on the machine that `text` names.

    step: updates that are done already. Raises ValueError for an unknown machine, and if an update has fewer
    images than there are GPUs.
    """
    from arm_core.engine.protocol import Precision
    from arm_core.model.machines import estimate, parse_machines

    machine, count = parse_machines(text)
    recipe, training = prepared.recipe, prepared.recipe.training
    found = estimate(
        prepared.spec,
        machine,
        count,
        batch_size=training.batch_size,
        accumulation=training.accumulation,
        average=recipe.optimizer.ema_decay is not None,
        bfloat16=training.precision is Precision.BFLOAT16,
        recompute=options.recompute,
        shard=options.shard,
    )
    rate = training.batch_size / found.seconds
    left = prepared.plan.total_steps - step
    echo(f"\n{count} x {machine.name}: estimates by the cost model, not measured")
    echo(
        f"step     {_ms(found.seconds)}: products {_ms(found.products)}, scan {_ms(found.scan)}, elementwise "
        f"{_ms(found.elementwise)}"
        + (f"; sending gradients {_ms(found.sending)} meanwhile" if count > 1 else "")
    )
    echo(f"speed    {rate:,.0f} images/s")
    echo(f"time     {duration(left * found.seconds)} for {left} steps, evaluations not counted")
    micro, memory = found.micro_batch, found.memory
    needed = f"{scaled(memory.total(micro), 'B')} per GPU with {micro} images at a time"
    if machine.memory is None:
        echo(f"memory   {needed}")
    else:
        echo(f"memory   {needed}, of {scaled(machine.memory, 'B')}{_advice(prepared, found, machine.memory)}")
    if found.accumulation != training.accumulation:
        echo(f"set      --set training.accumulation={found.accumulation}, one micro-batch or more per GPU")
    cores = -(-rate // CORE_IMAGES)
    echo(
        f"data     {scaled(rate * IMAGE_BYTES, 'B/s')} if images are JPEG files of "
        f"{IMAGE_BYTES / 1e3:.0f} kB; about {cores:.0f} CPU cores decode them"
    )


def _advice(prepared: Prepared, found: Estimate, available: int) -> str:
    """What to change if a micro-batch does not fit."""
    from arm_cli.training.summary import memory_advice
    from arm_core.model.cost import SPARE

    if found.memory.total(found.micro_batch) <= SPARE * available:
        return ""
    return f"; {memory_advice(found.memory, prepared, available)}"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms"
