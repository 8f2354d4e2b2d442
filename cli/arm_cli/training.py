"""What `arm pretrain` and `arm finetune` share: from a recipe to a run, and how it is shown."""

from __future__ import annotations

import dataclasses
import functools
import signal
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from arm_cli.options import EngineChoice, announce, engine_options, json_option

if TYPE_CHECKING:
    from arm_core.data.sources import ImageSource
    from arm_core.engine.optimizer import OptimizerSettings
    from arm_core.engine.protocol import Array, Backend, Engine, TrainingState
    from arm_core.engine.ranks import Ranks
    from arm_core.model.spec import ModelSpec
    from arm_core.recipe.recipe import Recipe
    from arm_core.training.observer import Observer, Outcome
    from arm_core.training.run_folder import RunFolder

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the user asked to train."""

    recipe: str | None
    data: str | None
    eval_data: str | None
    out: str | None
    resume: str | None
    assignments: tuple[str, ...]
    engine: EngineChoice
    compiled: str
    recompute: bool
    shard: bool
    as_json: bool


def training_options(command: F) -> F:
    """Add the options of a training run; the command receives them as one argument, `request`."""
    options = (
        click.option("--data", metavar="FOLDER", help="Images to train on (data.path)."),
        click.option("--eval-data", metavar="FOLDER", help="Images to evaluate on (data.eval_path)."),
        click.option("--out", metavar="RUN", help="Folder of the run; by default runs/RECIPE."),
        click.option("--resume", metavar="RUN", help="Go on with a run, on any engine."),
        click.option(
            "--set", "assignments", multiple=True, metavar="A.B=C", help="Change a setting of the recipe."
        ),
    )
    speed = (
        click.option(
            "--compile",
            "compiled",
            type=click.Choice(("auto", "none", "blocks", "model")),
            default="auto",
            show_default=True,
            help="What the engine's compiler is given.",
        ),
        click.option("--recompute", is_flag=True, help="Compute blocks twice, to hold less memory."),
        click.option(
            "--shard", is_flag=True, help="Sharded the training state over the processes (torchrun)."
        ),
    )

    @functools.wraps(command)
    def wrapped(
        *args: Any,
        recipe: str | None,
        data: str | None,
        eval_data: str | None,
        out: str | None,
        resume: str | None,
        assignments: tuple[str, ...],
        engine: EngineChoice,
        compiled: str,
        recompute: bool,
        shard: bool,
        as_json: bool,
        **others: Any,
    ) -> Any:
        request = Request(
            recipe=recipe,
            data=data,
            eval_data=eval_data,
            out=out,
            resume=resume,
            assignments=assignments,
            engine=engine,
            compiled=compiled,
            recompute=recompute,
            shard=shard,
            as_json=as_json,
        )
        return command(*args, request=request, **others)

    result: F = wrapped  # type: ignore[assignment]
    for option in reversed(speed):
        result = option(result)
    result = json_option(engine_options(result))
    for option in reversed(options):
        result = option(result)
    return click.argument("recipe", required=False)(result)


Start = Callable[["Recipe", "ModelSpec", tuple[str, ...]], Mapping[str, "Array"]]
"""First weights of a new run, from its recipe, its model and the class names of its data."""


def fresh_parameters(recipe: Recipe, spec: ModelSpec, classes: tuple[str, ...]) -> Mapping[str, Array]:
    """Random weights: training from scratch."""
    from arm_core.model.parameters import initial_parameters

    return initial_parameters(spec, recipe.training.seed)


def run_training(stage: str, request: Request, start: Start, *, origin: str | None = None) -> None:
    """Start or resume the run that a request names, and show how it goes.

    origin: the model that `start` reads, for the run's record.
    """
    with request.engine.join() as (backend, ranks):
        if request.resume is not None:
            _resume(stage, request, request.resume, backend, ranks)
        elif ranks.restarts and _begun(out := _folder(stage, request)):
            # The launcher repeats the command that began the run.
            _resume(stage, dataclasses.replace(request, recipe=None, out=None), out, backend, ranks)
        else:
            _start(stage, request, start, origin, backend, ranks)


def _begun(folder: str) -> bool:
    from arm_core.training.checkpoint import saved_steps

    return bool(saved_steps(Path(folder)))


def _folder(stage: str, request: Request) -> str:
    return request.out or f"runs/{Path(_full_name(stage, request)).stem}"


def _start(
    stage: str, request: Request, start: Start, origin: str | None, backend: Backend, ranks: Ranks
) -> None:
    from arm_core.engine.protocol import TrainingState
    from arm_core.engine.ranks import together
    from arm_core.recipe.images import open_sources
    from arm_core.training.plan import Plan
    from arm_core.training.run_folder import start_run

    with together(ranks):
        if request.recipe is None:
            raise ValueError(
                f"name a recipe ({', '.join(_recipes(stage))}, or a .toml file), or --resume RUN"
            )
        recipe = _resolve(stage, request)
        train, evaluation = open_sources(recipe)
        spec = recipe.spec(len(train.classes) or None)
        # All that can be wrong with the request is found before there is a folder.
        plan = Plan(recipe, spec, train, ranks=ranks)
        if evaluation is not None:
            plan.eval_loader(evaluation)
        state = TrainingState(parameters=start(recipe, spec, train.classes))
        engine, session = _engine(request, backend, ranks, recipe, spec, state)
        if origin is not None:
            session["from"] = origin
    with start_run(_folder(stage, request), recipe, spec, ranks=ranks) as run:
        _train(run, engine, session, train, evaluation, ranks, request.as_json)


def _resume(stage: str, request: Request, folder: str, backend: Backend, ranks: Ranks) -> None:
    from arm_core.engine.ranks import together
    from arm_core.recipe.images import open_sources
    from arm_core.recipe.recipe import load_recipe
    from arm_core.training.run_folder import RECIPE, resume_run

    with together(ranks):
        if given := [name for name in ("recipe", "out") if getattr(request, name) is not None]:
            raise ValueError(f"--resume goes on with a run as it is; drop {' and '.join(given)}")
        stored = Path(folder) / RECIPE
        if stored.exists() and (other := load_recipe(stored).stage) != stage:
            raise ValueError(f"{folder}: go on with: arm {other} --resume {folder}")
    with resume_run(folder, _overrides(request), warn=_warn, ranks=ranks) as run:
        with together(ranks):
            assert run.resumed is not None
            train, evaluation = open_sources(run.recipe)
            engine, session = _engine(request, backend, ranks, run.recipe, run.spec, run.resumed.state)
        _train(run, engine, session, train, evaluation, ranks, request.as_json)


def _resolve(stage: str, request: Request) -> Recipe:
    """The recipe with everything that the command line says."""
    from arm_core.recipe.recipe import load_recipe, override

    recipe = load_recipe(_full_name(stage, request))
    if recipe.stage != stage:
        raise ValueError(f"recipe {request.recipe} is for `arm {recipe.stage}`")
    return override(recipe, _overrides(request))


def _overrides(request: Request) -> list[str]:
    """Every option that changes the recipe, as `section.key=value`."""
    given = {
        "data.path": request.data,
        "data.eval_path": request.eval_data,
        "training.precision": request.engine.precision,
    }
    folders = ["data.source=folder"] if request.data or request.eval_data else []
    return [*request.assignments, *folders, *(f"{key}={value}" for key, value in given.items() if value)]


def _recipes(stage: str) -> list[str]:
    """Shipped recipes for this command."""
    from arm_core.recipe.recipe import load_recipe, shipped_recipes

    return [name for name in shipped_recipes() if load_recipe(name).stage == stage]


def _full_name(stage: str, request: Request) -> str:
    """The recipe asked for; `arm pretrain tiny` means pretrain-tiny."""
    from arm_core.recipe.recipe import shipped_recipes

    assert request.recipe is not None
    full = f"{stage}-{request.recipe}"
    return full if full in shipped_recipes() else request.recipe


def _engine(
    request: Request,
    backend: Backend,
    ranks: Ranks,
    recipe: Recipe,
    spec: ModelSpec,
    state: TrainingState,
) -> tuple[Engine, dict[str, str]]:
    """The engine that trains, and what is recorded about it."""
    from arm_core.engine.protocol import Compile

    options = dataclasses.replace(
        request.engine.options(),
        precision=recipe.training.precision,
        compile=Compile(request.compiled),
        recompute=request.recompute,
        shard=request.shard,
    )
    optimizer: OptimizerSettings = recipe.optimizer
    engine = backend.create_engine(spec, state, optimizer=optimizer, options=options, ranks=ranks)
    announce(backend, engine, ranks)
    session = {"backend": backend.name, "version": backend.version()}
    chosen = {
        "threads": options.threads is not None,
        "compile": engine.compile is not Compile.NONE,
        "recompute": options.recompute,
        "shard": options.shard,
    }
    words = {**dataclasses.asdict(options), "compile": engine.compile}
    return engine, session | {name: str(words[name]) for name, said in chosen.items() if said}


def _train(
    run: RunFolder,
    engine: Engine,
    session: dict[str, str],
    train: ImageSource,
    evaluation: ImageSource | None,
    ranks: Ranks,
    as_json: bool,
) -> None:
    from arm_cli.show import print_json
    from arm_core.engine.ranks import together
    from arm_core.training.trainer import Trainer

    with ExitStack() as stack:
        observer = _observer(stack)
        with together(ranks):
            trainer = Trainer(run, engine, train, evaluation, observer=observer, session=session, ranks=ranks)
        outcome = trainer.train()
    click.echo(outcome.message, err=True)
    if as_json:
        print_json(_as_data(run, outcome))
    if outcome.signal is not None:
        raise SystemExit(128 + signal.Signals[outcome.signal])  # as a shell reports a signal


def _as_data(run: RunFolder, outcome: Outcome) -> dict[str, Any]:
    return {
        "run": str(run.path),
        "checkpoint": str(outcome.checkpoint),
        "step": outcome.step,
        "total_steps": outcome.total_steps,
        "signal": outcome.signal,
        "best": outcome.best,
    }


def _observer(stack: ExitStack) -> Observer:
    """Shows a run on stderr until the stack is closed."""
    from arm_cli.progress import ProgressBar
    from arm_core.training.observer import Observer
    from arm_core.training.trainer import Trainer

    class Display(Observer):
        counter: ProgressBar
        note = ""

        def started(self, trainer: Trainer) -> None:
            counter = ProgressBar(
                str(trainer.run.recipe.stage), trainer.plan.total_steps, "steps", start=trainer.step
            )
            self.counter = stack.enter_context(counter)

        def stepped(self, step: int, images: int) -> None:
            self.counter.advance(1, self.note)

        def logged(self, row: Mapping[str, Any]) -> None:
            if "eval_loss" in row:
                self.counter.say(evaluation_line(row))
            else:
                self.note = (
                    f"epoch {row['epoch']:.2f}, loss {row['loss']:.4f}, lr {row['lr']:.2e}, "
                    f"{row['images_per_s']:.3g} images/s"
                )

        def evaluating(self, images: int, total: int) -> None:
            self.counter.advance(0, f"evaluated {images}/{total} images")

        def warned(self, sentence: str) -> None:
            self.counter.say(sentence)

    return Display()


def evaluation_line(row: Mapping[str, Any]) -> str:
    """An evaluation row of `metrics.jsonl` in words."""
    parts = []
    for prefix, label in (("eval", ""), ("ema", "averaged weights: ")):
        if f"{prefix}_loss" in row:
            top = "".join(
                f"{name} {100 * row[key]:.2f} %, "
                for name, key in (("top-1", f"{prefix}_top1"), ("top-5", f"{prefix}_top5"))
                if key in row
            )
            parts.append(f"{label}{top}loss {row[f'{prefix}_loss']:.4f}")
    return f"step {row['step']}, epoch {row['epoch']:.2f}: {'; '.join(parts)}"


def _warn(sentence: str) -> None:
    click.echo(f"Warning: {sentence}", err=True)
