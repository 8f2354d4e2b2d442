"""`arm bench`: speed of parts of a model on this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from arm_cli.options import EngineChoice, batch_size_option, engine_options, json_option
from arm_cli.show import print_json, print_table

if TYPE_CHECKING:
    from arm_core.engine.protocol import Backend
    from arm_core.engine.scan_timing import ScanShape, ScanTimer, ScanTimes

SIZES = ("digits", "tiny", "small", "base", "large", "huge")
STAGES = ("pretrain", "finetune")


@click.group(short_help="Measure the scan on this machine.")
def bench() -> None:
    """Measure parts of a model on this machine."""


@bench.command(short_help="Time every implementation of the selective scan.")
@click.option(
    "--model",
    type=click.Choice(SIZES),
    default="base",
    show_default=True,
    help="Preset.",
)
@click.option("--stage", type=click.Choice((*STAGES, "both")), default="both", show_default=True)
@batch_size_option(8)
@click.option("--batch", type=click.IntRange(min=1), hidden=True)  # the earlier name of --batch-size
@click.option(
    "--repeats", type=click.IntRange(min=1), default=10, show_default=True, help="Timed calls of each."
)
@click.option("--tune", is_flag=True, help="Search the constants of the Metal kernels and print the best.")
@engine_options
@json_option
def scan(
    model: str,
    stage: str,
    batch_size: int,
    batch: int | None,
    repeats: int,
    tune: bool,
    engine: EngineChoice,
    as_json: bool,
) -> None:
    """Time the selective scan of one layer: the forward pass alone, and forward and backward together.

    --scan auto measures every implementation that is available on the device. The share is
    the time that the device needs to read the operands and write the results at its copy rate, divided by
    the measured time.
    """
    from arm_core.engine.protocol import Precision

    backend, rate = engine.find(), 0.0
    timer = backend.scan_timer(engine.device)
    bfloat16 = engine.options().precision is Precision.BFLOAT16
    shapes = {
        name: _shape(model, name, batch or batch_size, bfloat16)
        for name in (STAGES if stage == "both" else (stage,))
    }
    if tune:
        results = {name: _search(timer, shape, repeats, as_json) for name, shape in shapes.items()}
    else:
        names, rate = _names(engine, backend), timer.copy_rate()
        results = {
            name: [_row(timer, shape, rate, scan, repeats) for scan in names]
            for name, shape in shapes.items()
        }
    report = {
        "backend": backend.name,
        "version": backend.version(),
        "device": timer.device,
        "model": model,
        "precision": "bfloat16" if bfloat16 else "float32",
        "results": results,
    }
    if as_json:
        print_json(report)
        return
    click.echo(f"{backend.version()}, device {timer.device}, model {model}, {report['precision']}")
    if not tune:
        click.echo(f"copy rate {rate / 1e9:.1f} GB/s; shares are relative to it")
    for name, found in results.items():
        click.secho(f"\n{name}: {shapes[name]}", bold=True)
        _print_search(found) if tune else _print(found)


def _shape(model: str, stage: str, batch: int, bfloat16: bool) -> ScanShape:
    from arm_core.engine.scan_timing import ScanShape
    from arm_core.model.presets import classifier_preset, pretrain_preset

    spec = pretrain_preset(model) if stage == "pretrain" else classifier_preset(model)
    return ScanShape(spec=spec, batch=batch, bfloat16=bfloat16)


def _names(engine: EngineChoice, backend: Backend) -> list[str]:
    """The scans to measure: the requested one, or all that are available."""
    from arm_core.engine.scans import choose_scan

    scans = backend.scans(backend.devices()[0] if engine.device == "auto" else engine.device)
    if engine.scan == "auto":
        return [name for name, why in scans.items() if why is None]
    return [choose_scan(scans, engine.scan)]


def _row(timer: ScanTimer, shape: ScanShape, rate: float, scan: str, repeats: int) -> dict[str, Any]:
    times = timer.time(shape, scan, repeats=repeats)
    return {"scan": scan, **_summary(times, shape), **_shares(times, shape, rate)}


def _summary(times: ScanTimes, shape: ScanShape) -> dict[str, Any]:
    from arm_core.engine.scan_timing import median

    return {
        "forward_ms": 1e3 * median(times.forward),
        "forward_backward_ms": 1e3 * median(times.both),
        "spread_ms": [1e3 * min(times.both), 1e3 * max(times.both)],
        "repeats": len(times.both),
        "shape": str(shape),
    }


def _shares(times: ScanTimes, shape: ScanShape, rate: float) -> dict[str, float]:
    from arm_core.engine.scan_timing import median

    return {
        "forward_gb_per_s": shape.forward_bytes / median(times.forward) / 1e9,
        "forward_share": shape.forward_bytes / rate / median(times.forward),
        "both_gb_per_s": shape.both_bytes / median(times.both) / 1e9,
        "both_share": shape.both_bytes / rate / median(times.both),
        "copy_gb_per_s": rate / 1e9,
    }


def _print(rows: list[dict[str, Any]]) -> None:
    print_table(
        ("scan", "forward", "GB/s", "share", "with backward", "GB/s", "share"),
        [
            (
                row["scan"],
                f"{row['forward_ms']:.2f} ms",
                f"{row['forward_gb_per_s']:.1f}",
                f"{row['forward_share']:.0%}",
                f"{row['forward_backward_ms']:.2f} ms",
                f"{row['both_gb_per_s']:.1f}",
                f"{row['both_share']:.0%}",
            )
            for row in rows
        ],
    )


def _search(timer: ScanTimer, shape: ScanShape, repeats: int, quiet: bool) -> list[dict[str, Any]]:
    """Print all tried constants, the fastest first."""
    found = []
    for entry, times in timer.tune(shape, repeats=repeats):
        found.append({"entry": entry, **_summary(times, shape)})
        if not quiet:
            click.echo(f"{found[-1]['forward_backward_ms']:8.2f} ms  {entry}", err=True)
    return sorted(found, key=lambda row: row["forward_backward_ms"])


def _print_search(rows: list[dict[str, Any]]) -> None:
    best, worst = rows[0], rows[-1]
    click.echo(
        f"{len(rows)} choices, forward and backward {best['forward_backward_ms']:.2f} ms "
        f"to {worst['forward_backward_ms']:.2f} ms; the best, to copy into TABLE in arm_mlx/metal/tuning.py:"
    )
    click.echo(best["entry"])
