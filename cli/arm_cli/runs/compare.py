"""`arm runs compare`: settings, losses and results of several runs, in the terminal and as a page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from arm_cli.options import json_option
from arm_cli.show import echo, print_json, print_table

if TYPE_CHECKING:
    from arm_core.training.history import RunHistory

HEAD = ("run", "state", "trained", "images/s", "last loss", "best result")


@dataclass(frozen=True, kw_only=True)
class LossDifference:
    """The training losses of a run against those of the first run, at the steps that both have logged."""

    run: str
    steps: int
    """Number of common steps."""
    largest: float
    """Largest difference relative to the first run's loss; NaN without common steps."""
    at: int | None
    """Step of the largest difference."""
    gradient: float
    """Largest relative difference of the gradient norm; NaN without common steps."""


@click.command("compare", short_help="Compare runs: settings, losses, results.")
@click.argument("runs", nargs=-1, required=True, metavar="RUN...")
@click.option("--html", "page", metavar="OUT", help="Write a page with the curves of the runs.")
@click.option(
    "--tolerance",
    type=click.FloatRange(min=0),
    help="Exit with code 1 if a loss differs from that of the first run by more, relative to it.",
)
@json_option
def command(runs: tuple[str, ...], page: str | None, tolerance: float | None, as_json: bool) -> None:
    """Compare two or more RUNs: the settings that differ, the training losses step by step, and the results.

    A RUN is a run folder, or any folder with recipe.toml and metrics.jsonl.
    """
    from arm_cli.runs import facts
    from arm_cli.runs.listing import summary

    if len(runs) < 2:
        raise ValueError("expected two or more runs to compare, found one")
    histories = [facts.open_run(name) for name in runs]
    names = labels(histories)
    changed = facts.differences([history.recipe for history in histories])
    first, *others = histories
    losses = [loss_difference(name, first, other) for name, other in zip(names[1:], others, strict=True)]
    if page is not None:
        _write(Path(page), histories, names, changed, losses)
    if as_json:
        print_json({
            "runs": [summary(history) for history in histories],
            "settings": {key: values for key, *values in changed},
            "losses": [{k: None if v != v else v for k, v in asdict(loss).items()} for loss in losses],
        })  # fmt: skip
    else:
        _print(histories, names, changed, losses)
    if page is not None:
        echo(f"wrote {page}", err=True)
    if tolerance is not None and (wrong := [loss for loss in losses if not loss.largest <= tolerance]):
        echo("; ".join(beyond(loss, names[0], tolerance) for loss in wrong), err=True)
        raise SystemExit(1)


def labels(histories: Sequence[RunHistory]) -> list[str]:
    """The shortest ends of the runs' paths that differ from each other."""
    paths = [history.path.resolve().parts for history in histories]
    for count in range(1, max(map(len, paths)) + 1):
        names = ["/".join(parts[-count:]) for parts in paths]
        if len(set(names)) == len(names):
            return names
    return [str(history.path) for history in histories]


def loss_difference(name: str, first: RunHistory, other: RunHistory) -> LossDifference:
    """The largest difference of loss and gradient norm at common steps."""
    by_step = {row["step"]: row for row in first.training}
    pairs = [(by_step[row["step"]], row) for row in other.training if row["step"] in by_step]

    def relative(key: str) -> list[tuple[float, int]]:
        known = [(a["step"], a[key], b[key]) for a, b in pairs if key in a and key in b]
        return [(abs(b - a) / max(abs(a), 1e-12), step) for step, a, b in known]

    loss = max(relative("loss"), default=(float("nan"), None))
    gradient = max(relative("grad_norm"), default=(float("nan"), None))
    return LossDifference(run=name, steps=len(pairs), largest=loss[0], at=loss[1], gradient=gradient[0])


def beyond(loss: LossDifference, first: str, tolerance: float) -> str:
    """Why a run fails the comparison."""
    if loss.at is None:
        return f"{loss.run}: no step in common with {first}"
    return f"{loss.run}: loss differs by {loss.largest:.2e} at step {loss.at}, more than {tolerance:g}"


def table_rows(histories: Sequence[RunHistory], names: Sequence[str]) -> list[tuple[str, ...]]:
    """The final table, below `HEAD`."""
    from arm_cli.runs import facts

    rows: list[tuple[str, ...]] = []
    for history, name in zip(histories, names, strict=True):
        rate = facts.rate(history)
        loss = f"{history.training[-1]['loss']:.4f}" if history.training else "-"
        speed = "-" if rate is None else f"{rate:.3g}"
        rows.append((name, facts.state(history), facts.trained(history), speed, loss, facts.result(history)))
    return rows


def loss_rows(losses: Sequence[LossDifference]) -> list[tuple[str, ...]]:
    """A row for each run after the first."""
    return [
        (
            loss.run,
            str(loss.steps),
            "-" if loss.at is None else f"{loss.largest:.2e}",
            "-" if loss.at is None else str(loss.at),
            "-" if loss.at is None else f"{loss.gradient:.2e}",
        )
        for loss in losses
    ]


def loss_head(first: str) -> tuple[str, ...]:
    return (
        f"against {first}",
        "common rows",
        "largest difference of the loss",
        "at step",
        "of the gradient norm",
    )


def _print(
    histories: Sequence[RunHistory],
    names: Sequence[str],
    changed: Sequence[tuple[str, ...]],
    losses: Sequence[LossDifference],
) -> None:
    echo("settings that differ", bold=True)
    if changed:
        print_table(("setting", *names), changed, left=1 + len(names))
    else:
        echo("none")
    echo("training losses, relative differences", bold=True)
    print_table(loss_head(names[0]), loss_rows(losses))
    echo("results", bold=True)
    print_table(HEAD, table_rows(histories, names), text=(1, 5))


def _write(
    page: Path,
    histories: Sequence[RunHistory],
    names: Sequence[str],
    changed: Sequence[tuple[str, ...]],
    losses: Sequence[LossDifference],
) -> None:
    from arm_cli.pages.blocks import Blocks
    from arm_cli.runs.curves import charts
    from arm_core.files.atomic import new_file, write_text

    blocks = Blocks()
    blocks.heading("Curves")
    blocks.charts(charts(histories, names))
    blocks.heading("Results")
    blocks.table(HEAD, table_rows(histories, names))
    blocks.heading("Settings that differ")
    if changed:
        blocks.table(("setting", *names), changed)
    else:
        blocks.text("The recipes are equal, except for data paths and workers.")
    blocks.heading("Training losses")
    blocks.text(
        "The largest difference from the first run at the steps that both have logged, relative to the first "
        "run. Rows are means over the steps since the row before."
    )
    blocks.table(loss_head(names[0]), loss_rows(losses))
    lead = [f"{len(names)} runs: {', '.join(names)}."]
    text = blocks.render(f"Comparison of {len(names)} runs", lead)
    with new_file(page, force=True) as draft:
        write_text(draft, text)
