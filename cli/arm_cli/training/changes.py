"""From options to settings: the keys of a recipe that a command line changes, and the option of each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from arm_cli.training.options import RecipeChanges
    from arm_core.recipe.recipe import Recipe
    from arm_core.recipe.toml import Span


@dataclass(frozen=True)
class Change:
    """One assignment, `section.key=value`, and the option that requested it."""

    assignment: str
    option: str

    @property
    def key(self) -> str:
        return self.assignment.partition("=")[0].strip()


def changes_of(options: RecipeChanges, recipe: Recipe, precision: str | None = None) -> list[Change]:
    """The changes that `options` make to `recipe`, in order: --set first, then the other options.

    --batch-size does not enlarge micro-batches. --epochs and --steps shorten a warm-up that would no longer
    fit. --lr is divided by the factor by which the recipe's batch size scales it. Raises ValueError for
    options that exclude each other, and for an invalid --set on which others depend.
    """
    from arm_core.data.opening import together
    from arm_core.recipe.recipe import override
    from arm_core.recipe.schedule import REFERENCE_BATCH
    from arm_core.recipe.toml import Span

    if options.epochs is not None and options.steps is not None:
        raise ValueError("--epochs and --steps both set the length of the run; pass one of them")
    found = [Change(text, "--set") for text in options.assignments]
    explicit = {change.key for change in found}

    def add(option: str, key: str, value: object) -> None:
        if value is not None:
            found.append(Change(f"{key}={value}", option))

    if options.data or options.eval_data is not None:
        option = "--data" if options.data else "--eval-data"
        add(option, "data.source", "folder")
        if recipe.data.labels_per_class is not None and "data.labels_per_class" not in explicit:
            add(option, "data.labels_per_class", "none")  # a setting of the built-in digits
    add("--data", "data.path", together(options.data) if options.data else None)
    add("--eval-data", "data.eval_path", options.eval_data)
    add("--data-format", "data.format", options.data_format)
    add("--val-fraction", "data.val_fraction", options.val_fraction)
    add("--on-bad-image", "data.on_bad_image", options.on_bad_image)
    add("--batch-size", "training.batch_size", options.batch_size)
    if options.batch_size is not None and "training.accumulation" not in explicit:
        most = recipe.training.micro_batch
        add("--batch-size", "training.accumulation", _accumulation(options.batch_size, most))
    if options.epochs is not None:
        length = Span(options.epochs, "epochs")
    elif options.steps is not None:
        length = Span(options.steps, "steps")
    else:
        length = None
    if length is not None:
        option = f"--{length.unit}"
        add(option, "training.length", length)
        if "schedule.warmup" not in explicit:
            add(option, "schedule.warmup", _shorter_warmup(recipe, length))
    if options.lr is not None:
        batch = override(recipe, [change.assignment for change in found]).training.batch_size
        add("--lr", "schedule.base_lr", repr(options.lr * REFERENCE_BATCH / batch))
    add("--workers", "data.workers", options.workers)
    add("--seed", "training.seed", options.seed)
    add("--image-size", "model.image_size", options.image_size)
    add("--precision", "training.precision", precision)
    return found


def apply(recipe: Recipe, changes: list[Change]) -> Recipe:
    """The recipe with these changes."""
    from arm_core.recipe.recipe import override

    return override(recipe, [change.assignment for change in changes])


def _accumulation(batch: int, most: int) -> int:
    """The smallest number of equal micro-batches with at most `most` images each."""
    return next(n for n in range(1, batch + 1) if batch % n == 0 and batch // n <= most)


def _shorter_warmup(recipe: Recipe, length: Span) -> Span | None:
    """The warm-up that keeps its part of the run; None if the recipe's warm-up still fits."""
    from arm_core.recipe.toml import Span

    warmup, before = recipe.schedule.warmup, recipe.training.length
    if warmup.amount == 0 or warmup.unit != before.unit:
        return None
    if length.unit == before.unit and length.amount >= 2 * warmup.amount:
        return None
    amount = warmup.amount / before.amount * length.amount
    return Span(int(amount) if length.unit == "steps" else round(amount, 4), length.unit)
