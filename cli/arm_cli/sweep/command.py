"""`arm sweep`: trains all combinations of some settings, and compares the results."""

from __future__ import annotations

import dataclasses
import os
import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from arm_cli.declare import options_of
from arm_cli.options import EngineChoice, engine_options, json_option
from arm_cli.show import echo, print_json
from arm_cli.training.options import RecipeChanges

if TYPE_CHECKING:
    from arm_cli.sweep.folder import Definition, Result, SweepFolder
    from arm_cli.sweep.members import Member
    from arm_cli.sweep.workers import Event
    from arm_core.recipe.recipe import Recipe

INTERRUPTED = 130
"""Exit code after Ctrl-C, as a shell reports it."""

FIRST = os.environ.get("RANK", "0") == "0"
"""Whether this is the process of a torchrun job that prints and writes the table."""

TABLE, PAGE = "table.md", "sweep.html"


@click.command(short_help="Train all combinations of some settings and compare them.")
@click.argument("recipe", required=False)
@click.option(
    "--finetune", "second", metavar="RECIPE", help="Finetune each pretrained model with this recipe."
)
@click.option(
    "--from", "origin", metavar="MODEL", help="Pretrained model that every finetuning run starts from."
)
@click.option("--vary", multiple=True, metavar="A.B=V,V,...", help="A setting and its values; repeatable.")
@click.option("--out", required=True, metavar="DIR", help="Folder of the sweep.")
@click.option("--jobs", type=click.IntRange(min=1), default=1, show_default=True, help="Runs at a time.")
@click.option("--metric", help="Value to compare; by default eval_top1, for pretraining eval_loss.")
@options_of(RecipeChanges, "changes")
@engine_options
@json_option
def sweep(recipe: str | None, second: str | None, out: str, **rest: Any) -> None:
    """Train RECIPE with all combinations of the --vary values, and compare the results.

    A setting that ends in `seed` repeats the runs: the table holds mean and 95 % interval over the seeds,
    and differences between runs with the same seed. Ranges of integers are written 0..4; a value that
    contains commas is written in brackets.

    With --finetune, RECIPE pretrains, and a classifier is trained from each pretrained model. A setting is
    then written with its stage, `pretrain.model.cluster` or `finetune.training.seed`; without it, it
    changes both. Runs that differ in finetuning only share one pretraining run.

    The same command, or `arm sweep --out DIR`, resumes a sweep: finished runs are kept, an interrupted run
    continues at its last checkpoint, a failed one is tried again. Several processes and machines can work
    on one folder. Examples:

    \b
      arm sweep pretrain-digits --vary model.cluster=1x1,2x2,3x3 --vary training.seed=0..4 --out SWEEP
      arm sweep pretrain-digits --finetune finetune-digits --vary finetune.training.seed=0..4 --out SWEEP
    """
    from arm_cli.sweep.folder import SweepFolder

    folder = SweepFolder(Path(out))
    given = _Request(recipe=recipe, second=second, **rest)
    _Sweep(folder, _definition(folder, given), given).run()


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Request:
    """The command line."""

    recipe: str | None
    second: str | None
    origin: str | None
    vary: tuple[str, ...]
    jobs: int
    metric: str | None
    changes: RecipeChanges
    engine: EngineChoice
    as_json: bool


def _definition(folder: SweepFolder, given: _Request) -> Definition:
    """The sweep of the command line, or the stored one if no recipe is given."""
    from arm_cli.sweep.folder import Definition
    from arm_cli.sweep.members import parse_factor
    from arm_core.data.opening import absolute

    if given.recipe is None:
        if given.vary or given.second or given.origin or not _unchanged(given.changes):
            raise ValueError(
                f"without a recipe, the sweep in {folder.path} is resumed unchanged; "
                "pass only --out, --jobs, --metric and options of the engine"
            )
        return folder.read()
    recipes = _recipes(given)
    if given.origin is not None and "pretrain" in recipes:
        raise ValueError("--from is for finetuning recipes; drop it, or the pretraining recipe")
    factors = tuple(parse_factor(text, recipes) for text in given.vary)
    if not factors:
        raise ValueError("pass the settings that vary, for example --vary training.seed=0..4")
    origin = None if given.origin is None else absolute(given.origin)
    definition = Definition(recipes=recipes, factors=factors, origin=origin)
    definition.members()  # all errors in the request are found before a folder is created
    with folder.locked():
        folder.write(definition)
    return definition


