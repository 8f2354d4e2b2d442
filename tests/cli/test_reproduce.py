"""`make reproduce`: runs are shared between findings, and a verdict needs an interval without zero."""

import json
import re
from pathlib import Path

import click
import numpy as np
import pytest

from arm_cli.sweep.folder import Result
from arm_core.training.intervals import Interval


@pytest.fixture(autouse=True)
def _scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))


@pytest.fixture
def plan():
    from reproduce_findings import Plan

    return Plan(seeds=5, pretraining=1, finetuning=1)


def test_findings_share_pretraining_and_equal_runs(plan):
    from reproduce_findings import FINDINGS, members_of

    members = members_of(FINDINGS, plan)
    names = [member.name for member in members]
    assert len(set(names)) == len(names)
    pretraining = [name for name in names if name.startswith("pretrain/")]
    assert len(pretraining) == 7 * 5  # base, 2 clusters, 3 orders, raw targets
    finetuning = [member for member in members if member.name.startswith("finetune/")]
    assert len(finetuning) == (4 + 1 + 2 + 3 + 1 + 2) * 5  # four of (a); the base once; the other variants
    assert all(member.after in pretraining for member in finetuning if member.after)
    assert {member.evaluate_on for member in finetuning} == {"test"}


def test_lengths_are_part_of_the_names_of_runs():
    from reproduce_findings import FINDINGS, Plan, members_of

    short, full = (Plan(seeds=1, pretraining=f, finetuning=f) for f in (0.01, 1))
    names = [{member.name for member in members_of(FINDINGS, plan)} for plan in (short, full)]
    assert not names[0] & names[1]


def test_every_claim_is_about_variants_of_its_finding():
    from reproduce_findings import FINDINGS

    for finding in FINDINGS:
        labels = {variant.label for variant in finding.variants}
        assert {name for claim in finding.claims for name in (claim.better, claim.worse)} <= labels


@pytest.mark.parametrize(
    ("difference", "expected"),
    [
        (Interval(mean=2.0, half=1.0, count=5), "agrees"),
        (Interval(mean=-2.0, half=1.0, count=5), "does not agree"),
        (Interval(mean=2.0, half=2.5, count=5), "undecided"),
        (Interval(mean=2.0, half=None, count=1), "undecided"),
        (None, "undecided"),
    ],
)
def test_a_verdict_needs_an_interval_without_zero(difference, expected):
    from reproduce_report import verdict

    assert verdict(difference) == expected


def test_the_report_puts_paper_measurement_and_verdict_side_by_side(plan, tmp_path):
    from reproduce_findings import FINDINGS, finetuning_of
    from reproduce_probes import Probes
    from reproduce_report import markdown, outcomes, write_page

    rng, results = np.random.default_rng(0), {}
    for finding in FINDINGS:
        for variant in finding.variants:
            for seed in range(plan.seeds):
                top1 = (0.5 if variant.pretraining is None else 0.9) + rng.normal() / 100
                results[finetuning_of(variant, seed, plan).name] = Result(metrics={"eval_top1": top1})
    failed = finetuning_of(FINDINGS[0].variants[0], 0, plan).name
    results[failed] = Result(error="broken")
    found = outcomes(FINDINGS, plan, results)
    steps = {0: [20.0, 21.0], 600: [60.0, 61.0]}
    probes = Probes(knn=steps, linear=steps)
    text = markdown(found, probes, {"machine": "test"})
    assert re.search(r"pretrained, 10 labels against from scratch, 10 labels \| \+(39|40)\.", text)
    assert "| (f) | Pretraining learns features. |" in text
    assert "| 600 | 60.5 ± 6.4 |" in text
    assert next(t.difference.count for t in found[0].tests) == 4  # pairs of the seeds that finished
    write_page(tmp_path / "page.html", found, probes, {"machine": "test"})
    page = (tmp_path / "page.html").read_text()
    assert re.search(r"\d+ agrees, \d+ does not agree, \d+ undecided", page)
    assert "<script" not in page


def test_runs_of_other_recipes_are_not_reused(plan, tmp_path):
    from reproduce import check_same
    from reproduce_findings import FINDINGS, members_of

    members = members_of(FINDINGS[:1], plan)
    record = tmp_path / "recipes.json"
    check_same(record, members)
    check_same(record, members[:3])
    assert len(json.loads(record.read_text())) == len(members)
    record.write_text(json.dumps({members[0].name: "other"}))
    with pytest.raises(click.ClickException, match="another recipe"):
        check_same(record, members)
