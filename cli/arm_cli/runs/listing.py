"""`arm runs list`: the runs in a folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from arm_cli.options import json_option
from arm_cli.show import echo, print_json, print_table

if TYPE_CHECKING:
    from arm_core.training.history import RunHistory


@click.command("list", short_help="List the runs in a folder.")
@click.argument("folder", default="runs", metavar="[DIR]")
@json_option
def command(folder: str, as_json: bool) -> None:
    """List the runs in DIR (default: runs) at any depth, with their progress and best result."""
    from arm_cli.runs import facts
    from arm_core.training.history import find_runs
    from arm_core.training.run_folder import METRICS

    found: list[RunHistory] = []
    for path in find_runs(Path(folder)):
        try:
            found.append(facts.open_run(str(path)))
        except (ValueError, OSError) as error:
            echo(f"Warning: {path}: cannot be read; skipped: {error}", err=True)
    if as_json:
        print_json([summary(history) for history in found])
        return
    if not found:
        echo(f"no runs in {folder}", err=True)
        return
    rows = []
    for history in found:
        encoder = history.recipe.model.encoder()
        place = history.path.relative_to(folder)
        rows.append((
            str(place) if place.parts else str(history.path),
            str(history.recipe.stage),
            f"{encoder.width} x {encoder.depth}",
            facts.state(history),
            facts.trained(history),
            facts.result(history),
            facts.age(history.path / METRICS),
        ))  # fmt: skip
    head = ("run", "stage", "width x depth", "state", "trained", "best result", "last row")
    print_table(head, rows, text=(1, 3, 5))


def summary(history: RunHistory) -> dict[str, Any]:
    """A run as JSON."""
    from arm_cli.runs import facts

    return {
        "run": str(history.path),
        "stage": str(history.recipe.stage),
        "parent": history.parent,
        "step": history.step,
        "total_steps": history.total_steps,
        "finished": history.finished,
        "hours": history.hours[-1] if history.hours else 0.0,
        "images_per_s": facts.rate(history),
        "loss": history.training[-1]["loss"] if history.training else None,
        "best": history.best,
        "checkpoints": list(history.checkpoints),
    }
