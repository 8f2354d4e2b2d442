"""`--dry-run`: time and disk space of a run, from a few timed steps on the real images; writes nothing."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from arm_cli.progress import duration
from arm_cli.show import echo, scaled

if TYPE_CHECKING:
    from arm_cli.training.run import Prepared
    from arm_core.engine.protocol import Engine
    from arm_core.engine.ranks import Ranks
    from arm_core.training.checkpoint import Progress
    from arm_core.training.plan import Plan

TIMED_STEPS = 3
"""Steps that are timed, after a first one that compiles and allocates."""

PLOT_WIDTH, PLOT_HEIGHT = 60, 4
BLOCKS = " ▁▂▃▄▅▆▇█"


def print_schedule(prepared: Prepared) -> None:
    """Print the learning rate over the run, and the disk space of its checkpoints."""
    echo("\nlearning rate over the run")
    echo(lr_plot(prepared.plan))
    checkpoints, each = disk_use(prepared)
    echo(f"disk     {checkpoints} checkpoints of {scaled(each, 'B')} kept, {scaled(checkpoints * each, 'B')}")


def dry_run(prepared: Prepared, engine: Engine, ranks: Ranks, *, done: Progress | None = None) -> None:
    """Print schedule, disk use, speed and time of a run. Takes real steps; do not use the engine later.

    done: the progress of a run that would be resumed; None for a new run.
    """
    step, position = (done.step, done.position) if done else (0, 0)
    print_schedule(prepared)
    if (left := prepared.plan.total_steps - step) <= 0:
        echo(f"time     none: all {step} steps are done")
        return
    echo(f"timing   {TIMED_STEPS} steps after a first one ...", err=True)
    seconds = time_steps(prepared, engine, ranks, step=step, position=position)
    batch = prepared.recipe.training.batch_size
    echo(f"speed    {batch / seconds:.3g} images/s, {seconds:.3g} s per step (mean of {TIMED_STEPS})")
    evaluated = "" if prepared.evaluation is None else ", evaluations not counted"
    echo(f"time     {duration(seconds * left)} for {left} steps{evaluated}")


def time_steps(
    prepared: Prepared, engine: Engine, ranks: Ranks, *, step: int = 0, position: int = 0
) -> float:
    """Mean seconds of a training step after `step`, including the reading of images."""
    plan, training = prepared.plan, prepared.recipe.training
    began = 0.0
    with plan.open(position, workers=prepared.recipe.data.workers) as loader:
        total = training.accumulation
        for i in range(1, TIMED_STEPS + 2):
            batches = plan.next_batches(loader, position)
            # A rate of 0 does not change the weights; the work is the same.
            engine.train_step(batches, step=step + i, lr=0.0, total_micro_batches=total).result()
            position += total
            if i == 1:
                began = time.monotonic()
    return (time.monotonic() - began) / TIMED_STEPS


def disk_use(prepared: Prepared) -> tuple[int, int]:
    """The largest number of checkpoints that are kept, including the best one, and the bytes of each."""
    from arm_core.model.parameters import parameter_table

    rows = parameter_table(prepared.spec).values()
    trainable = sum(row.size for row in rows if row.trainable)
    fixed = sum(row.size for row in rows if not row.trainable)
    copies = 3 + (prepared.recipe.optimizer.ema_decay is not None)  # weights, two moments, average
    best = prepared.evaluation is not None
    permanent = sum(prepared.plan.kept(step) for step in range(1, prepared.plan.total_steps + 1))
    return prepared.recipe.training.keep + best + permanent, 4 * (copies * trainable + fixed)


def lr_plot(plan: Plan) -> str:
    """The learning rate over the steps, as rows of block characters with the peak at the top."""
    total, eighths = plan.total_steps, len(BLOCKS) - 1
    width = min(PLOT_WIDTH, total)
    rates = [plan.lr(1 + i * (total - 1) // max(1, width - 1)) for i in range(width)]
    peak = max(rates) or 1.0
    heights = [round(rate / peak * PLOT_HEIGHT * eighths) for rate in rates]
    rows = []
    for row in reversed(range(PLOT_HEIGHT)):
        cells = (BLOCKS[min(eighths, max(0, height - row * eighths))] for height in heights)
        label = f"{peak:9.2e} " if row == PLOT_HEIGHT - 1 else " " * 10
        rows.append(f"{label}|{''.join(cells)}".rstrip())
    rows.append(f"{0:9.2e} +{'-' * width}")
    rows.append(f"{'step 1':>16}{f'step {total}':>{max(1, width - 5)}}")
    return "\n".join(rows)
