"""One training run from its parts: recipe, images, initial weights, engine. Commands and demo share it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from arm_cli.training.origin import Say
    from arm_core.data.sources import ImageSource
    from arm_core.engine.protocol import Backend, Engine, EngineOptions, TrainingState
    from arm_core.engine.ranks import Ranks
    from arm_core.files.model_folder import Model
    from arm_core.model.spec import ModelSpec
    from arm_core.recipe.recipe import Recipe
    from arm_core.training.observer import Observer, Outcome
    from arm_core.training.plan import Plan
    from arm_core.training.run_folder import RunFolder


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A recipe with its model and its images: everything that is known before the engine exists."""

    recipe: Recipe
    spec: ModelSpec
    train: ImageSource
    evaluation: ImageSource | None
    plan: Plan


def prepare(recipe: Recipe, ranks: Ranks, spec: ModelSpec | None = None) -> Prepared:
    """Open the images of a recipe and check that they fit; a ValueError says which ones do not.

    spec: the model of a run that is resumed; else it is the recipe's, with the classes of the images.
    """
    from arm_core.recipe.images import open_sources
    from arm_core.training.plan import Plan

    train, evaluation = open_sources(recipe)
    spec = spec or recipe.spec(len(train.classes) or None)
    plan = Plan(recipe, spec, train, ranks=ranks)
    if evaluation is not None:
        plan.eval_loader(evaluation)
    return Prepared(recipe=recipe, spec=spec, train=train, evaluation=evaluation, plan=plan)


def first_state(prepared: Prepared, origin: Model | None, say: Say) -> TrainingState:
    """The initial weights of a new run: random, or those of `origin` as a classifier."""
    from arm_cli.training.origin import grown
    from arm_core.engine.protocol import TrainingState
    from arm_core.model.parameters import initial_parameters

    recipe, spec = prepared.recipe, prepared.spec
    if origin is None:
        return TrainingState(parameters=initial_parameters(spec, recipe.training.seed))
    return TrainingState(parameters=grown(origin, recipe, spec, prepared.train.classes, say))


def create_engine(
    backend: Backend,
    options: EngineOptions,
    prepared: Prepared,
    state: TrainingState,
    ranks: Ranks,
) -> tuple[Engine, dict[str, str]]:
    """The engine that trains, and its record for `sessions.jsonl`."""
    from arm_core.engine.protocol import Compile
    from arm_core.training.determinism import DETERMINISTIC

    recipe = prepared.recipe
    options = dataclasses.replace(options, precision=recipe.training.precision)
    engine = backend.create_engine(
        prepared.spec, state, optimizer=recipe.optimizer, options=options, ranks=ranks
    )
    record = {"backend": backend.name, "version": backend.version()}
    if options.threads is not None:
        record["threads"] = str(options.threads)
    if engine.compile is not Compile.NONE:
        record["compile"] = str(engine.compile)
    flags = {
        "recompute": options.recompute,
        "shard": options.shard,
        DETERMINISTIC: options.deterministic,
    }
    return engine, record | {name: str(on) for name, on in flags.items() if on}


def train(
    run: RunFolder,
    engine: Engine,
    record: Mapping[str, str],
    prepared: Prepared,
    ranks: Ranks,
    observer: Observer | None = None,
    *,
    accept_changed_data: bool = False,
) -> Outcome:
    """Train to the end of the recipe, or to a signal."""
    from arm_core.engine.ranks import together
    from arm_core.training.trainer import Trainer

    with together(ranks):
        trainer = Trainer(
            run,
            engine,
            prepared.train,
            prepared.evaluation,
            observer=observer,
            session=record,
            ranks=ranks,
            accept_changed_data=accept_changed_data,
        )
    return trainer.train()
