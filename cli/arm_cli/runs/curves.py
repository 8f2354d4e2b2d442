"""The curves of runs as charts of a page: over steps and over hours of training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from arm_core.training.history import Row, RunHistory

MOST = 600
"""Points of a curve; longer ones are averaged in bins of equal numbers of rows."""

TRAINING = (
    ("loss", "Training loss", 1.0),
    ("lr", "Learning rate", 1.0),
    ("grad_norm", "Gradient norm", 1.0),
    ("images_per_s", "Images per second", 1.0),
)
EVALUATION = (
    ("loss", "Evaluation loss", 1.0),
    ("top1", "Top-1 accuracy, %", 100.0),
    ("top5", "Top-5 accuracy, %", 100.0),
)
"""Key, title and factor of each chart; the keys of evaluations follow `eval_` and `ema_`."""

AVERAGED = "averaged weights"


def charts(histories: Sequence[RunHistory], names: Sequence[str]) -> list[dict[str, Any]]:
    """A chart for each recorded quantity, with a curve for each run that has it; empty charts are omitted."""
    found = []
    for key, title, factor in TRAINING:
        curves = [_curve(h, h.training, key, name, i, factor) for i, (h, name) in _numbered(histories, names)]
        found.append({"title": title, "curves": [curve for curve in curves if curve]})
    for key, title, factor in EVALUATION:
        curves = []
        for i, (history, name) in _numbered(histories, names):
            rows = history.evaluations
            curves.append(_curve(history, rows, f"eval_{key}", name, i, factor, marked=True))
            label = f"{name}, {AVERAGED}" if name else AVERAGED
            curves.append(_curve(history, rows, f"ema_{key}", label, i, factor, marked=True, dashed=True))
        found.append({"title": title, "curves": [curve for curve in curves if curve]})
    return [chart for chart in found if chart["curves"]]


def _numbered(
    histories: Sequence[RunHistory], names: Sequence[str]
) -> list[tuple[int, tuple[RunHistory, str]]]:
    return list(enumerate(zip(histories, names, strict=True)))


def _curve(
    history: RunHistory,
    rows: Sequence[Row],
    key: str,
    name: str,
    color: int,
    factor: float,
    *,
    marked: bool = False,
    dashed: bool = False,
) -> dict[str, Any] | None:
    """One curve; None without values. marked: show each point."""
    known = [(row["step"], row.get(key)) for row in rows]
    points = [(step, factor * v) for step, v in known if isinstance(v, int | float) and math.isfinite(v)]
    if not points:
        return None
    width = -(-len(points) // MOST)
    bins = [points[i : i + width] for i in range(0, len(points), width)]
    hours = dict(zip((row["step"] for row in history.training), history.hours, strict=True))
    steps = [part[-1][0] for part in bins]
    return {
        "name": name,
        "color": color,
        "marked": marked,
        "dashed": dashed,
        "steps": steps,
        "hours": [float(f"{hours[s] if s in hours else history.hours_at(s):.5g}") for s in steps],
        "values": [float(f"{sum(value for _, value in part) / len(part):.5g}") for part in bins],
    }
