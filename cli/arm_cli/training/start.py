"""`arm pretrain` and `arm finetune`: start or resume the run that a request names."""

from __future__ import annotations

import dataclasses
import signal
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from arm_cli.options import announce
from arm_cli.show import echo
from arm_cli.streams import surviving_output
from arm_cli.training.trackers import check, tracking

if TYPE_CHECKING:
    from arm_cli.training.changes import Change
    from arm_cli.training.options import Request
    from arm_cli.training.run import Prepared
    from arm_core.engine.protocol import Backend, EngineOptions
    from arm_core.engine.ranks import Ranks
    from arm_core.files.model_folder import Model
    from arm_core.recipe.recipe import Recipe
    from arm_core.training.observer import Outcome
    from arm_core.training.run_folder import RunFolder


AUTO = "auto"
"""Value of --resume: resume the run in the output folder, if there is one."""


def run_training(stage: str, request: Request, origin: str | None = None) -> None:
    """Start or resume the run that a request names, and show its progress.

    origin: the model whose trunk a new classifier starts from.
    """
    from arm_core.engine.ranks import lead, together

    if request.estimate is not None and not request.dry_run:
        raise ValueError("--estimate belongs to --dry-run; add it, or drop --estimate")
    check(request.log)
    with surviving_output(), request.engine.join() as (backend, ranks):
        # A launcher that restarts a job repeats the command that started the run.
        auto = request.resume == AUTO or (request.resume is None and ranks.restarts > 0)
        if request.resume is not None and not auto:
            _resume(stage, request, request.resume, backend, ranks)
        elif auto and lead(ranks, lambda: _has_checkpoint(stage, request)):
            with together(ranks):
                overrides = _same_run(stage, request, origin)
            out = _folder(stage, request)
            request = dataclasses.replace(request, recipe=None, out=None)
            _resume(stage, request, out, backend, ranks, overrides)
        else:
            _start(stage, request, origin, backend, ranks)


def _has_checkpoint(stage: str, request: Request) -> bool:
    from arm_core.training.checkpoint import saved_steps

    return bool(saved_steps(Path(_folder(stage, request))))


def _same_run(stage: str, request: Request, origin: str | None) -> list[str]:
    """Check that the output folder holds a run of the requested recipe; returns changes to its bookkeeping.

    Raises ValueError that lists the settings that differ.
    """
    from arm_cli.recipe import flat, shown
    from arm_core.recipe.recipe import bookkeeping, load_recipe
    from arm_core.training.run_folder import RECIPE

    folder = _folder(stage, request)
    recipe, changes, _ = _requested(stage, request, origin)
    wanted, stored = flat(recipe), flat(load_recipe(Path(folder) / RECIPE))
    kept = bookkeeping()
    different = [
        f"{key} = {shown(stored.get(key))} there, {shown(wanted.get(key))} here"
        for key in dict.fromkeys([*stored, *wanted])
        if stored.get(key) != wanted.get(key) and key not in kept
    ]
    if different:
        raise ValueError(
            f"{folder}: contains a run of another recipe ({'; '.join(different[:5])}); choose another --out"
        )
    return [change.assignment for change in changes if change.key in kept]


def _folder(stage: str, request: Request) -> str:
    return request.out or f"runs/{Path(_full_name(stage, request)).stem}"


def _start(stage: str, request: Request, origin: str | None, backend: Backend, ranks: Ranks) -> None:
    from arm_cli.training.run import create_engine, first_state, prepare
    from arm_cli.training.summary import print_summary
    from arm_core.engine.ranks import together
    from arm_core.training.run_folder import start_run

    with together(ranks):
        recipe, changes, model = _requested(stage, request, origin)
        folder = _folder(stage, request)
        if request.estimate is not None:
            _estimate(request, recipe, folder, ranks)
            return
        # All errors in the request are found before a folder is created.
        prepared = prepare(recipe, ranks)
        print_summary(prepared, backend, _options(request), ranks, folder, recipe_name=request.recipe)
        state = first_state(prepared, model, _say)
        engine, record = create_engine(backend, _options(request), prepared, state, ranks)
        announce(backend, engine, ranks)
        if origin is not None:
            record["from"] = origin
    if request.dry_run:
        from arm_cli.training.dry_run import dry_run

        dry_run(prepared, engine, ranks)
        return
    overrides = [change.assignment for change in changes]
    with start_run(folder, recipe, prepared.spec, overrides=overrides, ranks=ranks) as run:
        run.parent = _full_name(stage, request)
        _train(run, engine, record, prepared, request, ranks)


