"""The summary that is printed before the first step of a run, and warnings about likely problems."""

from __future__ import annotations

import os
from fractions import Fraction
from typing import TYPE_CHECKING

from arm_cli.progress import duration
from arm_cli.show import echo, scaled

if TYPE_CHECKING:
    from collections.abc import Iterator

    from arm_cli.training.run import Prepared
    from arm_core.data.sources import ImageSource
    from arm_core.engine.protocol import Backend, EngineOptions
    from arm_core.engine.ranks import Ranks
    from arm_core.model.cost import StepMemory
    from arm_core.model.spec import ModelSpec

CPU_OPERATIONS = 6e10
"""Floating-point operations per second and core that the CPU estimate assumes. A training step of the base
model reaches 1.1e11 on 2 cores (`cpu_step` in `benchmarks/results/`); smaller models reach less."""

LONG_ON_CPU = 3600.0
"""A CPU run that takes longer than this gets a warning, seconds."""


def print_summary(
    prepared: Prepared,
    backend: Backend,
    options: EngineOptions,
    ranks: Ranks,
    folder: str,
    *,
    recipe_name: str | None = None,
    resumed_at: int | None = None,
) -> None:
    """Print images, model, batch, schedule, memory and output folder of a run on stderr, and warnings."""
    print_lines(prepared, options, ranks, folder, recipe_name, resumed_at=resumed_at)
    for sentence in warnings(prepared, backend, options, ranks):
        echo(f"Warning: {sentence}", err=True)


def print_lines(
    prepared: Prepared,
    options: EngineOptions,
    ranks: Ranks,
    folder: str,
    recipe_name: str | None = None,
    *,
    resumed_at: int | None = None,
) -> None:
    """Print the lines of the summary on stderr."""
    if resumed_at is not None:
        total = prepared.plan.total_steps
        echo(f"Resuming at step {resumed_at} of {total}: {folder}", err=True)
    for name, text in describe(prepared, options, ranks, folder, recipe_name):
        echo(f"{name:<9}{text}", err=True)


def describe(
    prepared: Prepared, options: EngineOptions, ranks: Ranks, folder: str, recipe_name: str | None
) -> Iterator[tuple[str, str]]:
    """The lines of the summary: a label and its text."""
    recipe, training, plan = prepared.recipe, prepared.recipe.training, prepared.plan
    if recipe_name is not None:
        yield "recipe", f"{recipe_name} ({recipe.stage})"
    evaluation = "none" if prepared.evaluation is None else _images(prepared.evaluation)
    path = f" in {recipe.data.path}" if recipe.data.path else f" ({recipe.data.source})"
    yield "images", f"{_images(prepared.train)}{path}; evaluation: {evaluation}"
    yield "model", model_line(prepared.spec)
    shares = f", shared by {ranks.world} processes" if ranks.world > 1 else ""
    micro = f" = {training.accumulation} x {training.micro_batch}" if training.accumulation > 1 else ""
    yield "batch", f"{training.batch_size} images per step{micro}{shares}; {training.precision} products"
    epochs = float(plan.total_steps / plan.steps_per_epoch)
    yield "length", f"{plan.total_steps} steps, {epochs:.3g} epochs of {_number(plan.steps_per_epoch)} steps"
    schedule = recipe.schedule
    yield (
        "lr",
        f"peak {recipe.lr:.3g} (base_lr {schedule.base_lr:.3g} x {training.batch_size} / 256), "
        f"warm-up {schedule.warmup}, then a cosine to {schedule.min_lr:g}",
    )
    memory = step_memory_of(prepared, options, ranks)
    images = min(training.micro_batch, training.batch_size)
    yield (
        "memory",
        f"about {scaled(memory.total(images), 'B')} by the cost model: {scaled(memory.state, 'B')} of state, "
        f"{scaled(memory.per_image + memory.passing, 'B')} per image of a micro-batch",
    )
    yield "output", folder


