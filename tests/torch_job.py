"""The processes of `tests/torch_engine/test_distributed.py`, run by torchrun.

torch_job.py runs TASKS   trainings in order: JSON, a list of keyword arguments of `train`
torch_job.py arm WORDS    the command line; with KILL=RANK:STEP a process kills itself in the first start
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

from toy_engine import state_of

from arm_core.data import Synthetic
from arm_core.engine import ranks as ranks_module
from arm_core.engine.protocol import EngineOptions
from arm_core.engine.ranks import ALONE, Ranks, lead
from arm_core.engine.registry import choose_backend
from arm_core.recipe.recipe import Recipe, load_recipe, override
from arm_core.training.observer import Observer
from arm_core.training.run_folder import resume_run, start_run
from arm_core.training.trainer import Trainer

COMMON = [
    "model.width=16",
    "model.depth=6",
    "model.image_size=24",
    "optimizer.ema_decay=0.9",
    "optimizer.clip=0.5",
    "training.batch_size=12",
    "training.accumulation=6",
    "training.length=4 steps",
    "training.log_every=2",
    "training.drop_path=0.2",
    "training.evaluate_every=4 steps",
    "schedule.warmup=1 step",
]
CHANGES = {
    "pretrain": [*COMMON, "model.decoder_width=16", "model.decoder_heads=2"],
    "finetune": [*COMMON, "data.labels_per_class=none", "mixing.mixup=0.8"],
}
"""Micro-batches of 2; the 6 of an update are divided evenly by 1, 2 or 3 processes, but not by 4."""


def make_recipe(stage: str) -> Recipe:
    return override(load_recipe(f"{stage}-digits"), CHANGES[stage])


class Stopper(Observer):
    """Sends SIGTERM to this process after a step was passed to the engine."""

    def __init__(self, step: int | None) -> None:
        self.step = step

    def stepped(self, step: int, images: int) -> None:
        if step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


def train(
    path: str, stage: str = "finetune", *, ranks: Ranks = ALONE, stop: int | None = None, **options: bool
) -> None:
    """Start or resume a run at `path`; `stop`: the step after which the last rank receives a signal."""
    recipe = make_recipe(stage)
    images, held_out = (Synthetic(n, (24, 24), classes=3, seed=n) for n in (37, 11))
    begun = lead(ranks, lambda: (Path(path) / "checkpoints").exists())
    run = (
        resume_run(path, warn=print, ranks=ranks)
        if begun
        else start_run(path, recipe, recipe.spec(3), ranks=ranks)
    )
    with run:
        engine = choose_backend("torch").create_engine(
            run.spec,
            state_of(run),
            optimizer=recipe.optimizer,
            options=EngineOptions(device="cpu", threads=1, **options),
            ranks=ranks,
        )
        observer = Stopper(stop if ranks.rank == ranks.world - 1 else None)
        outcome = Trainer(run, engine, images, held_out, observer=observer, ranks=ranks).train()
    assert outcome.step == (stop or 4), outcome


def run_tasks(tasks: list[dict[str, object]]) -> None:
    ranks_module.PACE = 0.0  # exchange after each step
    ranks = choose_backend("torch").join("cpu")
    for task in tasks:
        train(ranks=ranks, **task)
    ranks.close()


def run_arm(words: list[str]) -> None:
    from arm_cli.main import main
    from arm_cuda.engine import TorchEngine

    rank, step = map(int, os.environ.get("KILL", "-1:0").split(":"))
    first = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
    if first and os.environ.get("RANK") == str(rank):
        whole = TorchEngine.train_step

        def dying(self, batches, **settings):
            if settings["step"] == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return whole(self, batches, **settings)

        TorchEngine.train_step = dying
    main(words)


if __name__ == "__main__":
    if sys.argv[1] == "runs":
        run_tasks(json.loads(sys.argv[2]))
    else:
        run_arm(sys.argv[2:])
