"""Curves as SVG text, drawn by matplotlib without a display."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

INK, FAINT = "#333344", "#d8d8e0"
COLOURS = ("#0b6bcb", "#c4501b", "#5b8c2a", "#7a4fb5")


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One line of a figure: several runs with different seeds, drawn as mean and spread."""

    label: str
    steps: Sequence[int]
    runs: npt.NDArray[np.floating]
    """(runs, steps)"""


def _figure(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # slow to import: only a report needs it

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(INK)
    axes.tick_params(colors=INK, labelsize=9)
    axes.grid(axis="y", color=FAINT, linewidth=0.7)
    return figure, axes


def _svg(figure: Any, description: str) -> str:
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "arm-vision"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Title": description})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def loss_figure(
    steps: Sequence[int], losses: Sequence[float], *, title: str, width: float = 7.2, height: float = 2.8
) -> str:
    """Training loss against steps, SVG; raw values in a light colour, a running mean on top."""
    values = np.asarray(losses, dtype=np.float64)
    window = max(1, len(values) // 30)
    smooth = np.convolve(np.pad(values, (window - 1, 0), mode="edge"), np.ones(window) / window, "valid")
    figure, axes = _figure(width, height)
    axes.plot(steps, values, color=COLOURS[0], alpha=0.25, linewidth=1)
    axes.plot(steps, smooth, color=COLOURS[0], linewidth=1.8)
    axes.set_xlabel("training step", color=INK, fontsize=9)
    axes.set_ylabel("loss", color=INK, fontsize=9)
    return _svg(figure, title)


def accuracy_figure(
    curves: Sequence[Curve],
    lines: dict[str, float],
    *,
    title: str,
    axis: str = "finetuning step",
    width: float = 5.2,
    height: float = 3.4,
) -> str:
    """Accuracy in percent against steps, SVG: mean over the runs, band from lowest to highest run.

    `lines` are horizontal references (a baseline's accuracy by its label).
    """
    figure, axes = _figure(width, height)
    for curve, colour in zip(curves, COLOURS, strict=False):
        axes.fill_between(
            curve.steps, curve.runs.min(0), curve.runs.max(0), color=colour, alpha=0.15, linewidth=0
        )
        axes.plot(
            curve.steps, curve.runs.mean(0), color=colour, linewidth=1.8, marker="o", ms=3, label=curve.label
        )
    for (label, value), style in zip(lines.items(), ("--", ":", "-."), strict=False):
        axes.axhline(value, color=INK, linewidth=1, linestyle=style, label=label)
    axes.set_ylim(0, 100)
    axes.set_title(title, color=INK, fontsize=10)
    axes.set_xlabel(axis, color=INK, fontsize=9)
    axes.set_ylabel("test accuracy, %", color=INK, fontsize=9)
    figure.legend(frameon=False, fontsize=8, labelcolor=INK, loc="outside lower center", ncols=2)
    return _svg(figure, title)


@dataclass(frozen=True, kw_only=True)
class Points:
    """Repeated values at each of several settings."""

    label: str
    axis: str
    """Name of the setting."""
    groups: dict[str, list[float]]
    """Values by setting."""


def points_figure(
    series: Sequence[Points], *, title: str, label: str, width: float = 7.2, height: float = 3.4
) -> str:
    """Single values as points, their mean and 95 % interval as a bar, SVG."""
    from arm_core.training.intervals import mean_interval

    figure, axes = _figure(width, height)
    places = list(dict.fromkeys(name for points in series for name in points.groups))
    for i, points in enumerate(series):
        colour = COLOURS[i % len(COLOURS)]
        shift = 0.5 * ((i + 0.5) / len(series) - 0.5)
        for j, (name, values) in enumerate(points.groups.items()):
            if not values:
                continue
            at, interval = places.index(name) + shift, mean_interval(values)
            axes.plot([at] * len(values), values, "o", color=colour, alpha=0.3, ms=4, linewidth=0)
            axes.errorbar(
                [at],
                [interval.mean],
                yerr=[interval.half or 0.0],
                fmt="_",
                ms=14,
                color=colour,
                capsize=4,
                linewidth=1.6,
                label=points.label if j == 0 else None,
            )
    axes.set_xticks(range(len(places)), places)
    axes.set_xlim(-0.5, len(places) - 0.5)
    axes.set_xlabel(series[0].axis if series else "", color=INK, fontsize=9)
    axes.set_ylabel(label, color=INK, fontsize=9)
    if any(points.label for points in series):
        figure.legend(frameon=False, fontsize=8, labelcolor=INK, loc="outside lower center", ncols=2)
    return _svg(figure, title)


def plane_figure(
    points: npt.NDArray[np.floating],
    labels: npt.NDArray[np.integer],
    *,
    title: str,
    width: float = 3.6,
    height: float = 3.6,
) -> str:
    """Points (N, 2) as the digits of their labels (N,), SVG."""
    figure, axes = _figure(width, height)
    colours = _colours(10)
    for x, y, label in zip(*points.T, labels, strict=True):
        axes.text(x, y, str(label), color=colours[int(label) % 10], fontsize=6, ha="center", va="center")
    low, high = points.min(0), points.max(0)
    axes.set_xlim(low[0], high[0])
    axes.set_ylim(low[1], high[1])
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_title(title, color=INK, fontsize=9)
    return _svg(figure, title)


def _colours(count: int) -> list[Any]:
    from matplotlib import colormaps

    return [colormaps["tab10"](i) for i in range(count)]
