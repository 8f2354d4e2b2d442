"""The results of a sweep as tables: mean and interval over seeds, and paired differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from arm_cli.sweep.folder import Definition, Result
    from arm_cli.sweep.members import Member
    from arm_core.training.intervals import Interval

PERCENT = ("eval_top1", "eval_top5", "ema_top1", "ema_top5", "score")
"""Metrics that are shown in percent."""

Levels = tuple[tuple[str, str], ...]


@dataclass(frozen=True, kw_only=True)
class Row:
    """Members that differ in their seeds only."""

    levels: Levels
    """The values of the compared factors, by factor."""
    values: Mapping[Levels, float]
    """The metric of finished members, by seeds; in percent for a metric in `PERCENT`."""
    failed: int
    missing: int
    """Members that have not ended."""

    @property
    def interval(self) -> Interval | None:
        from arm_core.training.intervals import mean_interval

        return mean_interval(list(self.values.values())) if self.values else None


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Rows that differ in one factor, compared by seed."""

    factor: str
    value: str
    reference: str
    rest: Levels
    """The values of the other compared factors."""
    interval: Interval
    """Of the metric's difference, value minus reference."""


def metric_of(definition: Definition) -> str:
    """The metric of a sweep's table by default."""
    return "eval_top1" if "finetune" in definition.recipes else "eval_loss"


def rows(
    definition: Definition, members: Sequence[Member], results: Mapping[str, Result], metric: str
) -> list[Row]:
    """One row for each combination of compared values, of the sweep's last stage.

    Raises ValueError if no finished member has the metric.
    """
    last = [*definition.recipes][-1]
    repeats = {factor.name for factor in definition.factors if factor.repeats}
    groups: dict[Levels, list[Member]] = {}
    for member in members:
        if member.recipe.stage == last:
            levels = tuple(level for level in member.levels if level[0] not in repeats)
            groups.setdefault(levels, []).append(member)
    finished = [r for r in results.values() if not r.error]
    if finished and not any(metric in result.metrics for result in finished):
        known = sorted({name for result in finished for name in result.metrics})
        raise ValueError(f"--metric {metric}: the runs have no such value; they have {', '.join(known)}")
    return [_row(levels, group, results, metric, repeats) for levels, group in groups.items()]


def _row(
    levels: Levels, group: Sequence[Member], results: Mapping[str, Result], metric: str, repeats: set[str]
) -> Row:
    factor, values, failed, missing = 100.0 if metric in PERCENT else 1.0, {}, 0, 0
    for member in group:
        result = results.get(member.name)
        if result is None:
            missing += 1
        elif result.error or metric not in result.metrics:
            failed += 1
        else:
            seeds = tuple(level for level in member.levels if level[0] in repeats)
            values[seeds] = factor * result.metrics[metric]
    return Row(levels=levels, values=values, failed=failed, missing=missing)


def differences(table: Sequence[Row]) -> list[Difference]:
    """Every value of every compared factor against the factor's first value, all else equal."""
    from arm_core.training.intervals import paired_difference

    found, by_levels = [], {row.levels: row for row in table}
    first = dict(table[0].levels) if table else {}
    for row in table:
        for name, value in row.levels:
            other = tuple((n, first[n] if n == name else v) for n, v in row.levels)
            if value == first[name] or other not in by_levels:
                continue
            interval = paired_difference(row.values, by_levels[other].values)
            if interval is not None:
                rest = tuple(level for level in row.levels if level[0] != name)
                found.append(
                    Difference(factor=name, value=value, reference=first[name], rest=rest, interval=interval)
                )
    return found


def shown(interval: Interval | None, metric: str, *, signed: bool = False) -> str:
    """`81.3 ± 1.2`; the mean alone for one value."""
    if interval is None:
        return "-"
    digits, sign = (1 if metric in PERCENT else 4), "+" if signed else ""
    text = f"{interval.mean:{sign}.{digits}f}"
    return text if interval.half is None else f"{text} ± {interval.half:.{digits}f}"


DIFFERENCE_COLUMNS = ("setting", "value", "against", "others equal", "difference", "pairs", "conclusion")


def difference_rows(compared: Sequence[Difference], metric: str) -> list[list[object]]:
    """The rows of a table with `DIFFERENCE_COLUMNS`."""
    return [
        [
            d.factor,
            d.value,
            d.reference,
            ", ".join(f"{n}={v}" for n, v in d.rest) or "-",
            shown(d.interval, metric, signed=True),
            d.interval.count,
            conclusion(d.interval),
        ]
        for d in compared
    ]


def markdown(metric: str, table: Sequence[Row], compared: Sequence[Difference]) -> str:
    """Both tables as Markdown."""
    names = [name for name, _ in table[0].levels] if table else []
    unit = ", %" if metric in PERCENT else ""
    lines = _lines(
        [*names, f"{metric}{unit}: mean ± 95 % interval", "runs", "failed", "not finished"],
        [
            [
                *(v for _, v in row.levels),
                shown(row.interval, metric),
                len(row.values),
                row.failed,
                row.missing,
            ]
            for row in table
        ],
    )
    if compared:
        lines += ["", "Paired differences, by seed; 95 % interval.", ""]
        lines += _lines(DIFFERENCE_COLUMNS, difference_rows(compared, metric))
    return "\n".join(lines) + "\n"


def conclusion(interval: Interval) -> str:
    """Whether an interval of differences is above or below 0."""
    return {1: "higher", -1: "lower", 0: "undecided"}[interval.sign]


def _lines(head: Sequence[object], body: Sequence[Sequence[object]]) -> list[str]:
    def line(cells: Sequence[object]) -> str:
        return "| " + " | ".join(str(cell) for cell in cells) + " |"

    return [line(head), "|" + "---|" * len(head), *(line(cells) for cells in body)]