def _estimate(request: Request, recipe: Recipe, folder: str, ranks: Ranks) -> None:
    """Print the plan of a new run on another machine."""
    from arm_cli.training.dry_run import print_schedule
    from arm_cli.training.estimate import assumed, print_estimate
    from arm_cli.training.run import prepare
    from arm_cli.training.summary import print_lines

    assert request.estimate is not None
    if recipe.data.source == "folder" and recipe.data.path is None:
        prepared = assumed(recipe)
        _say("no --data: as many images and classes as ImageNet-1k has are assumed")
    else:
        prepared = prepare(recipe, ranks)
    options = _options(request)
    print_lines(prepared, options, ranks, folder, request.recipe)
    print_schedule(prepared)
    print_estimate(prepared, request.estimate, options)


def _requested(stage: str, request: Request, origin: str | None) -> tuple[Recipe, list[Change], Model | None]:
    """The recipe of a new run, the changes that the command line makes, and the model of --from."""
    from arm_cli.opening import find_model
    from arm_cli.training.changes import apply, changes_of
    from arm_cli.training.origin import with_trunk_of

    recipe = _load(stage, request)
    changes = changes_of(request.changes, recipe, request.engine.precision)
    recipe = apply(recipe, changes)
    if origin is None:
        return recipe, changes, None
    model = find_model(origin).model
    return with_trunk_of(model, recipe, {change.key for change in changes}, _say), changes, model


def _resume(
    stage: str,
    request: Request,
    folder: str,
    backend: Backend,
    ranks: Ranks,
    overrides: list[str] | None = None,
) -> None:
    """overrides: changes to the recipe; None for those on the command line."""
    from arm_cli.training.changes import changes_of
    from arm_cli.training.run import create_engine, prepare
    from arm_cli.training.summary import print_summary
    from arm_core.engine.ranks import together
    from arm_core.recipe.recipe import load_recipe
    from arm_core.training.run_folder import RECIPE, resume_command, resume_run

    with together(ranks):
        if given := [name for name in ("recipe", "out") if getattr(request, name) is not None]:
            raise ValueError(f"--resume continues a run unchanged; drop {' and '.join(given)}")
        stored = Path(folder) / RECIPE
        if stored.exists():
            recipe = load_recipe(stored)
            if recipe.stage != stage:
                raise ValueError(f"{folder}: resume with: {resume_command(recipe.stage, folder)}")
            if overrides is None:
                changes = changes_of(request.changes, recipe, request.engine.precision)
                overrides = [change.assignment for change in changes]
    if request.dry_run:
        _plan_rest(request, folder, backend, ranks, overrides or [])
        return
    with resume_run(folder, overrides or [], warn=warn, ranks=ranks) as run:
        with together(ranks):
            assert run.resumed is not None
            prepared = prepare(run.recipe, ranks, run.spec)
            step = run.resumed.progress.step
            options = _options(request, run.resumed.progress.engine)
            print_summary(prepared, backend, options, ranks, folder, resumed_at=step)
            engine, record = create_engine(backend, options, prepared, run.resumed.state, ranks)
            announce(backend, engine, ranks)
        _train(run, engine, record, prepared, request, ranks)


