"""The page of a sweep: a drawing of its table, the table, and the command that repeats it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from arm_cli.demo.report.figures import Points, points_figure
from arm_cli.demo.report.page import Page
from arm_cli.sweep.table import DIFFERENCE_COLUMNS, PERCENT, Difference, Row, difference_rows, shown

if TYPE_CHECKING:
    from arm_cli.sweep.folder import Definition, Result


def write_page(
    path: Path,
    definition: Definition,
    metric: str,
    table: Sequence[Row],
    compared: Sequence[Difference],
    failed: Mapping[str, Result],
) -> None:
    """Write the sweep's page."""
    stages = " and ".join(definition.recipes)
    page = Page(f"Sweep: {metric}", f"{stages} with the settings of the table.")
    unit = ", %" if metric in PERCENT else ""
    page.section("Results")
    page.figures(
        [points_figure(series_of(table), title=metric, label=f"{metric}{unit}")],
        "Points: runs with one seed each. Bars: mean and 95 % confidence interval over the seeds.",
    )
    names = [name for name, _ in table[0].levels]
    page.table(
        [*names, f"{metric}{unit}", "runs", "failed", "not finished"],
        [
            [*(v for _, v in r.levels), shown(r.interval, metric), len(r.values), r.failed, r.missing]
            for r in table
        ],
        "Mean and 95 % confidence interval over the seeds (Student's t).",
    )
    if compared:
        page.section("Differences", "Runs with the same seed are compared, all other settings equal.")
        page.table(
            DIFFERENCE_COLUMNS,
            difference_rows(compared, metric),
            "Mean of the differences and 95 % confidence interval; undecided: the interval contains 0. "
            "With many rows, some intervals miss 0 by chance.",
        )
    if failed:
        page.section("Failed runs")
        page.table(["run", "error"], [[name, result.error or ""] for name, result in failed.items()])
    page.section("Repeat or resume", "The folder holds recipes, runs and results.")
    page.code(f"arm sweep --out {path.parent}")
    page.write(path)


def series_of(table: Sequence[Row]) -> list[Points]:
    """The table as points: the factor with the most values is the horizontal axis."""
    values: dict[str, list[str]] = {}
    for row in table:
        for name, value in row.levels:
            if value not in values.setdefault(name, []):
                values[name].append(value)
    axis = max(values, key=lambda name: len(values[name]), default="")
    found: dict[str, Points] = {}
    for row in table:
        rest = ", ".join(f"{n}={v}" for n, v in row.levels if n != axis)
        series = found.setdefault(rest, Points(label=rest, axis=axis, groups={}))
        series.groups[dict(row.levels).get(axis, "all")] = list(row.values.values())
    return list(found.values())
