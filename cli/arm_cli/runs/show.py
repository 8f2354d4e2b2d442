"""`arm runs show`: one run in the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click

from arm_cli.options import json_option
from arm_cli.show import echo, print_json, print_table

WIDTH = 60
"""Characters of a curve."""
CURVES = {"loss": "loss", "lr": "lr", "grad_norm": "gradient", "images_per_s": "images/s"}
EVALUATIONS = 10
"""The newest evaluations that are printed; --json prints all."""


@click.command("show", short_help="Show one run.")
@click.argument("run")
@json_option
def command(run: str, as_json: bool) -> None:
    """Show the state, curves, evaluations, starts and changed settings of RUN."""
    from arm_cli.runs import facts
    from arm_cli.runs.listing import summary
    from arm_cli.training.display import evaluation_line
    from arm_cli.training.summary import model_line

    history = facts.open_run(run)
    name, note, parent = facts.parent_of(history)
    changed = facts.differences([parent, history.recipe])
    if as_json:
        rows: dict[str, Any] = {
            "training": list(history.training),
            "evaluations": list(history.evaluations),
            "sessions": list(history.sessions),
            "changed": {key: [before, after] for key, before, after in changed},
        }
        print_json(summary(history) | rows)
        return
    rate = facts.rate(history)
    lines = {
        "run": f"{history.path} ({history.recipe.stage})",
        "model": model_line(history.spec) if history.spec is not None else "not recorded",
        "state": facts.state(history),
        "result": facts.result(history),
        "trained": f"{facts.trained(history)}{f', {rate:.3g} images/s (median)' if rate else ''}",
        "saved": ", ".join(f"step {step}" for step in history.checkpoints) or "no checkpoint",
    }
    for label, text in lines.items():
        echo(f"{label:<9}{text}")
    for key, label in CURVES.items():
        values = [row[key] for row in history.training if key in row]
        if len(values) > 1:
            echo(f"{label:<9}{spark(values)} {values[0]:.3g} to {values[-1]:.3g}")
    if history.evaluations:
        echo("\nevaluations", bold=True)
        for row in history.evaluations[-EVALUATIONS:]:
            echo(evaluation_line(row))
    echo(f"\ndifferences from {name} ({note})", bold=True)
    if changed:
        print_table(("setting", name, "run"), changed, left=3)
    else:
        echo("none")
    if history.sessions:
        echo("starts", bold=True)
        for row in history.sessions:
            where = ", ".join(str(row[key]) for key in ("backend", "device", "machine") if key in row)
            echo(f"{row.get('started', '-')} at step {row['step']} ({where})")
            if row.get("command"):
                echo(f"  {row['command']}")


def spark(values: Sequence[float], width: int = WIDTH) -> str:
    """A curve as one line of block characters, from its lowest to its highest value."""
    from arm_cli.training.dry_run import BLOCKS

    count = min(width, len(values))
    bins = [values[i * len(values) // count : (i + 1) * len(values) // count] for i in range(count)]
    means = [sum(part) / len(part) for part in bins]
    low, span, top = min(means), max(means) - min(means), len(BLOCKS) - 2
    return "".join(BLOCKS[1 + round(top * (mean - low) / span if span else 0)] for mean in means)
