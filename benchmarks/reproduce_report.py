"""What `reproduce.py` found: verdicts, Markdown and a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from reproduce_findings import Finding, Plan, finetuning_of
from reproduce_probes import Probes, as_array

from arm_cli.demo.report.figures import Curve, Points, accuracy_figure, points_figure
from arm_cli.demo.report.page import Page
from arm_cli.sweep.folder import Result
from arm_cli.sweep.table import shown
from arm_core.training.intervals import Interval, mean_interval, paired_difference

METRIC = "eval_top1"
AGREES, DISAGREES, UNDECIDED = "agrees", "does not agree", "undecided"


@dataclass(frozen=True, kw_only=True)
class Test:
    """A claim with the difference that was measured."""

    better: str
    worse: str
    difference: Interval | None

    @property
    def verdict(self) -> str:
        return verdict(self.difference)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A finding with what was measured."""

    finding: Finding
    values: Mapping[str, Mapping[int, float]]
    """Test accuracy in percent by variant and seed."""
    tests: Sequence[Test]


def verdict(difference: Interval | None) -> str:
    """Whether the paper's better variant is better here: decided only by an interval without 0."""
    if difference is None:
        return UNDECIDED
    return {1: AGREES, -1: DISAGREES, 0: UNDECIDED}[difference.sign]


def outcomes(findings: Sequence[Finding], plan: Plan, results: Mapping[str, Result]) -> list[Outcome]:
    """Accuracies and differences by seed, of the runs that finished."""
    found = []
    for finding in findings:
        values: dict[str, dict[int, float]] = {}
        for variant in finding.variants:
            for seed in range(plan.seeds):
                result = results.get(finetuning_of(variant, seed, plan).name)
                if result is not None and not result.error:
                    values.setdefault(variant.label, {})[seed] = 100 * result.metrics[METRIC]
        tests = [
            Test(
                better=claim.better,
                worse=claim.worse,
                difference=paired_difference(values.get(claim.better, {}), values.get(claim.worse, {})),
            )
            for claim in finding.claims
        ]
        found.append(Outcome(finding=finding, values=values, tests=tests))
    return found


def _rows(found: Sequence[Outcome], probes: Probes | None) -> list[list[str]]:
    rows = []
    for outcome in found:
        for i, test in enumerate(outcome.tests):
            rows.append(
                [
                    f"({outcome.finding.key})" if i == 0 else "",
                    outcome.finding.paper if i == 0 else "",
                    f"{test.better} against {test.worse}",
                    shown(test.difference, METRIC, signed=True),
                    test.verdict,
                ]
            )
    if probes is not None:
        for name, values in (("k-NN", probes.knn), ("linear probe", probes.linear)):
            gain = probes.gain(values)
            first = name == "k-NN"
            rows.append(
                [
                    "(f)" if first else "",
                    "Pretraining learns features." if first else "",
                    f"{name} on the frozen encoder after {max(values)} steps against random weights",
                    shown(gain, METRIC, signed=True),
                    verdict(gain),
                ]
            )
    return rows


HEAD = ["", "paper", "here", "difference, points: mean ± 95 % interval", "verdict"]

NOTE = (
    "Differences are between runs with the same seed, on the test digits; the interval is Student's t over "
    "the seeds. 'agrees' and 'does not agree' need an interval without 0. The models have 6 blocks of 64 "
    "channels, the images 24x24 pixels: agreement here does not prove the paper's figure, and disagreement "
    "does not refute it. With this many comparisons, an interval misses 0 by chance about once in twenty."
)


def markdown(found: Sequence[Outcome], probes: Probes | None, facts: Mapping[str, str]) -> str:
    """The whole result as Markdown."""
    lines = ["# The paper's findings in the small", "", NOTE, ""]
    lines += [_line(HEAD), "|---" * len(HEAD) + "|", *(_line(row) for row in _rows(found, probes)), ""]
    for outcome in found:
        lines += [f"## ({outcome.finding.key}) {outcome.finding.question}", ""]
        lines += [_line(["variant", "test accuracy, %", "seeds", "values"]), "|---|---|---|---|"]
        for label, values in outcome.values.items():
            each = ", ".join(f"{value:.1f}" for value in values.values())
            interval = mean_interval(list(values.values()))
            lines.append(_line([label, shown(interval, METRIC), str(len(values)), each]))
        lines.append("")
    if probes is not None:
        lines += ["## (f) Probes of the frozen encoder over pretraining steps", ""]
        lines += [_line(["step", "k-NN, %", "linear probe, %"]), "|---|---|---|"]
        for step in probes.knn:
            cells = [shown(mean_interval(v[step]), METRIC) for v in (probes.knn, probes.linear)]
            lines.append(_line([str(step), *cells]))
        lines.append("")
    return "\n".join([*lines, *(f"- {name}: {text}" for name, text in facts.items()), ""])


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def write_page(path: Path, found: Sequence[Outcome], probes: Probes | None, facts: Mapping[str, str]) -> None:
    """The page: the table of verdicts, then a drawing for each finding."""
    rows = _rows(found, probes)
    counts = {word: sum(row[-1] == word for row in rows) for word in (AGREES, DISAGREES, UNDECIDED)}
    lead = ", ".join(f"{count} {word}" for word, count in counts.items())
    page = Page("The paper's findings in the small", f"Comparisons on handwritten digits: {lead}.")
    page.section("Paper and reproduction", NOTE)
    page.table(HEAD, rows)
    for outcome in found:
        page.section(f"({outcome.finding.key}) {outcome.finding.question}", f"Paper: {outcome.finding.paper}")
        groups = {label: list(values.values()) for label, values in outcome.values.items()}
        points = Points(label="", axis="", groups=groups)
        page.figures([points_figure([points], title=outcome.finding.question, label="test accuracy, %")])
        page.table(
            ["variant", "test accuracy, %", "seeds"],
            [[label, shown(mean_interval(v), METRIC), len(v)] for label, v in groups.items()],
            "Mean and 95 % interval over the seeds.",
        )
    if probes is not None:
        page.section("(f) Features of the frozen encoder over pretraining")
        curves = [
            Curve(label=name, steps=sorted(values), runs=as_array(values))
            for name, values in (("k-NN", probes.knn), ("linear probe", probes.linear))
        ]
        figure = accuracy_figure(curves, {}, title="All labelled training digits", axis="pretraining step")
        page.figures([figure], "Lines are means, bands extend from the lowest to the highest seed.")
    page.section("This run")
    page.table(["", ""], facts.items())
    page.write(path)