def _plan_rest(request: Request, folder: str, backend: Backend, ranks: Ranks, overrides: list[str]) -> None:
    """Print the plan of a run that would be resumed; its folder is only read."""
    from arm_cli.training.dry_run import dry_run, print_schedule
    from arm_cli.training.estimate import print_estimate
    from arm_cli.training.run import create_engine, prepare
    from arm_cli.training.summary import print_lines, print_summary
    from arm_core.engine.ranks import together
    from arm_core.training.run_folder import read_run

    with together(ranks):
        recipe, checkpoint = read_run(Path(folder), overrides, warn=warn)
        done = checkpoint.progress
        prepared = prepare(recipe, ranks, checkpoint.spec)
        options = _options(request, done.engine)
        if request.estimate is not None:
            print_lines(prepared, options, ranks, folder, resumed_at=done.step)
            print_schedule(prepared)
            print_estimate(prepared, request.estimate, options, step=done.step)
            return
        print_summary(prepared, backend, options, ranks, folder, resumed_at=done.step)
        engine, _ = create_engine(backend, options, prepared, checkpoint.state, ranks)
        announce(backend, engine, ranks)
    dry_run(prepared, engine, ranks, done=done)


def _load(stage: str, request: Request) -> Recipe:
    """The recipe of the request, which must be one for this command."""
    from arm_core.recipe.recipe import load_recipe, shipped_recipes

    if request.recipe is None:
        known = [name for name in shipped_recipes() if load_recipe(name).stage == stage]
        raise ValueError(f"pass a recipe ({', '.join(known)}, or a .toml file) or --resume RUN")
    recipe = load_recipe(_full_name(stage, request))
    if recipe.stage != stage:
        raise ValueError(f"recipe {request.recipe} is for `arm {recipe.stage}`")
    return recipe


def _full_name(stage: str, request: Request) -> str:
    """The requested recipe; `arm pretrain tiny` means pretrain-tiny."""
    from arm_core.recipe.recipe import shipped_recipes

    assert request.recipe is not None
    full = f"{stage}-{request.recipe}"
    return full if full in shipped_recipes() else request.recipe


def _options(request: Request, recorded: Mapping[str, str] | None = None) -> EngineOptions:
    """The engine's options; recorded: the run's record of its last session, if it is resumed."""
    from arm_core.engine.protocol import Compile
    from arm_core.training.determinism import pin

    options = dataclasses.replace(
        request.engine.options(),
        compile=Compile(request.compiled),
        recompute=request.recompute,
        shard=request.shard,
        deterministic=request.deterministic,
    )
    return pin(options, recorded or {})


def _train(
    run: RunFolder,
    engine: Any,
    record: dict[str, str],
    prepared: Prepared,
    request: Request,
    ranks: Ranks,
) -> None:
    from arm_cli.show import print_json
    from arm_cli.training.display import display
    from arm_cli.training.run import train
    from arm_core.training.observer import Observers

    run.command = command_line()
    with ExitStack() as stack:
        shown = display(stack)
        logs = tracking(request.log if run.writes else (), shown.warned, stack)
        outcome = train(
            run,
            engine,
            record,
            prepared,
            ranks,
            Observers(*logs, shown),
            accept_changed_data=request.accept_changed_data,
        )
    echo(outcome.message, err=True)
    if request.as_json:
        print_json(_as_data(run, outcome))
    if outcome.signal is not None:
        raise SystemExit(128 + signal.Signals[outcome.signal])  # the exit code of a shell after a signal


def _as_data(run: RunFolder, outcome: Outcome) -> dict[str, Any]:
    return {
        "run": str(run.path),
        "checkpoint": str(outcome.checkpoint),
        "step": outcome.step,
        "total_steps": outcome.total_steps,
        "signal": outcome.signal,
        "best": outcome.best,
    }


def command_line() -> str | None:
    """The running command, quoted for a shell."""
    import shlex

    from arm_cli.main import ARGUMENTS

    context = click.get_current_context(silent=True)
    words = context.meta.get(ARGUMENTS) if context is not None else None
    return None if words is None else shlex.join(["arm", *words])


def _say(sentence: str) -> None:
    echo(sentence, err=True)


def warn(sentence: str) -> None:
    """Print a warning on stderr."""
    echo(f"Warning: {sentence}", err=True)
