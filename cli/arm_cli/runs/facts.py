"""A run in words and tables: its state, its result, and how its recipe differs from others."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arm_cli.recipe import flat, shown
from arm_cli.show import echo

if TYPE_CHECKING:
    from arm_core.recipe.recipe import Recipe
    from arm_core.training.history import RunHistory

PLACES = frozenset({"data.path", "data.eval_path", "data.workers"})
"""Settings of the machine, which a recipe and its runs need not share."""


def open_run(name: str) -> RunHistory:
    """The records of a run; prints a warning if some lines are skipped."""
    from arm_core.training.history import read_history

    return read_history(Path(name), warn=lambda text: echo(f"Warning: {text}", err=True))


def name_of(history: RunHistory) -> str:
    """The last part of the run's path."""
    return history.path.resolve().name


def state(history: RunHistory) -> str:
    """`finished, 400 steps` or `step 120 of 400`."""
    total = history.total_steps
    if history.finished:
        return f"finished, {history.step} steps"
    return f"step {history.step}" if total is None else f"step {history.step} of {total}"


def result(history: RunHistory) -> str:
    """The best evaluation, else the last training loss; `-` without rows."""
    best = history.best
    if best is not None:
        kind = "ema" if best.get("ema_top1", -1.0) > best.get("eval_top1", -1.0) else "eval"
        if f"{kind}_top1" in best:
            return f"top-1 {100 * best[f'{kind}_top1']:.2f} % at step {best['step']}"
        lowest = min(best[name] for name in ("eval_loss", "ema_loss") if name in best)
        return f"evaluation loss {lowest:.4f} at step {best['step']}"
    return f"training loss {history.training[-1]['loss']:.4f}" if history.training else "-"


def rate(history: RunHistory) -> float | None:
    """Median images per second over the rows; None without rows."""
    import statistics

    rates = [row["images_per_s"] for row in history.training if row.get("images_per_s")]
    return statistics.median(rates) if rates else None


def trained(history: RunHistory) -> str:
    """Hours of training, without evaluations and pauses."""
    from arm_cli.progress import duration

    return duration(3600 * history.hours[-1]) if history.training else "-"


def age(path: Path) -> str:
    """The time since a file was changed, `3 min ago`; `-` if it does not exist."""
    if not path.exists():
        return "-"
    seconds = max(0.0, time.time() - path.stat().st_mtime)
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"


def parent_of(history: RunHistory) -> tuple[str, str, Recipe]:
    """The name of a run's parent recipe, a note about it, and the recipe.

    A run of an older version, or one whose recipe file is gone, is compared with the most similar shipped
    recipe.
    """
    from arm_core.recipe.recipe import load_recipe, shipped_recipes

    name = history.parent
    if name is not None:
        try:
            return name, "the recipe from which it was started", load_recipe(name)
        except ValueError:
            pass
    shipped = {other: load_recipe(other) for other in shipped_recipes()}
    same = {other: found for other, found in shipped.items() if found.stage == history.recipe.stage}
    closest = min(same, key=lambda other: len(differences([same[other], history.recipe])))
    why = "its own recipe is not recorded" if name is None else f"{name} cannot be read"
    return closest, f"the most similar shipped recipe; {why}", same[closest]


def differences(recipes: Sequence[Recipe], *, without: frozenset[str] = PLACES) -> list[tuple[str, ...]]:
    """A row for each setting in which recipes differ: the key, then the value in each recipe."""
    settings = [flat(recipe) for recipe in recipes]
    keys = dict.fromkeys(key for values in settings for key in values)
    rows = []
    for key in keys:
        values: list[Any] = [own.get(key) for own in settings]
        if key not in without and any(value != values[0] for value in values[1:]):
            rows.append((key, *(shown(value) for value in values)))
    return rows
