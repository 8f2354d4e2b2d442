"""Choose learning rates and layer decays for classifiers on the digits, on validation digits.

    python benchmarks/tune_demo.py --out TUNING --jobs 2 [--steps 140] [--labels 10,20] [--write FILE.md]

Pretrains once with `pretrain-digits`, then sweeps both starting points over the grids below. The test digits
and the seeds of the demonstration are not used. The values that are chosen are written into the recipes
`finetune-digits` and `scratch-digits` by hand. A grid whose best value is at its edge is reported: extend it
and run the command again, which keeps the finished runs.
"""

from __future__ import annotations

import datetime
from pathlib import Path

import click
import numpy as np
from hardware import header

from arm_cli.sweep.folder import Definition, SweepFolder, results_of
from arm_cli.sweep.members import Factor
from arm_cli.sweep.table import Row, rows
from arm_cli.sweep.workers import Event, run_members
from arm_core.engine.protocol import EngineOptions
from arm_core.engine.registry import choose_backend
from arm_core.recipe.recipe import load_recipe, override

SEEDS = ("100", "101")
LR, DECAY = "schedule.base_lr", "optimizer.layer_decay"
GRIDS = {
    "pretrained": {LR: ("0.05", "0.07", "0.1", "0.14"), DECAY: ("0.4", "0.5", "0.6", "0.7")},
    "from scratch": {LR: ("0.0175", "0.025", "0.035", "0.05", "0.1"), DECAY: ("0.6", "0.75", "0.9", "1.0")},
}
RECIPES = {"pretrained": "finetune-digits", "from scratch": "scratch-digits"}


def define(arm: str, steps: int, labels: tuple[str, ...]) -> Definition:
    """The sweep of one starting point."""
    changes = [f"training.{key}={steps} steps" for key in ("length", "save_every", "evaluate_every")]
    recipes = {"finetune": override(load_recipe(RECIPES[arm]), changes)}
    if arm == "pretrained":
        recipes = {"pretrain": load_recipe("pretrain-digits"), **recipes}
    stage = "finetune" if arm == "pretrained" else None
    values = {**GRIDS[arm], "data.labels_per_class": labels, "training.seed": SEEDS}
    factors = tuple(Factor(key=key, stage=stage, values=found) for key, found in values.items())
    return Definition(recipes=recipes, factors=factors)


def report(arm: str, table: list[Row], labels: tuple[str, ...]) -> str:
    """The grid as Markdown: mean over seeds, by labels per class, and the mean of these; the best in bold."""
    grid: dict[tuple[str, str], dict[str, Row]] = {}
    for row in table:
        lr, decay, label = (value for _, value in row.levels)
        grid.setdefault((lr, decay), {})[label] = row
    means = {
        key: float(np.mean([np.mean(list(row.values.values())) for row in found.values()]))
        for key, found in grid.items()
        if all(row.values for row in found.values())
    }
    best = max(means, key=lambda key: means[key])
    lines = [
        f"## {arm}",
        "",
        "| base_lr | layer decay | " + " | ".join(f"{n} labels" for n in labels) + " | mean |",
        "|---" * (3 + len(labels)) + "|",
    ]
    for key, mean in means.items():
        cells = [f"{np.mean(list(grid[key][n].values.values())):.1f}" for n in labels]
        bold = "**" if key == best else ""
        lines.append(f"| {' | '.join([*key, *cells])} | {bold}{mean:.1f}{bold} |")
    edges = [
        f"{name} = {value}"
        for (name, values), value in zip(GRIDS[arm].items(), best, strict=True)
        if value in (min(values, key=float), max(values, key=float)) and value != "1.0"
    ]
    where = f"at the edge of the grid ({', '.join(edges)}); extend it" if edges else "inside the grid"
    return "\n".join([*lines, "", f"Best: base_lr {best[0]}, layer decay {best[1]}; {where}.", ""])


@click.command()
@click.option("--out", required=True, help="Folder of the runs; the same folder resumes.")
@click.option("--jobs", default=2, show_default=True)
@click.option("--steps", default=140, show_default=True, help="Length of finetuning.")
@click.option("--labels", default="10,20", show_default=True, help="Labels per class, averaged over.")
@click.option("--backend", default="auto", show_default=True)
@click.option("--write", type=click.Path(path_type=Path), help="Also write the tables to this file.")
def main(out: str, jobs: int, steps: int, labels: str, backend: str, write: Path | None) -> None:
    counts, name = tuple(labels.split(",")), choose_backend(backend).name

    def done(event: Event) -> None:
        if event.result is not None:
            value = event.result.error or event.result.metrics.get("eval_top1", event.result.metrics["loss"])
            click.echo(f"{event.member}: {value}", err=True)

    parts = [
        f"# Learning rates on the digits, {datetime.datetime.now(datetime.UTC).date()}",
        "",
        f"Command: `python benchmarks/tune_demo.py --out TUNING --steps {steps} --labels {labels}`.",
        f"Accuracy on the validation digits after {steps} steps, %: mean over the seeds {', '.join(SEEDS)}. "
        "The test digits were not read.",
        "",
        *(f"    {line}" for line in header("torch", "numpy").splitlines()),
        "",
    ]
    for arm in GRIDS:
        folder, definition = SweepFolder(Path(out) / arm.replace(" ", "-")), define(arm, steps, counts)
        with folder.locked():
            folder.write(definition)
        members = definition.members()
        run_members(folder, members, name, EngineOptions(), jobs=jobs, report=done)
        table = rows(definition, members, results_of(folder, members), "eval_top1")
        parts.append(report(arm, table, counts))
    text = "\n".join(parts)
    print(text)
    if write is not None:
        write.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
