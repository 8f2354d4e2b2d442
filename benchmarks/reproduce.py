"""The findings of the ARM paper in the small, on the built-in digits, with confidence intervals.

    make reproduce                      # or: python benchmarks/reproduce.py --out reproduction
    make reproduce ARGS=--full          # 10 seeds and longer runs

Trains all members with the workers of `arm sweep`: the same command resumes an interrupted reproduction.
Recipes were tuned on validation digits (benchmarks/results/demo_tuning-*.md); the figures are on test digits.
Writes OUT/reproduce.html and benchmarks/results/reproduce-MACHINE-DATE.md, whatever comes out.
"""

from __future__ import annotations

import datetime
import json
import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import click
from hardware import header
from reproduce_findings import FINDINGS, Plan, members_of
from reproduce_probes import Probes, probe_steps
from reproduce_report import Outcome, markdown, outcomes, write_page

from arm_cli.sweep.folder import SweepFolder, results_of
from arm_cli.sweep.members import Member
from arm_cli.sweep.workers import Event, run_members
from arm_core.engine.protocol import EngineOptions
from arm_core.engine.registry import choose_backend
from arm_core.files.atomic import replace_text
from arm_core.recipe.recipe import fingerprint

RESULTS = Path(__file__).parent / "results"


def check_same(record: Path, members: Sequence[Member]) -> None:
    """Record the recipes of a folder's runs; ValueError if it holds runs of other recipes."""
    wanted = {member.name: fingerprint(member.recipe) for member in members}
    stored = json.loads(record.read_text("utf-8")) if record.exists() else {}
    if changed := [name for name in wanted if stored.get(name, wanted[name]) != wanted[name]]:
        raise click.ClickException(
            f"{record.parent}: {changed[0]} was trained with another recipe; choose another --out"
        )
    replace_text(record, json.dumps({**stored, **wanted}, indent=1) + "\n")


@click.command()
@click.option("--out", default="reproduction", show_default=True, help="Folder of the runs; resumes.")
@click.option("--full", is_flag=True, help="10 seeds, and pretraining that is four times as long.")
@click.option("--seeds", type=click.IntRange(min=1), help="Number of seeds; by default 5.")
@click.option("--jobs", type=click.IntRange(min=1), default=os.cpu_count(), show_default=True)
@click.option("--scale", type=float, default=1.0, help="Factor on all lengths, to try the script.")
@click.option("--only", help="Letters of the findings to reproduce, for example abe.")
@click.option("--backend", default="auto", show_default=True)
@click.option("--no-record", is_flag=True, help="Do not write to benchmarks/results.")
def main(
    out: str,
    full: bool,
    seeds: int | None,
    jobs: int,
    scale: float,
    only: str | None,
    backend: str,
    no_record: bool,
) -> None:
    began, chosen = time.monotonic(), choose_backend(backend)
    plan = Plan(
        seeds=seeds or (10 if full else 5), pretraining=4 * scale if full else scale, finetuning=scale
    )
    findings = [finding for finding in FINDINGS if only is None or finding.key in only]
    members = members_of(findings, plan)
    folder = SweepFolder(Path(out))
    with folder.locked():
        check_same(folder.path / "recipes.json", members)
    count, ended = len(members) - len(results_of(folder, members)), 0
    print(f"{len(findings)} findings, {len(members)} runs, {count} of them to train, {plan.seeds} seeds")

    def report(event: Event) -> None:
        nonlocal ended
        if event.result is None:
            return
        ended += 1
        minutes = (time.monotonic() - began) / 60
        top1 = event.result.metrics.get("eval_top1")
        text = event.result.error or (f"{100 * top1:.1f} %" if top1 is not None else "pretrained")
        click.echo(f"[{ended}/{count}, {minutes:.1f} min] {event.member}: {text}")

    run_members(folder, members, chosen.name, EngineOptions(), jobs=jobs, report=report)
    results = results_of(folder, members)
    found: list[Outcome] = outcomes(findings, plan, results)
    probes: Probes | None = None
    if only is None or "f" in only:
        click.echo("probing the pretrained encoders")
        probes = probe_steps(folder, plan, chosen)
    facts = {
        "machine and versions": header("torch", "numpy").replace("\n", "; "),
        "engine": chosen.version(),
        "seeds": str(plan.seeds),
        "time": f"{(time.monotonic() - began) / 60:.1f} minutes with {jobs} jobs",
        "failed runs": ", ".join(n for n, r in results.items() if r.error) or "none",
        "command": shlex.join(["python", "benchmarks/reproduce.py", *sys.argv[1:]]),
    }
    text = markdown(found, probes, facts)
    print(text)
    page = folder.path / "reproduce.html"
    write_page(page, found, probes, facts)
    print(f"Page: {page.resolve()}")
    if not no_record:
        name = f"reproduce-{os.cpu_count()}cpu-{datetime.datetime.now(datetime.UTC).date()}"
        name += "-full" if full else ""
        (RESULTS / f"{name}.md").write_text(text, encoding="utf-8")
        print(f"Recorded: {RESULTS / name}.md")


if __name__ == "__main__":
    main()
