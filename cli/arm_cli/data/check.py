"""`arm data check`: finds broken or unusual images, and says how training treats them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from arm_cli.options import data_format_option, json_option
from arm_cli.show import echo, scaled

if TYPE_CHECKING:
    from arm_core.data.checking import Report

SHOWN = 5
"""The number of names that are printed for each kind of finding; --json prints all."""


@click.command(short_help="Find images that are broken, unusual or duplicated.")
@click.argument("path")
@data_format_option
@click.option("--workers", type=click.IntRange(min=1), default=4, show_default=True, help="Threads.")
@json_option
def check(path: str, data_format: str | None, workers: int, as_json: bool) -> None:
    """Decode every image at PATH, and report how training treats the unusual ones.

    The exit code is 1 if a finding stops training: a broken, empty or too large image, or an empty class
    folder.
    """
    from arm_cli.progress import ProgressBar
    from arm_cli.show import print_json
    from arm_core.data import checking
    from arm_core.data.opening import Format

    source, report = checking.open_leniently(path, form=Format(data_format or "auto"))
    with ProgressBar("check", len(source), "images") as bar:
        checking.check(source, report, workers=workers, checked=lambda count: bar.advance(count))
    if as_json:
        print_json(_as_data(path, report))
    else:
        _print(path, report)
    if report.bad:
        raise SystemExit(1)


def _as_data(path: str, report: Report) -> dict[str, Any]:
    from arm_core.data.checking import CONSEQUENCES

    findings = {
        kind: {"count": len(names), "training": CONSEQUENCES[kind], "names": names}
        for kind, names in report.findings.items()
    }
    return {
        "path": path,
        "images": report.images,
        "bytes": report.bytes,
        "bad": report.bad,
        "findings": findings,
        "classes": report.classes,
    }


def _print(path: str, report: Report) -> None:
    from arm_core.data.checking import CONSEQUENCES

    echo(f"{path}: {report.images} images, {scaled(report.bytes, 'B')}")
    for kind in CONSEQUENCES:
        if names := report.findings.get(kind):
            echo(f"\n{kind}: {len(names)} ({CONSEQUENCES[kind]})", bold=True)
            for name in names[:SHOWN]:
                echo(f"  {name}")
            if len(names) > SHOWN:
                echo(f"  ... and {len(names) - SHOWN} more; --json lists all")
    if report.classes:
        counts = sorted(report.classes.items(), key=lambda item: item[1])
        (fewest, low), (most, high) = counts[0], counts[-1]
        echo(f"\n{len(counts)} classes of {low} ({fewest}) to {high} ({most}) images")
    echo(f"\n{report.bad} findings stop training" if report.bad else "\nnothing stops training")