def _recipes(given: _Request) -> dict[str, Recipe]:
    """The recipes of the request by stage, with its changes."""
    from arm_cli.recipe import recipe_path
    from arm_cli.sweep.members import split_stage
    from arm_cli.training.changes import apply, changes_of
    from arm_core.recipe.recipe import load_recipe
    from arm_core.training.run_folder import with_absolute_paths

    assert given.recipe is not None
    loaded = [load_recipe(recipe_path(name)) for name in (given.recipe, given.second) if name]
    recipes = {str(recipe.stage): recipe for recipe in loaded}
    if given.second and [*recipes] != ["pretrain", "finetune"]:
        raise ValueError("--finetune: expected RECIPE to pretrain, and a finetuning recipe after --finetune")
    changed = {}
    for stage, recipe in recipes.items():
        own = []
        for text in given.changes.assignments:
            name, equals, value = text.partition("=")
            only, key = split_stage(name.strip(), recipes)
            own += [f"{key}{equals}{value}"] if only in (None, stage) else []
        options = dataclasses.replace(given.changes, assignments=tuple(own))
        precision = given.engine.precision
        changed[stage] = with_absolute_paths(apply(recipe, changes_of(options, recipe, precision)))
    return changed


def _unchanged(changes: RecipeChanges) -> bool:
    """Whether no option changes a recipe."""
    return not any(vars(changes).values())


class _Sweep:
    """Trains the members of a sweep and prints what happens."""

    def __init__(self, folder: SweepFolder, definition: Definition, given: _Request) -> None:
        from arm_cli.sweep.table import metric_of

        self.folder, self.definition, self.given = folder, definition, given
        self.members: list[Member] = definition.members()
        self.metric = given.metric or metric_of(definition)
        self.ended = 0
        self.began = time.monotonic()

    def run(self) -> None:
        from arm_cli.sweep.folder import results_of
        from arm_cli.sweep.workers import run_members

        kept = [r for r in results_of(self.folder, self.members).values() if not r.error]
        wanted = len(self.members) - len(kept)
        self._say(f"{self.folder.path}: {len(self.members)} runs, {len(kept)} of them finished")
        try:
            run_members(
                self.folder,
                self.members,
                self.given.engine.find().name,
                _with_own_device(self.given.engine).options(),
                jobs=min(self.given.jobs, wanted),
                report=lambda event: self._report(event, wanted),
            )
        except KeyboardInterrupt:
            self._say(f"Stopped; resume with: arm sweep --out {shlex.quote(str(self.folder.path))}")
            raise SystemExit(INTERRUPTED) from None
        if FIRST:
            with self.folder.locked():
                self._write()

    @staticmethod
    def _say(text: str) -> None:
        if FIRST:
            echo(text, err=True)

    def _report(self, event: Event, wanted: int) -> None:
        from arm_cli.progress import duration

        if event.kind == "waiting":
            self._say("waiting for runs of other processes")
        if event.result is None:
            return
        self.ended += 1
        passed = time.monotonic() - self.began
        text = _in_short(event.result, self.metric)
        remaining = max(0, wanted - self.ended)
        left = f"; about {duration(passed / self.ended * remaining)} left" if remaining else ""
        self._say(f"[{self.ended}/{wanted}] {event.member}: {text}{left}")

    def _write(self) -> None:
        from arm_cli.sweep.folder import results_of
        from arm_cli.sweep.page import write_page
        from arm_cli.sweep.table import differences, markdown, rows
        from arm_core.files.atomic import replace_text

        results = results_of(self.folder, self.members)
        failed = {name: result for name, result in results.items() if result.error}
        table = rows(self.definition, self.members, results, self.metric)
        compared = differences(table)
        text = markdown(self.metric, table, compared)
        replace_text(self.folder.path / TABLE, text)
        write_page(self.folder.path / PAGE, self.definition, self.metric, table, compared, failed)
        if self.given.as_json:
            print_json(_as_data(self.metric, table, compared, failed))
        else:
            echo(text.rstrip("\n"))
        echo(f"Page: {(self.folder.path / PAGE).resolve()}", err=True)
        if failed:
            echo(
                f"{len(failed)} of {len(self.members)} runs failed; the same command tries them again",
                err=True,
            )
            raise SystemExit(1)


def _in_short(result: Result, metric: str) -> str:
    if result.error:
        return f"failed: {result.error}"
    value = result.metrics.get(metric)
    return f"{metric} {value:.4g}, {result.seconds:.0f} s" if value is not None else f"{result.seconds:.0f} s"


def _with_own_device(engine: EngineChoice) -> EngineChoice:
    """Under torchrun, each process trains its own members on its own GPU."""
    rank = os.environ.get("LOCAL_RANK")
    if rank is None or engine.device not in ("auto", "cuda") or engine.find().devices()[0] == "cpu":
        return engine
    return dataclasses.replace(engine, device=f"cuda:{rank}")


def _as_data(metric: str, table: Any, compared: Any, failed: Any) -> dict[str, Any]:
    return {
        "metric": metric,
        "rows": [
            {
                "levels": dict(row.levels),
                "interval": None if row.interval is None else dataclasses.asdict(row.interval),
                "values": [{**dict(seeds), "value": value} for seeds, value in row.values.items()],
                "failed": row.failed,
                "not_finished": row.missing,
            }
            for row in table
        ],
        "differences": [
            {
                "setting": d.factor,
                "value": d.value,
                "against": d.reference,
                "others": dict(d.rest),
                **dataclasses.asdict(d.interval),
            }
            for d in compared
        ],
        "failed": {name: result.error for name, result in failed.items()},
    }
