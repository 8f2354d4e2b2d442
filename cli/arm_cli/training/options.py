"""The options of a training run, each declared once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import click

from arm_cli.declare import added_by, option, options_of
from arm_cli.options import EngineChoice, data_format_option, engine_options, json_option
from arm_cli.training.trackers import NAMES

F = TypeVar("F", bound=Callable[..., Any])

POSITIVE = click.IntRange(min=1)


@dataclass(frozen=True)
class RecipeChanges:
    """Options that change settings of the recipe; `arm_cli.training.changes` applies them."""

    data: tuple[str, ...] = option(
        "--data",
        multiple=True,
        metavar="PATH",
        help="Images to train on (data.path): a folder, CSV, JSONL, parquet or tar files, or "
        "hf://datasets/USER/NAME; several are joined.",
    )
    eval_data: str | None = option(
        "--eval-data", metavar="PATH", help="Images to evaluate on (data.eval_path)."
    )
    data_format: str | None = added_by(data_format_option)
    val_fraction: float | None = option(
        "--val-fraction",
        type=click.FloatRange(min=0, max=1, min_open=True, max_open=True),
        help="Part of the training images to evaluate on instead (data.val_fraction).",
    )
    on_bad_image: str | None = option(
        "--on-bad-image",
        type=click.Choice(("fail", "skip")),
        help="Stop at an image that cannot be decoded, or use the next one (data.on_bad_image).",
    )
    epochs: float | None = option(
        "--epochs",
        type=click.FloatRange(min=0, min_open=True),
        help="Length in passes over the data (training.length).",
    )
    steps: int | None = option("--steps", type=POSITIVE, help="Length in updates (training.length).")
    batch_size: int | None = option(
        "--batch-size",
        type=POSITIVE,
        help="Images per update (training.batch_size); accumulation changes too, memory use does not.",
    )
    lr: float | None = option(
        "--lr",
        type=click.FloatRange(min=0, min_open=True),
        help="Peak learning rate of the run; sets schedule.base_lr to LR * 256 / batch size.",
    )
    workers: int | None = option(
        "--workers", type=click.IntRange(min=0), help="Threads that prepare images (data.workers)."
    )
    seed: int | None = option("--seed", type=click.IntRange(min=0), help="Seed of the run (training.seed).")
    image_size: str | None = option(
        "--image-size", metavar="HxW", help="224, or height x width: 192x256 (model.image_size)."
    )
    assignments: tuple[str, ...] = option(
        "--set", multiple=True, metavar="A.B=C", help="Change any setting; `arm config RECIPE` lists them."
    )


@dataclass(frozen=True)
class Request:
    """The training run that the user requests."""

    recipe: str | None = added_by(click.argument("recipe", required=False))
    out: str | None = option("--out", metavar="RUN", help="Folder of the run; by default runs/RECIPE.")
    resume: str | None = option(
        "--resume",
        metavar="RUN|auto",
        help="Resume a run, on any engine; auto: the run in --out, if it exists and has this recipe.",
    )
    dry_run: bool = option(
        "--dry-run", is_flag=True, help="Print the plan of the run and time three steps; write nothing."
    )
    estimate: str | None = option(
        "--estimate",
        metavar="MACHINE[:N]",
        help="With --dry-run: time and memory on N of these machines by the cost model, such as h200:8, "
        "h100:8, a100 or m4-max, instead of timing this one. Without --data, ImageNet-1k is assumed.",
    )
    changes: RecipeChanges = added_by(options_of(RecipeChanges, "changes"))  # noqa: RUF009
    engine: EngineChoice = added_by(engine_options)  # noqa: RUF009
    compiled: str = option(
        "--compile",
        type=click.Choice(("auto", "none", "blocks", "model")),
        default="auto",
        show_default=True,
        help="The part of the model that the engine compiles.",
    )
    accept_changed_data: bool = option(
        "--accept-changed-data",
        is_flag=True,
        help="With --resume: accept images that differ from those of the run, and record the change.",
    )
    recompute: bool = option(
        "--recompute", is_flag=True, help="Recompute blocks in the backward pass: less memory, more time."
    )
    shard: bool = option(
        "--shard", is_flag=True, help="Shard the training state over the processes (torchrun)."
    )
    deterministic: bool = option(
        "--deterministic",
        is_flag=True,
        help="Fix and record CPU threads and GPU algorithms, for bit-identical results.",
    )
    log: tuple[str, ...] = option(
        "--log",
        multiple=True,
        type=click.Choice(NAMES),
        help="Send the rows of metrics.jsonl to this program, too; can be repeated.",
    )
    as_json: bool = added_by(json_option)


def training_options(command: F) -> F:
    """Add the options of a training run; the command receives them as one argument, `request`."""
    return options_of(Request, "request")(command)
