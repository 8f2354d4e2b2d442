"""The training runs of the demonstration. All except the first are independent, so they share the cores.

On a CPU, each run uses one thread of a worker process. A network this small cannot keep all cores busy, so
this is faster than one run at a time on all cores.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing import connection, get_context, parent_process
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from arm_core.data.digits import Digits
    from arm_core.engine.protocol import EngineOptions
    from arm_core.recipe.recipe import Recipe

Rows = list[dict[str, Any]]
"""The rows of a run's `metrics.jsonl`."""

MOST_PROCESSES = 4
"""More would only wait for the pretraining run."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One training run on the digits."""

    folder: Path
    recipe: Recipe
    start: Path | None = None
    """Run with the initial weights; None for random weights from the recipe's seed."""
    evaluate_on: str | None = None
    """Split that the recipe's evaluations use; None for none."""


def run_job(job: Job, backend: str, options: EngineOptions) -> Rows:
    """Train, in this process. Raises ClickException if a signal ended the run early."""
    from arm_cli.opening import find_model
    from arm_cli.training.run import create_engine, first_state, prepare, train
    from arm_core.data.digits import Digits
    from arm_core.engine.ranks import ALONE
    from arm_core.engine.registry import choose_backend
    from arm_core.training.run_folder import start_run

    prepared = prepare(job.recipe, ALONE)
    size = prepared.spec.image_size
    prepared = replace(prepared, evaluation=Digits(job.evaluate_on, size=size) if job.evaluate_on else None)
    origin = find_model(str(job.start)).model if job.start else None
    state = first_state(prepared, origin, lambda sentence: None)
    engine, record = create_engine(choose_backend(backend), options, prepared, state, ALONE)
    with start_run(job.folder, job.recipe, prepared.spec) as run:
        outcome = train(run, engine, record, prepared, ALONE)
        if outcome.signal:
            raise click.ClickException(
                f"stopped by {outcome.signal}; `arm demo` starts again from the beginning"
            )
        return run.metrics()


def training_digits(recipe: Recipe) -> Digits:
    """The training digits of a recipe, with its number of labels per class, chosen by its seed."""
    from arm_core.data.digits import Digits

    size = recipe.spec(10).image_size
    seed, labels = recipe.training.seed, recipe.data.labels_per_class
    return Digits("train", size=size, seed=seed, labels_per_class=labels)


def run_all(
    first: Job, jobs: list[Job], backend: str, options: EngineOptions, done: Callable[[Job, Rows], None]
) -> dict[Path, Rows]:
    """Run `first` and all `jobs`; jobs that start from it run after it. Returns rows by folder.

    `done` is called after each run. On devices other than a CPU, one run is active at a time. An error or
    Ctrl-C kills the worker processes; their incomplete runs are not used.
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
    with _workers(processes) as pool:
        running: dict[Future[Rows], Job] = {}

        def submit(some: list[Job]) -> None:
            running.update({pool.submit(run_job, job, backend, options): job for job in some})

        with _interrupts_blocked():  # the workers are started here and inherit this
            submit([first, *free])
        while running:
            for future in wait(running, return_when="FIRST_COMPLETED").done:
                job = running.pop(future)
                finish(job, future.result())
                if job is first:
                    submit(waiting)
    return results


@contextmanager
def _workers(count: int) -> Iterator[ProcessPoolExecutor]:
    """Worker processes. An error or Ctrl-C in the block kills them, so that the exit does not wait."""
    before = set(multiprocessing.active_children())
    # Spawned: a forked process must not use the threads of an engine that was loaded before.
    pool = ProcessPoolExecutor(count, mp_context=get_context("spawn"), initializer=_end_with_parent)
    try:
        yield pool
    except BaseException:
        for process in set(multiprocessing.active_children()) - before:
            process.kill()
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    pool.shutdown()


@contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """Processes started in the block ignore Ctrl-C, which a terminal sends to the whole group.

    Only this process handles it, after the end of the block.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_with_parent() -> None:
    """In a new process: exit when the process that started it has ended, for whatever reason."""
    parent = parent_process()
    assert parent is not None

    def watch() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def on_cpu(backend: str, options: EngineOptions) -> bool:
    """Whether these options select a CPU."""
    from arm_core.engine.registry import choose_backend

    device = options.device if options.device != "auto" else choose_backend(backend).devices()[0]
    return device == "cpu"