def model_line(spec: ModelSpec) -> str:
    """Size of a model and its trainable parameters."""
    from arm_core.model.parameters import count_parameters
    from arm_core.model.spec import PretrainSpec

    encoder, (height, width) = spec.encoder, spec.image_size
    if isinstance(spec, PretrainSpec):
        kind = f"clusters of {spec.cluster[0]}x{spec.cluster[1]} patches"
    else:
        kind = f"{spec.classes} classes, {spec.directions} directions"
    return (
        f"{encoder.width} wide, {encoder.depth} deep, image {height}x{width}, patches of {encoder.patch}, "
        f"{kind}; {count_parameters(spec):,} trainable parameters"
    )


def step_memory_of(prepared: Prepared, options: EngineOptions, ranks: Ranks) -> StepMemory:
    """The cost model's memory of a training step of this run, on one device."""
    from arm_core.engine.protocol import Precision
    from arm_core.model.cost import step_memory

    recipe = prepared.recipe
    return step_memory(
        prepared.spec,
        value_bytes=2 if recipe.training.precision is Precision.BFLOAT16 else 4,
        average=recipe.optimizer.ema_decay is not None,
        recompute=options.recompute,
        shards=ranks.world if options.shard else 1,
    )


def warnings(prepared: Prepared, backend: Backend, options: EngineOptions, ranks: Ranks) -> Iterator[str]:
    """Warnings about likely problems of the run."""
    from arm_core.engine.protocol import Precision
    from arm_core.recipe.recipe import Stage

    recipe, training = prepared.recipe, prepared.recipe.training
    if recipe.stage is Stage.FINETUNE and prepared.evaluation is None:
        yield (
            "no images to evaluate on, so the accuracy is not measured; pass --eval-data PATH, "
            "or --set data.val_fraction=0.1."
        )
    if len(prepared.train.classes) == 1:
        yield f"only one class ({prepared.train.classes[0]}); a classifier needs two or more to learn."
    device = options.device if options.device != "auto" else backend.devices()[0]
    if device != "cpu":
        return
    library, advice = backend.cpu_products()
    if advice:
        yield f"matrix products on the CPU are slow here ({library}): {advice.rstrip('.')}."
    seconds = cpu_seconds(prepared)
    if seconds > LONG_ON_CPU:
        yield (
            f"on this CPU the run takes about {duration(seconds)} h:m:s by the cost model; "
            "try a few steps with --steps 20, or use a GPU."
        )
        if training.precision is Precision.FLOAT32 and (units := backend.bfloat16_units()):
            yield f"this CPU has {units}: --precision bfloat16 takes less time; weights stay float32."
    memory, available = step_memory_of(prepared, options, ranks), physical_memory()
    if available and memory.total(training.micro_batch) > available:
        advice = memory_advice(memory, prepared, available)
        yield f"this machine has {scaled(available, 'B')} of memory; {advice}"


def memory_advice(memory: StepMemory, prepared: Prepared, available: int) -> str:
    """The setting for which a step fits in `available` bytes."""
    training = prepared.recipe.training
    fitting = memory.fitting(available)
    ways = range(training.accumulation, training.batch_size + 1)
    enough = next(
        (n for n in ways if training.batch_size % n == 0 and training.batch_size // n <= fitting), 0
    )
    if not enough:
        return "not even one image at a time fits; choose a smaller model, or --recompute."
    return f"{training.batch_size // enough} images at a time fit: --set training.accumulation={enough}"


def cpu_seconds(prepared: Prepared) -> float:
    """Rough time of the whole run on this CPU: three forward passes per image, by the cost model."""
    from arm_core.model.cost import cost_table

    operations = 3 * 2 * sum(part.multiply_adds for part in cost_table(prepared.spec))
    images = prepared.plan.total_steps * prepared.recipe.training.batch_size
    return images * operations / (CPU_OPERATIONS * (os.cpu_count() or 1))


def physical_memory() -> int | None:
    """Bytes of this machine's memory; None if unknown."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return None


def _images(source: ImageSource) -> str:
    classes = f" of {len(source.classes)} classes" if source.classes else ""
    return f"{len(source):,} images{classes}"


def _number(value: Fraction) -> str:
    return f"{float(value):.6g}"
