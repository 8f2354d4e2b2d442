"""The demonstration's training runs: independent of each other but for one, so they share the cores.

On a CPU every run takes one thread of a process of its own. That is faster than one run after the other on
all cores, which a network this small cannot keep busy, and a busy machine slows it down far less.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, replace
from multiprocessing import connection, get_context, parent_process
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from arm_core.data.digits import Digits
    from arm_core.engine.protocol import Array, EngineOptions
    from arm_core.model.spec import ModelSpec
    from arm_core.recipe.recipe import Recipe

Rows = list[dict[str, Any]]
"""The rows of a run's `metrics.jsonl`."""

MOST_PROCESSES = 4
"""More would wait for the pretraining run all the same."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One training run on the digits."""

    folder: Path
    recipe: Recipe
    start: Path | None = None
    """Run whose weights it starts from; None for fresh ones, drawn from the recipe's seed."""
    evaluate_on: str | None = None
    """Split that the recipe's evaluations use; None for none."""


def run_job(job: Job, backend: str, options: EngineOptions) -> Rows:
    """Train, in this process. Raises ClickException where a signal ended the run early."""
    from arm_core.data.digits import Digits
    from arm_core.engine.protocol import TrainingState
    from arm_core.engine.registry import choose_backend
    from arm_core.training.run_folder import start_run
    from arm_core.training.trainer import Trainer

    train = training_digits(job.recipe)
    spec = job.recipe.spec(len(train.classes))
    test = Digits(job.evaluate_on, size=spec.image_size) if job.evaluate_on else None
    chosen = choose_backend(backend)
    state = TrainingState(parameters=first_weights(job, spec))
    engine = chosen.create_engine(spec, state, optimizer=job.recipe.optimizer, options=options)
    with start_run(job.folder, job.recipe, spec) as run:
        session = {"backend": chosen.name, "version": chosen.version()}
        outcome = Trainer(run, engine, train, test, session=session).train()
        if outcome.signal:
            raise click.ClickException(f"stopped by {outcome.signal}; `arm demo` starts anew")
        return run.metrics()


def training_digits(recipe: Recipe) -> Digits:
    """The training digits of a recipe: as many labels per class, chosen by its seed."""
    from arm_core.data.digits import Digits

    size = recipe.spec(10).image_size
    seed, labels = recipe.training.seed, recipe.data.labels_per_class
    return Digits("train", size=size, seed=seed, labels_per_class=labels)


def first_weights(job: Job, spec: ModelSpec) -> Mapping[str, Array]:
    """Weights that a job starts from."""
    from arm_cli.opening import find_model
    from arm_convert.adapt import to_classifier
    from arm_core.model.parameters import HEAD_STD, initial_parameters
    from arm_core.model.spec import ClassifierSpec

    seed = job.recipe.training.seed
    if job.start is None:
        return initial_parameters(spec, seed)
    assert isinstance(spec, ClassifierSpec)
    head_std = getattr(job.recipe.model, "head_std", None) or HEAD_STD
    model = find_model(str(job.start)).model
    made = to_classifier(model.spec, model.arrays, spec, seed=seed, head_std=head_std)
    return {name: tensor.read() for name, tensor in made.items()}


def run_all(
    first: Job, jobs: list[Job], backend: str, options: EngineOptions, done: Callable[[Job, Rows], None]
) -> dict[Path, Rows]:
    """Run `first` and all `jobs`, those that start from it after it; rows by folder.

    `done` is told of each run as it ends. FailedElsewhere than on a CPU they run one after the other.
    """
    processes = min(os.cpu_count() or 1, MOST_PROCESSES) if on_cpu(backend, options) else 1
    results: dict[Path, Rows] = {}

    def finish(job: Job, rows: Rows) -> None:
        results[job.folder] = rows
        done(job, rows)

    if processes == 1:
        for job in [first, *jobs]:
            finish(job, run_job(job, backend, options))
        return results
    if options.threads is None:
        options = replace(options, threads=1)
    free = [job for job in jobs if job.start is None]
    waiting = [job for job in jobs if job.start is not None]
    # Spawned, since a forked process must not use the threads of an engine that was loaded before.
    context = get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context, initializer=_end_with_parent) as pool:
        running: dict[Future[Rows], Job] = {}

        def submit(some: list[Job]) -> None:
            running.update({pool.submit(run_job, job, backend, options): job for job in some})

        submit([first, *free])
        try:
            while running:
                for future in wait(running, return_when="FIRST_COMPLETED").done:
                    job = running.pop(future)
                    finish(job, future.result())
                    if job is first:
                        submit(waiting)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return results


def _end_with_parent() -> None:
    """In a new process: do not outlive the one that started it, however that one ends."""
    parent = parent_process()
    assert parent is not None

    def watch() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def on_cpu(backend: str, options: EngineOptions) -> bool:
    """Whether these options mean a CPU."""
    from arm_core.engine.registry import choose_backend

    device = options.device if options.device != "auto" else choose_backend(backend).devices()[0]
    return device == "cpu"
