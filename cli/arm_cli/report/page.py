"""The page of `arm report`."""

from __future__ import annotations

import shlex
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from arm_cli.report.samples import Samples
    from arm_core.training.history import RunHistory

EVALUATION = {
    "step": "step", "epoch": "epoch", "eval_loss": "loss", "eval_top1": "top-1 %", "eval_top5": "top-5 %",
    "ema_loss": "averaged: loss", "ema_top1": "averaged: top-1 %", "ema_top5": "averaged: top-5 %",
    "eval_images": "images",
}  # fmt: skip
"""Columns of the evaluations: key and title."""
TITLES = {"pretrain": "Pretraining", "finetune": "Finetuning"}
MOST = 200
"""Evaluations in the table; of more, every n-th and the last."""
ENVIRONMENT = (
    "started", "step", "backend", "version", "device", "scan", "precision", "threads", "compile", "ranks",
    "recompute", "shard", "deterministic", "arm_vision", "python", "machine", "command",
)  # fmt: skip
"""Entries of a session, in this order; one that no session has is omitted."""


def write_up(history: RunHistory, samples: Samples) -> str:
    """The page's HTML; ValueError if it would be too large."""
    from arm_cli.pages.blocks import Blocks
    from arm_cli.runs import facts
    from arm_cli.runs.curves import charts
    from arm_cli.training.summary import model_line

    name, blocks = facts.name_of(history), Blocks()
    model = model_line(history.spec) if history.spec is not None else "model not recorded"
    lead = [
        f"{TITLES[history.recipe.stage]} ({facts.state(history)}). {facts.result(history).capitalize()}; "
        f"{facts.trained(history)} of training, without evaluations and pauses.",
        f"Model: {model}.",
    ]
    blocks.heading("Curves")
    blocks.charts(charts([history], [""]))
    blocks.heading("Evaluations")
    _evaluations(blocks, history)
    blocks.heading("Sample predictions")
    blocks.text(samples.note)
    for group in samples.groups:
        if group.pictures:
            if group.title:
                blocks.text(group.title)
            blocks.pictures(group.pictures, small=group.small)
    blocks.heading("Environment")
    _environment(blocks, history)
    _recipe(blocks, history)
    blocks.heading("How to repeat it")
    blocks.text(
        "Each command below was one start of the run. The same commands with the same images repeat it; with "
        "--deterministic on the same kind of machine, bit for bit."
    )
    blocks.code("\n".join(repeat(history)))
    now = datetime.now(UTC).isoformat(timespec="minutes")
    return blocks.render(f"Run {name}", lead, footer=f"{history.path.resolve()}, {now}")


def _evaluations(blocks: Any, history: RunHistory) -> None:
    rows = list(history.evaluations)
    if not rows:
        blocks.text("The run has not been evaluated.")
        return
    if len(rows) > MOST:
        every = -(-len(rows) // MOST)
        rows = [row for i, row in enumerate(rows) if i % every == 0 or i == len(rows) - 1]
    keys = [key for key in EVALUATION if any(key in row for row in rows)]

    def cell(key: str, value: Any) -> str:
        if value is None:
            return "-"
        if key.endswith(("top1", "top5")):
            return f"{100 * value:.2f}"
        return f"{value:.4f}" if key.endswith("loss") else str(value)

    blocks.table(
        [EVALUATION[key] for key in keys], [[cell(key, row.get(key)) for key in keys] for row in rows]
    )


def _environment(blocks: Any, history: RunHistory) -> None:
    sessions = history.sessions
    if not sessions:
        blocks.text("No start of the run is recorded.")
        return
    keys = [key for key in ENVIRONMENT if any(key in row for row in sessions)]
    head = ["", *(f"start {i}" for i in range(1, len(sessions) + 1))]
    blocks.table(head, [[key, *(str(row.get(key, "-")) for row in sessions)] for key in keys])


def _recipe(blocks: Any, history: RunHistory) -> None:
    from arm_cli.runs import facts
    from arm_core.recipe.recipe import to_toml

    name, note, parent = facts.parent_of(history)
    changed = facts.differences([parent, history.recipe])
    blocks.heading("Recipe")
    if changed:
        blocks.text(f"Differences from {name} ({note}):")
        blocks.table(("setting", name, "this run"), changed)
    else:
        blocks.text(f"Equal to {name} ({note}), except for data paths and workers.")
    blocks.code(to_toml(history.recipe), summary="Every setting (recipe.toml)")


def repeat(history: RunHistory) -> list[str]:
    """The recorded commands; without them, the command that runs the recipe."""
    commands = [row["command"] for row in history.sessions if isinstance(row.get("command"), str)]
    recipe = shlex.quote(str(history.path / "recipe.toml"))
    return commands or [f"arm {history.recipe.stage} {recipe} --out RUN2"]
