"""Trains one member of a sweep, or resumes it, in this process."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from arm_cli.sweep.folder import Result, SweepFolder
from arm_cli.sweep.members import Member

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from arm_cli.training.run import Prepared
    from arm_core.engine.protocol import Backend, EngineOptions
    from arm_core.training.observer import Observer


class Stopped(Exception):  # noqa: N818
    """A signal ended a member's run early; it can be resumed."""


def train_member(
    folder: SweepFolder,
    member: Member,
    backend: Backend,
    options: EngineOptions,
    *,
    observer: Observer | None = None,
    warn: Callable[[str], None] = lambda sentence: None,
) -> Result:
    """Train a member from its newest checkpoint, or from the beginning.

    Raises Stopped if a signal ended the run early, and what `Trainer` raises.
    """
    from arm_cli.opening import find_model
    from arm_cli.training.origin import with_trunk_of
    from arm_cli.training.run import create_engine, first_state, prepare, train
    from arm_core.engine.ranks import ALONE
    from arm_core.training.checkpoint import saved_steps
    from arm_core.training.determinism import pin
    from arm_core.training.run_folder import resume_run, start_run

    began, path = time.monotonic(), folder.run(member.name)
    if saved_steps(path):
        with resume_run(path, warn=warn) as run:
            assert run.resumed is not None
            prepared = _evaluated_on(member, prepare(run.recipe, ALONE, run.spec))
            options = pin(options, run.resumed.progress.engine)
            engine, record = create_engine(backend, options, prepared, run.resumed.state, ALONE)
            outcome = train(run, engine, record, prepared, ALONE, observer)
            rows = run.metrics()
    else:
        recipe, origin = member.recipe, None
        if start := _start(folder, member):
            origin = find_model(start).model
            recipe = with_trunk_of(origin, recipe, member.chosen, lambda sentence: None)
        prepared = _evaluated_on(member, prepare(recipe, ALONE))
        state = first_state(prepared, origin, lambda sentence: None)
        engine, record = create_engine(backend, options, prepared, state, ALONE)
        if start:
            record["from"] = start
        with start_run(path, recipe, prepared.spec) as run:
            outcome = train(run, engine, record, prepared, ALONE, observer)
            rows = run.metrics()
    if outcome.signal:
        raise Stopped(outcome.signal)
    return Result(
        metrics=last_metrics(rows),
        steps=outcome.step,
        seconds=round(time.monotonic() - began, 1),
        ended=time.time(),
    )


def last_metrics(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Values of the last logged step and of the last evaluation of a run."""
    found: dict[str, float] = {}
    for row in rows:
        found |= {
            name: value
            for name, value in row.items()
            if name.startswith(("eval_", "ema_")) or name in ("loss", "score")
        }
    return found


def _start(folder: SweepFolder, member: Member) -> str | None:
    return str(folder.run(member.after)) if member.after else member.origin


def _evaluated_on(member: Member, prepared: Prepared) -> Prepared:
    from arm_core.data.digits import Digits

    if member.evaluate_on is None:
        return prepared
    name = prepared.recipe.data.source
    return replace(prepared, evaluation=Digits(member.evaluate_on, size=prepared.spec.image_size, name=name))
