"""Choose the demonstration's learning rates, on validation digits and seeds that it leaves out itself.

    python benchmarks/tune_demo.py

Pretrains once, then finetunes both starting points at each learning rate and layer decay below, and
prints mean and deviation of the validation accuracy. What is chosen is written into the recipes
`finetune-digits` and `scratch-digits` by hand; the test digits are never read here.
"""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path

import click
import numpy as np

from arm_cli.demo import ARMS, LABELS, first_weights
from arm_core.backend import Backend, EngineOptions, choose_backend
from arm_core.data.digits import Digits
from arm_core.data.source import Source
from arm_core.parameters import initial_parameters
from arm_core.recipe import Recipe, load_recipe, override
from arm_core.run import start_run
from arm_core.trainer import Trainer

SEEDS = (100, 101)
BASE_LR = {"pretrained": (1.25e-2, 2.5e-2, 5e-2, 1e-1), "from scratch": (1.25e-2, 2.5e-2, 5e-2, 1e-1)}
LAYER_DECAY = {"pretrained": (0.6, 0.75), "from scratch": (1.0, 0.75)}


def train(
    backend: Backend, recipe: Recipe, start: dict, source: Source, test: Source | None, threads: int | None
) -> tuple[dict, list[dict]]:
    """One run in a folder that is thrown away: final parameters, and the rows of its metrics."""
    classes = len(source.classes) if recipe.stage == "finetune" else None
    spec = recipe.spec(classes)
    engine = backend.create_engine(
        spec, start, optimizer=recipe.optimizer, options=EngineOptions(threads=threads)
    )
    with tempfile.TemporaryDirectory() as folder, start_run(Path(folder) / "run", recipe, spec) as run:
        Trainer(run, engine, source, test).train()
        return engine.export_state().parameters, run.metrics()


@click.command()
@click.option("--backend", default="auto")
@click.option("--threads", type=int)
def main(backend: str, threads: int | None) -> None:
    chosen = choose_backend(backend)
    recipe = load_recipe("pretrain-digits")
    spec = recipe.spec(None)
    start = initial_parameters(spec, recipe.training.seed)
    pretrained, rows = train(chosen, recipe, start, Digits("train", size=spec.image_size), None, threads)
    print(f"{chosen.version()}; pretraining loss {rows[-1]['loss']:.4f}", flush=True)
    validation = Digits("validation", size=spec.image_size)
    print(f"validation accuracy, %, seeds {SEEDS}: mean ± half the range, at each evaluation", flush=True)
    for labels, arm in itertools.product(LABELS, ARMS):
        for decay, base_lr in itertools.product(LAYER_DECAY[arm], BASE_LR[arm]):
            runs = []
            for seed in SEEDS:
                changes = {
                    "data.labels_per_class": labels,
                    "training.seed": seed,
                    "schedule.base_lr": base_lr,
                    "optimizer.layer_decay": decay,
                }
                finetune = override(load_recipe(ARMS[arm]), [f"{k}={v}" for k, v in changes.items()])
                digits = Digits("train", size=spec.image_size, seed=seed, labels_per_class=labels)
                weights = first_weights(arm, finetune, spec, pretrained, seed)
                _, rows = train(chosen, finetune, weights, digits, validation, threads)
                runs.append([100 * row["eval_top1"] for row in rows if "eval_top1" in row])
            values = np.array(runs)
            text = "  ".join(
                f"{m:5.1f} ± {r:4.1f}" for m, r in zip(values.mean(0), np.ptp(values, 0) / 2, strict=True)
            )
            print(
                f"{labels:3d} labels  {arm:12s}  base_lr {base_lr:<8g} decay {decay:<5g} {text}", flush=True
            )


if __name__ == "__main__":
    main()
