"""Choose the demonstration's learning rates, on validation digits and seeds that it leaves out itself.

    python benchmarks/tune_demo.py

Pretrains once, then finetunes both starting points at each learning rate and layer decay below, and
prints mean and spread of the validation accuracy. What is chosen is written into the recipes
`finetune-digits` and `scratch-digits` by hand; the test digits are never read here.
"""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path

import click
import numpy as np

from arm_cli.demo.command import ARMS, LABELS
from arm_cli.demo.runs import Job, Rows, run_all
from arm_core.engine.protocol import EngineOptions
from arm_core.engine.registry import choose_backend
from arm_core.recipe.recipe import load_recipe, override

SEEDS = (100, 101)
BASE_LR = {"pretrained": (5e-2, 1e-1), "from scratch": (2.5e-2, 5e-2)}
"""What was left of a wider search, from 1.25e-2 to 1e-1."""
LAYER_DECAY = {"pretrained": (0.6,), "from scratch": (1.0, 0.75)}


@click.command()
@click.option("--backend", default="auto")
def main(backend: str) -> None:
    chosen = choose_backend(backend)
    with tempfile.TemporaryDirectory() as folder:
        pretraining = Job(folder=Path(folder) / "pretrain", recipe=load_recipe("pretrain-digits"))
        jobs: dict[tuple[int, str, float, float], list[Job]] = {}
        for labels, arm in itertools.product(LABELS, ARMS):
            for base_lr, decay, seed in itertools.product(BASE_LR[arm], LAYER_DECAY[arm], SEEDS):
                changes = {
                    "data.labels_per_class": labels,
                    "training.seed": seed,
                    "schedule.base_lr": base_lr,
                    "optimizer.layer_decay": decay,
                }
                recipe = override(load_recipe(ARMS[arm]), [f"{k}={v}" for k, v in changes.items()])
                start = pretraining.folder if arm == "pretrained" else None
                same = jobs.setdefault((labels, arm, decay, base_lr), [])
                name = Path(folder) / f"{len(jobs)}-{seed}"
                same.append(Job(folder=name, recipe=recipe, start=start, evaluate_on="validation"))

        def done(job: Job, rows: Rows) -> None:
            click.echo(".", nl=False, err=True)

        every = [job for same in jobs.values() for job in same]
        rows = run_all(pretraining, every, chosen.name, EngineOptions(), done)
    print(f"{chosen.version()}, seeds {SEEDS}; validation accuracy, %: mean ± half the range\n")
    steps = [row["step"] for row in rows[every[0].folder] if "eval_top1" in row]
    print("| labels | start | layer decay | base_lr | " + " | ".join(f"{s} steps" for s in steps) + " |")
    print("|---" * (4 + len(steps)) + "|")
    for (labels, arm, decay, base_lr), same in sorted(jobs.items()):
        runs = [[100 * r["eval_top1"] for r in rows[job.folder] if "eval_top1" in r] for job in same]
        cells = [f"{m:.1f} ± {d:.1f}" for m, d in zip(np.mean(runs, 0), np.ptp(runs, 0) / 2, strict=True)]
        print(f"| {labels} | {arm} | {decay:g} | {base_lr:g} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
